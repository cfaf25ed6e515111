"""Places in the home's own MLflow database: a home may be moved or copied, and MLflow writes absolute places down.

Place in the flow: `runs` and the UI renew them before anything is written. Invariant: files go below the home that the
user names, never where it once was.
"""

from __future__ import annotations

import contextlib
import sqlite3
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from orchestrator.record.home import Home

PLACES = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))


def renew_places(home: Home) -> None:
    """Move the places of all studies below this home, where the home was elsewhere when they were written."""
    now = home.root.resolve()
    with (
        FileLock(home.root / "mlflow.lock"),
        contextlib.closing(sqlite3.connect(home.database_file, timeout=10)) as database,
        database,
    ):
        for before in _other_roots(database, now.as_uri()):
            for table, column in PLACES:
                _replace(database, table, column, f"{before}/", f"{now.as_uri()}/")
            folder = unquote(urlsplit(before).path)
            _replace(database, "logged_model_tags", "tag_value", f"{folder}/", f"{now}/")


def _other_roots(database: sqlite3.Connection, now: str) -> list[str]:
    """Where this home was when experiments of it were made, as URIs."""
    found = set()
    for name, place in database.execute("SELECT name, artifact_location FROM experiments"):
        root = str(place or "").removesuffix(f"/mlartifacts/{name}")
        if root != place and root != now and root.startswith("file:///"):
            found.add(root)
    return sorted(found)


def _replace(database: sqlite3.Connection, table: str, column: str, before: str, after: str) -> None:
    database.execute(
        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
        (after, len(before) + 1, len(before), before),
    )
