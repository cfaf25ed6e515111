"""A compiled core for what lies between the projections of Hyena on the CPU; optional, and off until asked for.

`use(True)` switches it on for this process, as far as there is one; without, everything runs in torch. The two agree
to rounding but not in their bits, so that nothing switches itself on: who trains or evaluates decides, and what was
begun with one is to be continued with the same. Results of the core do not depend on the number of threads.

`make build-ext`, or `python -m operators.native`, compiles it (a minute) into the user's cache (`build`). Nothing
else does, unless `LAYERSWAP_NATIVE` says so:

    unset   `use(True)` takes the core where it is built; where it is not it says so in one line, once
    0       never
    build   `use(True)` compiles it where it is missing; where that fails it says so in one line, once
    1       the same, but a failure is an error

It serves float32 and bfloat16 on the CPU up to `LONGEST` positions; all else takes torch's path in silence.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from operators.native.build import build as compiled
from operators.native.build import library

LONGEST = 2**18
MODES = ("0", "build", "1")

_log = logging.getLogger(__name__)
_loaded = _failed = _used = False


def use(on: bool) -> bool:
    """Switch the core on or off for this process; returns whether it is in use from now on.

    Raises:
        RuntimeError: there is no core and `LAYERSWAP_NATIVE` is 1.
        ValueError: `LAYERSWAP_NATIVE` is none of its values.
    """
    global _used
    _used = on and available()
    return _used


def in_use() -> bool:
    """Whether operators run through the core where it serves them."""
    return _used


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Whatever is switched inside, the core is in use afterwards if it was before."""
    global _used
    before = _used
    try:
        yield
    finally:
        _used = before


def available() -> bool:
    """Whether there is a core, loaded by this call if need be; see the module's head for what is compiled when."""
    global _loaded, _failed
    mode = os.environ.get("LAYERSWAP_NATIVE") or None
    if mode not in (None, *MODES):
        raise ValueError(f"LAYERSWAP_NATIVE must be one of {', '.join(MODES)}, or unset, but is {mode!r}.")
    if mode == "0" or _loaded or (_failed and mode != "1"):
        return _loaded and mode != "0"
    try:
        path = library()
        if not path.exists():
            if mode is None:
                raise RuntimeError("it is not built: run make build-ext")
            path = compiled()
        torch.ops.load_library(str(path))
        _loaded = True
    except (OSError, RuntimeError) as error:
        if mode == "1":
            raise RuntimeError(f"LAYERSWAP_NATIVE=1 asks for the compiled core, but {error}") from error
        _failed = True
        _log.warning("No compiled core, so operators run in torch: %s", error)
    return _loaded


def serves(p: Tensor) -> bool:
    """Whether the core is in use and computes what begins with these projections (B, E, L)."""
    return _used and p.is_cpu and p.dtype in (torch.float32, torch.bfloat16) and p.shape[-1] <= LONGEST
