"""What a fork of the server does: run tests against a mutant, or see which lines each test runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

COVERED = "LAYERSWAP_MUTANTS_COVERED"  # the folder where Python processes that a test starts tell what they ran
TEST = "LAYERSWAP_MUTANTS_TEST"
STARTED = f"""import os
if os.environ.get("{COVERED}"):
    import atexit, coverage
    _where = os.environ["{COVERED}"]
    _here = os.path.dirname(os.path.abspath(__file__))
    _coverage = coverage.Coverage(
        data_file=f"{{_where}}/{{os.getpid()}}-{{id(os)}}", context=os.environ["{TEST}"], config_file=False,
        include=[f"{{_here}}/operators/*", f"{{_here}}/orchestrator/*"], messages=False,
    )
    _coverage._warn_no_data = False
    _coverage.start()
    atexit.register(lambda: (_coverage.stop(), _coverage.save()))
"""  # sitecustomize.py of a copy that is measured


def run(request: dict[str, Any], place: Path) -> tuple[dict[str, Any], int]:
    """Run `tests`, ids with the CPU seconds each may take, in this order, until one fails: which, and how many ran."""
    chosen = _Chosen(request["tests"])
    code = _pytest(sorted({test.split("::")[0] for test in request["tests"]}), place, chosen, "-x")
    return {"failed": chosen.failed, "ran": chosen.ran, "found": chosen.found}, code


def collect(request: dict[str, Any], place: Path) -> tuple[None, int]:
    """Compile the tests of `files` and what they import; their compiled files stay."""
    sys.dont_write_bytecode = False
    return None, _pytest(request["files"], place, object(), "--collect-only")


def measure(request: dict[str, Any], place: Path) -> tuple[dict[str, Any], int]:
    """Run the tests of `file` and see what they run.

    Returns:
        By test that passed: `seconds`, `cpu` and `lines` by file. Fixtures that several tests share count for each.
    """
    import coverage
    from coverage import CoverageData

    root, parts = Path.cwd(), place / "covered"
    parts.mkdir()
    os.environ[COVERED] = str(parts)
    found = coverage.Coverage(
        data_file=str(place / "data"), config_file=False, messages=False,
        include=[f"{root}/operators/*", f"{root}/orchestrator/*"],
    )  # fmt: skip
    watch = _Watch(found)
    found.start()
    marks = [] if request["ray"] else ["-m", "not ray and not slow"]
    code = _pytest([request["file"]], place, watch, *marks)
    found.stop()
    lines: dict[str, dict[str, set[int]]] = {}
    _add(lines, found.get_data(), root)
    for part in parts.iterdir():
        data = CoverageData(str(part))
        data.read()
        _add(lines, data, root)
    tests = {}
    for test, (seconds, cpu) in watch.passed.items():
        ran: dict[str, set[int]] = {}
        for context in (test, *watch.fixtures[test]):
            for file, numbers in lines.get(context, {}).items():
                ran.setdefault(file, set()).update(numbers)
        tests[test] = {"seconds": seconds, "cpu": cpu, "lines": {file: sorted(n) for file, n in ran.items()}}
    return {"tests": tests, "failed": watch.failed}, code


def _pytest(files: list[str], place: Path, plugin: object, *words: str) -> int:
    plugins, place_of_tests = ("-p", "pytest_timeout", "-p", "no:cacheprovider"), f"--basetemp={place / 'tests'}"
    always = ["-q", *plugins, "-W", "ignore:Module already imported", place_of_tests]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return int(pytest.main([*always, *words, *files], plugins=[plugin]))


def _add(lines: dict[str, dict[str, set[int]]], data: Any, root: Path) -> None:
    for file in data.measured_files():
        name = str(Path(file).relative_to(root))
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                lines.setdefault(context, {}).setdefault(name, set()).add(line)


class _Chosen:
    """Runs the chosen tests only, in the given order, each within its CPU time."""

    def __init__(self, tests: dict[str, float]) -> None:
        self.tests = tests
        self.failed: str | None = None
        self.ran = self.found = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        by_id = {item.nodeid: item for item in items}
        items[:] = [by_id[test] for test in self.tests if test in by_id]
        self.found = len(items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.ran += 1
        signal.setitimer(signal.ITIMER_PROF, self.tests[item.nodeid])  # ends the process
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid


class _Watch:
    """Tells coverage which test, or which fixture of many tests, is running."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.contexts = [""]
        self.passed: dict[str, tuple[float, float]] = {}
        self.failed: list[str] = []
        self.fixtures: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def within(self, context: str) -> Iterator[None]:
        self.contexts.append(context)
        self.coverage.switch_context(context)
        try:
            yield
        finally:
            self.contexts.pop()
            self.coverage.switch_context(self.contexts[-1])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        test = item.nodeid
        os.environ[TEST] = test
        shared = getattr(item, "_fixtureinfo", None)
        closure = shared.name2fixturedefs.values() if shared else []
        self.fixtures[test] = [_context(one) for many in closure for one in many if one.scope != "function"]
        wall, cpu = time.monotonic(), sum(os.times()[:4])
        self.passed[test] = (0.0, 0.0)
        with self.within(test):
            result = yield
        if test in self.passed:
            self.passed[test] = (time.monotonic() - wall, sum(os.times()[:4]) - cpu)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        with self.within(_context(fixturedef)):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        known = self.passed.pop(report.nodeid, None) if report.outcome != "passed" else None
        if known is not None and report.failed:
            self.failed.append(report.nodeid)


def _context(fixture: Any) -> str:
    return f"fixture {fixture.baseid}::{fixture.argname}"
