"""Mutants that mean the same as the code: `equivalent.txt`, by the lines as they read, not by where they stand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.mutants.mutations import mutants

LIST = Path(__file__).with_name("equivalent.txt")


def reasons(text: str | None = None) -> dict[tuple[str, str, str], str]:
    """Reason by file, line and mutated line.

    Every entry is a file's name, then for each mutant three lines that begin with `- ` (the line), `+ ` (mutated) and
    `= ` (why nothing can tell them apart). Raises ValueError for an entry without a reason.
    """
    found: dict[tuple[str, str, str], str] = {}
    path = before = after = ""
    for number, line in enumerate((LIST.read_text(encoding="utf-8") if text is None else text).splitlines(), 1):
        mark, rest = line[:2], line[2:].strip()
        if mark == "- ":
            before, after = rest, ""
        elif mark == "+ ":
            after = rest
        elif mark == "= " and before and after and path and rest:
            found[path, before, after] = rest
            before = after = ""
        elif line.strip() and not line.startswith("#"):
            if before or mark == "= ":
                raise ValueError(f"{LIST.name}:{number}: a mutant is three lines, - and + and =, but this is {line!r}.")
            path = line.strip()
    if before:
        raise ValueError(f"{LIST.name}: the last mutant has no reason.")
    return found


def stale(root: Path, known: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Entries that are no mutant any more, since the code has changed."""
    known = list(known)
    files = {path for path, _, _ in known if (root / path).exists()}
    real = {(m.path, m.before, m.after) for f in files for m in mutants(f, (root / f).read_text(encoding="utf-8"))}
    return [entry for entry in known if entry not in real]
