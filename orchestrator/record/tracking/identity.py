"""Whose a run in MLflow is: a name of the home's own that no other home has, made once and moved with it."""

from __future__ import annotations

import uuid

from filelock import FileLock

from orchestrator.files import write_text
from orchestrator.record.home import Home

HOME = "layerswap.home"  # tag: the home whose recorder made the run
FILE = "home-id"


def home_id(home: Home) -> str:
    """The home's name, made where it has none."""
    home.root.mkdir(parents=True, exist_ok=True)
    if (known := known_id(home)) is not None:
        return known
    with FileLock(home.root / f"{FILE}.lock"):
        if known_id(home) is None:
            write_text(home.root / FILE, uuid.uuid4().hex)
    return home_id(home)


def known_id(home: Home) -> str | None:
    """The home's name; None before it has one."""
    path = home.root / FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else None
