"""Short names of operators, for people."""

from __future__ import annotations

from typing import Any

from operators.config import HyenaConfig, WindowConfig


def operator_name(operator: Any) -> str:
    """A short name for people: `hyena-2` by order, `hyena-4h` by heads, `hyena-4h-power` with a feature map,
    `hyena-2-modal` with filters that are not implicit, `hyena-4h-power-w32` with a window, `window-64`, `skip`."""
    if isinstance(operator, WindowConfig):
        return f"window-{operator.window}"
    if not isinstance(operator, HyenaConfig):
        return str(operator.kind)
    shape = f"{operator.order}" if operator.heads is None else f"{operator.heads}h"
    features = "" if operator.feature_map == "identity" else f"-{operator.feature_map}"
    kind = "" if operator.filter.kind == "implicit" else f"-{operator.filter.kind}"
    return f"hyena-{shape}{features}{kind}" + ("" if operator.window is None else f"-w{operator.window}")
