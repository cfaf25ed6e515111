"""Turn pretrained transformers into long-convolution models, a few layers at a time, and record what it costs.

In Python: `orchestrator.api`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["home", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `home` of the API, loaded when they are asked for: the rooms below stay light."""
    if name in __all__:
        from orchestrator import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
