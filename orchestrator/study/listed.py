"""Choices of layers that were made elsewhere: what the files that `schedule.choice.layers` names say, in their place.

Place in the flow: `loader` has the plain values of a study file with its overrides, and nothing is checked yet. What a
file said is remembered with the study: the file may go afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEY = ["choice", "layers"]
FORMS = (
    "a JSON file of layers in the order in which they go, [4, 0, 2], of those that stay attention, "
    '{"keep": [1, 3]}, or the choice.json of a stage'
)
Steps = tuple[str | int, ...]


def fill_in(values: Any, base: Path) -> Iterator[tuple[Steps, str]]:
    """Put into `values` what the named files hold, wherever they are named, in the search too.

    Paths are relative to `base`. Yields for each file that cannot be used the path of its key and what is wrong.
    """
    for holder, step, path in list(_names(values, ())):
        try:
            holder[step] = layers_in(base / holder[step])
        except ValueError as error:
            yield path, str(error)


def _names(values: Any, path: Steps) -> Iterator[tuple[Any, Any, Steps]]:
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for step, value in inside:
        here = (*path, step)
        keys = [key for name in here if isinstance(name, str) for key in name.split(".")]  # axes have dots
        if isinstance(value, str) and keys[-2:] == KEY:
            yield values, step, here
        else:
            yield from _names(value, here)


def layers_in(file: Path) -> Any:
    """What a file says of layers: their order, or `{"keep": [...]}`. Raises `ValueError` where it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): give {FORMS}") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): give {FORMS}") from error
    if isinstance(content, dict):
        known = {key: content[key] for key in ("order", "keep") if key in content}
        if len(known) != 1:
            raise ValueError(f"{file} has {' and '.join(known) or 'neither order nor keep'}: give {FORMS}")
        content = known.get("order", known)
    if not isinstance(content, dict | list):
        raise ValueError(f"{file} holds {json.dumps(content)[:40]}: give {FORMS}")
    return content
