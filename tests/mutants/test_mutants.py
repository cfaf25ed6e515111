"""Mutations by what they write, and a package of two lines of which its tests notice one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants.__main__ import _options, decide, main, sample, summary
from tests.mutants.equivalent import reasons, stale
from tests.mutants.mutations import mutants
from tests.mutants.rooms import ROOMS


@pytest.mark.parametrize(
    ("line", "mutated"),
    [
        ("x = a < b", {"x = (a <= b)", "x = (a >= b)"}),
        ("x = a is None", {"x = (a is not None)"}),
        ("x = a in b", {"x = (a not in b)"}),
        ("x = a and b", {"x = (a or b)"}),
        ("x = not a", {"x = (a)"}),
        ("x = a + b", {"x = (a - b)"}),
        ("x = a // b", {"x = (a * b)"}),
        ("x = -a", {"x = (a)"}),
        ("x = 3", {"x = 4"}),
        ("x = 0.5", {"x = 1.0"}),
        ("x = True", {"x = False"}),
        ("x = 'mean'", {"x = 'XXmean'"}),
        ("x = f(a, b, c=d)", {"x = f(a, b)", "x = f(a, c=d)"}),
        ("x = a if b else c", {"x = a if True else c", "x = a if False else c"}),
        ("x = [a for a in b if c]", {"x = [a for a in b if True]"}),
        ("f(a)", {"pass"}),
        ("a.b = c", {"pass"}),
        ("a[b], c.d = e", {"pass"}),
        ("a += b", {"pass", "a -= b"}),
        ("raise ValueError('no')", {"pass"}),
        ("del a[b]", {"pass"}),
        ("def f(a=2): return a", {"def f(a=3): return a", "def f(a=2): return None"}),
        ("if a: b", {"if True: b", "if False: b"}),
        ("while a: b", {"while False: b"}),
        # Nothing to notice:
        ("x = a", set()),
        ("x: Literal['b', 2] = a", set()),
        ("x = cast('Tensor', a)", set()),
        ("x = f'{3 + a}'", set()),
        ("x = 'words for people'", set()),
        ("__all__ = ['a']", set()),
        ("assert a, 'told'", set()),
        ("if TYPE_CHECKING: f(a)", set()),
        ("'docstring'", set()),
        ("x = f(a, encoding='utf-8')", set()),
        ("x = zip(a, strict=True)", set()),
        ("x = f(a, strict=True)", {"x = f(a)", "x = f(a, strict=False)"}),
    ],
)
def test_every_mutation_of_a_line(line: str, mutated: set[str]) -> None:
    found = mutants("operators/a.py", line)
    assert {mutant.after for mutant in found} == mutated
    for mutant in found:
        ast.parse(mutant.source)
        assert (mutant.path, mutant.line, mutant.before) == ("operators/a.py", 1, line)


def test_a_mutant_changes_one_place_and_keeps_its_name_when_lines_move() -> None:
    source = "é = 1\n\n\ndef f(a):  # ü\n    return g(\n        a, b=a == 2\n    )\n"
    found = {mutant.after: mutant for mutant in mutants("operators/a.py", source)}
    assert found["a, b=(a != 2)"].source == source.replace("a == 2", "(a != 2)")
    assert found["return g(a)"].source == source.replace("g(\n        a, b=a == 2\n    )", "g(a)")
    assert found["a, b=(a != 2)"].lines == (5, 7)
    assert {mutant.after: mutant.at_import for mutant in found.values()}["é = 2"]
    assert not found["return g(a)"].at_import
    moved = mutants("operators/a.py", f"import h\n\n{source}")
    assert [(mutant.id, mutant.line - 2) for mutant in moved] == [(m.id, m.line) for m in found.values()]
    assert len({mutant.id for mutant in mutants("operators/a.py", "x = 1\nx = 1\n")}) == 2


def test_the_same_seed_takes_the_same_mutants_whatever_else_changes(tmp_path: Path) -> None:
    (tmp_path / "operators").mkdir()
    for name, lines in (("a", 30), ("b", 10)):
        (tmp_path / f"operators/{name}.py").write_text("".join(f"x{i} = {i}\n" for i in range(lines)))
    files = ROOMS["operators"].files(tmp_path)
    assert files == ["operators/a.py", "operators/b.py"]
    first = sample(tmp_path, files, _options(["--count", "20"]))
    assert len({mutant.id for mutant in first}) == 20 and {mutant.path for mutant in first} == set(files)
    assert sample(tmp_path, files, _options(["--count", "20", "--seed", "1"])) != first
    (tmp_path / "operators/b.py").write_text("")
    again = sample(tmp_path, files, _options(["--count", "20"]))
    assert [m for m in first if m.path == files[0]] == [m for m in again if m in first]


SUMS = '''"""Sums."""

SCALE = 3


def doubled(x):
    return x + x


def noticed_by_nobody(x):
    return x + 1


def forgotten(x):
    return x - 1


def for_ever(x):
    while x < 9:
        x += 1
    return True
'''
TESTS = """import pytest
from operators.sums import SCALE, doubled, for_ever, noticed_by_nobody


@pytest.fixture(scope="module")
def six():
    return doubled(3)


def test_the_first_to_ask(six):
    pass


def test_six(six):
    assert six == 6


def test_nothing():
    assert noticed_by_nobody(SCALE)


def test_for_ever():
    assert for_ever(8) is True


def test_wrong_already():
    assert doubled(1) == 3
"""


def test_what_tests_check_is_killed_and_what_they_only_run_survives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.mutants.__main__.SLACK", 0.3)
    (tmp_path / "operators").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "operators" / "sums.py").write_text(SUMS)
    (tmp_path / "tests" / "test_sums.py").write_text(TESTS)
    options = _options(["--jobs", "1"])
    options.preloaded = ("pytest", "coverage")
    told = ("SCALE = 4", "return (x - x)", "return x + 2", "return x - 2", "while (x >= 9):", "pass")
    chosen = [mutant for mutant in mutants("operators/sums.py", SUMS) if mutant.after in told]
    verdicts = decide(tmp_path, chosen, ["tests/test_sums.py"], options)
    states = {(v.mutant.before, v.mutant.after): v.state for v in verdicts}
    assert states == {
        ("SCALE = 3", "SCALE = 4"): "survived",
        ("return x + x", "return (x - x)"): "killed",  # by the second test that has the fixture
        ("return x + 1", "return x + 2"): "survived",
        ("return x - 1", "return x - 2"): "not covered",
        ("while x < 9:", "while (x >= 9):"): "survived",
        ("x += 1", "pass"): "timed out",
    }
    assert (tmp_path / "operators" / "sums.py").read_text() == SUMS
    assert "tests/test_sums.py::test_wrong_already" in capsys.readouterr().out  # is not used
    text = summary("operators", options, verdicts, 60.0)
    assert text.splitlines()[-1].split() == ["all", "1", "1", "3", "1", "0", "33.3%"]
    assert "operators/sums.py:11" in text and "+ return x + 2" in text


def test_equivalent_mutants_are_listed_by_how_they_read() -> None:
    text = "# head\noperators/a.py\n- x = 1\n+ x = 2\n= unread\n\n- y = 1\n+ y = 2\n= also\n"
    assert reasons(text) == {
        ("operators/a.py", "x = 1", "x = 2"): "unread",
        ("operators/a.py", "y = 1", "y = 2"): "also",
    }
    with pytest.raises(ValueError, match="has no reason"):
        reasons("operators/a.py\n- x = 1\n+ x = 2\n")
    with pytest.raises(ValueError, match="three lines"):
        reasons("operators/a.py\n- x = 1\n+ x = 2\noperators/b.py\n")


def test_the_list_of_equivalent_mutants_can_be_read_and_stale_entries_are_found(tmp_path: Path) -> None:
    assert all(reasons().values())
    (tmp_path / "a.py").write_text("x = 1\n")
    known = {("a.py", "x = 1", "x = 2"): "unread", ("a.py", "y = 1", "y = 2"): "also", ("b.py", "y", "z"): "gone"}
    assert stale(tmp_path, known) == [("a.py", "y = 1", "y = 2"), ("b.py", "y", "z")]


def test_the_command_lists_a_room(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--room", "study", "--count", "5"]) == 0
    assert capsys.readouterr().out.count("\n    + ") == 5
    with pytest.raises(SystemExit):
        main(["--room", "kitchen"])
