"""Run the checks: `python -m tests.models [--write] [TYPE ...]`; with --write into the tables of the docs."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from tests.models.exporting import export, loaded_alone
from tests.models.outcomes import outcome, summary, table
from tests.models.tiny import TYPES
from tests.pages import FAMILIES, README, write


def main() -> None:
    """Check types and say what became of each; the first that fails ends it."""
    parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.types or TYPES:
            found.append(outcome(name))
            print(name, found[-1].refused or found[-1].told or "passes", flush=True)
            if not found[-1].refused:
                export(name, Path(folder))
        swapped = [one.name for one in found if not one.refused]
        faults = loaded_alone(swapped, Path(folder))
        wrong = {name: fault for name, fault in faults.items() if fault}
    if wrong:
        raise SystemExit("\n".join(f"{name}, exported: {fault}" for name, fault in wrong.items()))
    if asked.write:
        write(FAMILIES, "tests.models", table(found))
        write(README, "tests.models", summary(found))


main()
