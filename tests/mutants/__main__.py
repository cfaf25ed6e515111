"""`python -m tests.mutants --room distill --count 300 --seed 0`: how many wrong versions of a room its tests notice.

Prints every mutant as it is decided, then the survivors with file and line, then a table with the share. A mutant that
runs out of time counts as killed: the suite has a time limit as well.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import queue
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.mutants.copies import PRELOADED, Copy
from tests.mutants.covering import LONGEST, Covering, measured
from tests.mutants.equivalent import reasons, stale
from tests.mutants.mutations import Mutant, mutants
from tests.mutants.rooms import ROOMS, ROOT

SLOWER, SLACK = 5.0, 10.0  # a test may take so many times its CPU seconds, and so many more
WAITING = 60.0  # seconds that a mutant may take beyond ten times its tests': what waits uses no CPU


@dataclasses.dataclass
class Verdict:
    """What came of a mutant."""

    mutant: Mutant
    state: str  # killed, timed out, survived, not covered, equivalent
    by: str = ""
    seconds: float = 0.0
    left_out: int = 0  # covering tests that were not run, for the time they take
    output: str = ""

    def __str__(self) -> str:
        mutant, note = self.mutant, f"  by {self.by}" if self.by else ""
        note += f"  ({self.left_out} tests not run)" if self.left_out and self.state == "survived" else ""
        head = f"{self.state:11} {mutant.id}  {mutant.path}:{mutant.line}  {mutant.kind}  {self.seconds:.1f} s{note}"
        return f"{head}\n    - {mutant.before}\n    + {mutant.after}"


def main(words: Sequence[str] | None = None) -> int:
    """Run the mutants of the rooms that were asked for; returns 0."""
    options = _options(words)
    for room in options.room.split(","):
        chosen = sample(ROOT, ROOMS[room].files(), options)
        if options.list:
            print("\n".join(f"{m.id}  {m.path}:{m.line}  {m.kind}\n    - {m.before}\n    + {m.after}" for m in chosen))
            continue
        began = time.monotonic()
        test_files = options.tests.split(",") if options.tests else ROOMS[room].test_files()
        verdicts = decide(ROOT, chosen, test_files, options)
        text = summary(room, options, verdicts, time.monotonic() - began)
        print(f"\n{text}", flush=True)
        if options.json:
            rows = [dataclasses.asdict(verdict) for verdict in verdicts]
            for row in rows:
                del row["mutant"]["source"]
            path = options.json.with_stem(f"{options.json.stem}-{room}")
            path.write_text(json.dumps({"room": room, "seed": options.seed, "mutants": rows}, indent=1))
    return 0


def sample(root: Path, files: Iterable[str], options: argparse.Namespace) -> list[Mutant]:
    """The seed's mutants of these files, whichever lines they stand on: more of a file that has more places."""
    found = [m for file in files for m in mutants(file, (root / file).read_text(encoding="utf-8"))]
    if options.file:
        found = [m for m in found if m.path in options.file.split(",")]
    if options.only:
        return [m for m in found if m.id in options.only.split(",")]
    found.sort(key=lambda m: hashlib.sha256(f"{options.seed} {m.id}".encode()).digest())
    return sorted(found[: options.count], key=lambda m: (m.path, m.line))


def decide(root: Path, chosen: list[Mutant], test_files: list[str], options: argparse.Namespace) -> list[Verdict]:
    """What comes of each mutant."""
    known = reasons()
    for path, before, after in stale(root, known):
        print(f"to be taken out of equivalent.txt, since the code has changed: {path}\n    - {before}\n    + {after}")
    with contextlib.ExitStack() as stack:
        copies = [stack.enter_context(Copy(root, options.preloaded)) for _ in range(options.jobs)]
        for copy in copies:
            copy.ask("collect", LONGEST, files=test_files)
        covering = measured(root, copies, test_files, options.ray)
        if covering.failed:
            print("not used, since they fail without any mutation:", *covering.failed, sep="\n  ")
        waiting: queue.Queue[Mutant] = queue.Queue()
        verdicts = []
        for mutant in chosen:
            if reason := known.get((mutant.path, mutant.before, mutant.after)):
                verdicts.append(Verdict(mutant, "equivalent", by=reason))
            else:
                waiting.put(mutant)

        def work(copy: Copy) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    verdict = _decided(copy, root, waiting.get_nowait(), covering, options.most)
                    verdicts.append(verdict)
                    print(verdict, flush=True)
                    if options.only:
                        print(verdict.output)

        with concurrent.futures.ThreadPoolExecutor(len(copies)) as pool:
            list(pool.map(work, copies))
        _take_back(copies, verdicts, covering)
    return sorted(verdicts, key=lambda v: (v.mutant.path, v.mutant.line))


def _take_back(copies: list[Copy], verdicts: list[Verdict], covering: Covering) -> None:
    """Run every test that has killed alone and without a mutation: what it killed survived where it fails then too."""
    waiting: queue.Queue[str] = queue.Queue()
    for test in sorted(
        {verdict.by for verdict in verdicts if verdict.state == "killed" and verdict.by in covering.cpu}
    ):
        waiting.put(test)

    def work(copy: Copy) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                test = waiting.get_nowait()
                reply = copy.ask("run", LONGEST, tests={test: LONGEST})
                if reply["code"] != 0:
                    print(f"fails now and then without any mutation: {test}\n{reply['output']}", flush=True)
                    for verdict in verdicts:
                        if verdict.by == test:
                            verdict.state, verdict.by = "survived", ""

    with concurrent.futures.ThreadPoolExecutor(len(copies)) as pool:
        list(pool.map(work, copies))


def _decided(copy: Copy, root: Path, mutant: Mutant, covering: Covering, most: float) -> Verdict:
    tests: dict[str, float] = {}
    candidates = covering.tests_of(mutant, root)
    spent = total = 0.0
    for test in candidates:
        spent += covering.cpu[test]
        if tests and spent > most:
            break
        total += covering.seconds[test]
        tests[test] = SLOWER * covering.cpu[test] + SLACK
    if not tests:
        return Verdict(mutant, "not covered")
    with copy.mutated(mutant.path, mutant.source):
        reply = copy.ask("run", 10 * total + WAITING, tests=tests)
    answer = reply["answer"] or {}
    survived = reply["code"] == 0 and answer.get("failed") is None
    state = "timed out" if reply["late"] else "survived" if survived or reply["code"] == 5 else "killed"
    by = answer.get("failed") or ("" if state == "survived" else f"exit code {reply['code']}")
    return Verdict(mutant, state, by, reply["seconds"], len(candidates) - len(tests), reply["output"])


def summary(room: str, options: argparse.Namespace, verdicts: list[Verdict], seconds: float) -> str:
    """Survivors, then a row for each kind of mutation and one for all."""
    survivors = [v for v in verdicts if v.state in ("survived", "not covered")]
    alike = [v for v in verdicts if v.state == "equivalent"]
    lines = [f"equivalent, not counted: {len(alike)}", *(str(v) for v in alike)] if alike else []
    lines += [f"survived: {len(survivors)}", *(str(v) for v in survivors), ""]
    lines.append(f"{room}, seed {options.seed}: {len(verdicts)} mutants in {seconds / 60:.0f} min")
    lines.append(f"{'':12} {'killed':>9} {'timed out':>9} {'survived':>9} {'uncovered':>9} {'equal':>9} {'share':>6}")
    for kind in [*sorted({v.mutant.kind for v in verdicts}), "all"]:
        states = Counter(v.state for v in verdicts if kind in ("all", v.mutant.kind))
        noticed = states["killed"] + states["timed out"]
        counted = states.total() - states["equivalent"]
        numbers = [states[state] for state in ("killed", "timed out", "survived", "not covered", "equivalent")]
        share = f"{noticed / counted:6.1%}" if counted else f"{'-':>6}"
        lines.append(f"{kind:12} " + " ".join(f"{n:9d}" for n in numbers) + f" {share}")
    return "\n".join(lines)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--room", default="distill,elsewhere", help=f"of {', '.join(ROOMS)}; several with commas")
    parser.add_argument("--count", type=int, default=300, help="mutants of each room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--file", help="only mutants of these files, with commas")
    parser.add_argument("--only", help="only mutants with these ids, with commas; prints what their tests print")
    parser.add_argument("--tests", help="only these files of tests, with commas")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    parser.add_argument("--most", type=float, default=60.0, help="CPU seconds of tests for a mutant")
    parser.add_argument("--ray", action="store_true", help="with the tests marked ray or slow")
    parser.set_defaults(preloaded=PRELOADED)
    parser.add_argument("--json", type=Path, help="write what came of every mutant to FILE-ROOM.json")
    options = parser.parse_args(words)
    if unknown := set(options.room.split(",")) - set(ROOMS):
        parser.error(f"--room must be of {', '.join(ROOMS)}, but is {', '.join(sorted(unknown))}.")
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no copy stays behind
    sys.exit(main())
