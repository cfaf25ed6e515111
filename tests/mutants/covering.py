"""Which tests run a line, and how long each takes: measured once and kept in `build/mutants`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import queue
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.mutants.copies import Copy
from tests.mutants.mutations import Mutant, function_lines

LONGEST = 1800.0  # seconds that a file of tests may take to be measured


@dataclasses.dataclass
class Covering:
    """Tests by line, and their seconds."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    cpu: dict[str, float] = dataclasses.field(default_factory=dict)
    by_line: dict[tuple[str, int], set[str]] = dataclasses.field(default_factory=lambda: defaultdict(set))
    lines: Counter[str] = dataclasses.field(default_factory=Counter)  # that a test runs in all
    failed: list[str] = dataclasses.field(default_factory=list)

    def add(self, measured: dict[str, Any]) -> None:
        self.failed += measured["failed"]
        for test, found in measured["tests"].items():
            self.seconds[test], self.cpu[test] = found["seconds"], found["cpu"]
            self.lines[test] = sum(map(len, found["lines"].values()))
            for file, lines in found["lines"].items():
                for line in lines:
                    self.by_line[file, line].add(test)

    def tests_of(self, mutant: Mutant, root: Path) -> list[str]:
        """The tests that run the mutated statement: first those that take little time and run little else.

        What runs when a file is imported is run by no test in particular: there it is the tests that call anything in
        the file, and where nothing in it is called, those that call anything in files that import it.
        """
        if not mutant.at_import:
            found = self._at((mutant.path, line) for line in range(mutant.lines[0], mutant.lines[1] + 1))
        else:
            found = self._calling(root, mutant.path)
            if not found:
                module = mutant.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                for file in {file for file, _ in self.by_line}:
                    if module in (root / file).read_text(encoding="utf-8"):
                        found |= self._calling(root, file)
        return sorted(found, key=lambda test: (self.cpu[test] * self.lines[test], test))

    def _at(self, places: Iterable[tuple[str, int]]) -> set[str]:
        return {test for place in places for test in self.by_line.get(place, ())}

    def _calling(self, root: Path, path: str) -> set[str]:
        source = (root / path).read_text(encoding="utf-8")
        return self._at((path, line) for line in function_lines(source))


def measured(root: Path, copies: list[Copy], test_files: list[str], ray: bool = False) -> Covering:
    """What the tests of these files run; kept by the hash of all sources and of what the tests are made of."""
    kept = root / "build" / "mutants"
    sources = [path for top in ("operators", "orchestrator") for path in (root / top).rglob("*.py")]
    shared = _hash(root, sources, _helpers(root))
    end = "-ray.json" if ray else ".json"
    names = {file: kept / f"{shared}-{_hash(root, [root / file])}{end}" for file in test_files}
    waiting: queue.Queue[str] = queue.Queue()
    for file, name in sorted(names.items(), key=lambda item: -(root / item[0]).stat().st_size):
        if not name.exists():
            waiting.put(file)

    def work(copy: Copy) -> None:
        while True:
            try:
                file = waiting.get_nowait()
            except queue.Empty:
                return
            reply = copy.ask("measure", LONGEST, file=file, ray=ray)
            if reply["answer"] is None or reply["code"] not in (0, 1, 5):
                raise RuntimeError(f"{file} could not be measured ({reply['code']}):\n{reply['output']}")
            kept.mkdir(parents=True, exist_ok=True)
            names[file].write_text(json.dumps(reply["answer"]))
            print(f"measured {file}: {len(reply['answer']['tests'])} tests, {reply['seconds']:.0f} s", flush=True)

    with concurrent.futures.ThreadPoolExecutor(len(copies)) as pool:
        list(pool.map(work, copies))
    covering = Covering()
    for name in names.values():
        covering.add(json.loads(name.read_text()))
    return covering


def _helpers(root: Path) -> list[Path]:
    """What tests are made of that is no test."""
    mutants = root / "tests" / "mutants"
    return [p for p in (root / "tests").rglob("*.py") if not p.name.startswith("test_") and p.parent != mutants]


def _hash(root: Path, *groups: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for group in groups for path in group):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
