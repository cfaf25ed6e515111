"""What every specification has: a key, which names all that decides a stage's result.

Invariant: every field of a specification changes its key. Parents enter by their keys, so a key names a whole history.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field

from orchestrator.files import canonical_json
from orchestrator.study.values import Model

STAGE_VERSION = 8  # raise it with any change that makes an old result differ from a new one
DOMAIN = b"layerswap/stage\n"

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)
# What computes a stage's numbers: each has bits of its own. It came later, and keys of the CPU stay as they were.
Processor = Annotated[Device, Field(exclude_if=lambda value: value == "cpu")]


class Spec(Model):
    """What all stages have: the version of the code's meaning, and a key."""

    version: int = STAGE_VERSION

    @cached_property
    def key(self) -> str:
        """sha256 in hex over the canonical JSON of the validated fields."""
        return hashlib.sha256(DOMAIN + canonical_json(self.model_dump(mode="json")).encode()).hexdigest()

    def changed(self, **values: Any) -> Self:
        """The same with other values, and the key of those: a copy would keep the old one."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | values)

    @property
    def parents(self) -> dict[str, str]:
        """Role -> key of the stages that must be finished before this one."""
        roles = ("tokens", "teacher", "parent", "subject", "reference", "prepared", "blend", "previous")
        found = {role: getattr(self, role, None) for role in roles}
        return {role: key for role, key in found.items() if key is not None}

    @property
    def threads(self) -> int:
        """Cores that one process of the stage keeps busy."""
        return int(self.numerics.threads) if hasattr(self, "numerics") else 1

    @property
    def world_size(self) -> int:
        """Processes that compute the stage together."""
        return int(self.numerics.world_size) if hasattr(self, "numerics") else 1

    @property
    def cores(self) -> int:
        """Cores that the whole stage keeps busy."""
        return self.threads * self.world_size


# Windows of training text that are read again and again; none: all there are.
TextWindows = Annotated[int | None, Field(exclude_if=lambda value: value is None)]
