"""README and the pages of `docs` tell the truth: links lead somewhere, commands and names exist, examples are valid."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from orchestrator.cli import app
from orchestrator.study.loader import read_document, validate
from orchestrator.study.schema import Study
from tests.pages import FAMILIES, GENERATED, README, ROOT, written

DOCS = ROOT / "docs"
TESTED = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
PAGES = [*TESTED, *sorted((ROOT / "tests").rglob("*.md"))]
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
OPERATOR = re.compile(r"\{kind: (hyena|window|skip)\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
LEAST = "study: example\nrecipe: {phases: [{tokens: 1, losses: {kl: 1.0}}]}\n"


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=named)
every_tested = pytest.mark.parametrize("page", TESTED, ids=named)


class Line(NamedTuple):
    """A command that a page tells to type."""

    page: Path
    words: list[str]


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    return [text for language, text in FENCED.findall(page.read_text(encoding="utf-8")) if language in languages]


def inline(page: Path) -> list[str]:
    """What stands between single backticks, on one line each."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(found.split()) for found in INLINE.findall(text)]


def typed(page: Path) -> list[list[str]]:
    """The words of every line that is told to be typed, in blocks and at the head of a study, without its purpose."""
    if page.suffix == ".yaml":
        texts = [re.sub(r"^#", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)]
    else:
        texts = blocks(page, "", "sh", "bash", "console")
    lines = (line.strip() for text in texts for line in re.sub(r" *\\\n *", " ", text).splitlines())
    told = (re.split(" {3,}", line)[0].removeprefix("$ ").removeprefix(".venv/bin/") for line in lines)
    return [shlex.split(line, comments=True) for line in told if line.startswith(("layerswap ", "make ", "python -m "))]


LINES = [Line(page, words) for page in [*PAGES, *STUDIES] for words in typed(page)]


def lines(program: str) -> list[Line]:
    return [line for line in LINES if line.words[0] == program]


def command(name: str) -> Any:
    """A command of `layerswap`, by name."""
    group: Any = typer.main.get_command(app)
    assert name in group.commands, f"layerswap has no command {name}"
    return group.commands[name]


def parsed(words: list[str]) -> dict[str, Any]:
    """What a line says to the command it names, by parameter; any error in it is raised."""
    return dict(command(words[1]).make_context(words[1], words[2:]).params)


def checked(words: list[str]) -> None:
    """An error where the command, or what it overrides of a study that is here, is wrong."""
    given = parsed(words)
    study = given.get("study") or given.get("model")
    if study is not None and str(study).startswith("studies/"):
        validate(read_document(ROOT / study, tuple(given.get("overrides") or ())))


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = INLINE.sub("", FENCED.sub("", page.read_text(encoding="utf-8")))
    for link in LINK.findall(text):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """The headings of a page as they are linked to."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings)


def test_the_contents_list_every_page() -> None:
    listed = set(LINK.findall((DOCS / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= listed


@pytest.mark.parametrize("line", lines("layerswap"), ids=lambda line: shlex.join(line.words))
def test_commands_are_right(line: Line) -> None:
    checked(line.words)


@every_page
def test_commands_that_a_sentence_names_have_such_options(page: Path) -> None:
    for words in (found.split() for found in inline(page) if re.match(r"layerswap [a-z]", found)):
        options = {option for parameter in command(words[1]).params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options | {"--help"}, words


def made(words: list[str]) -> str:
    """What `make` would run; an error where there is no such target."""
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", [*PAGES, *STUDIES], ids=named)
def test_make_has_the_targets_and_variables_that_are_named(page: Path) -> None:
    defined = re.findall(r"^(\w+) [:?]?=", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    mentioned = [shlex.split(found) for found in inline(page) if re.match(r"make [\w-]+( \w+=|$)", found)]
    for words in [*mentioned, *(line.words for line in lines("make") if line.page == page)]:
        assert {word.partition("=")[0] for word in words if "=" in word} <= set(defined), words
        for run in re.findall(r"^\.venv/bin/(layerswap .+)$", made(words), flags=re.MULTILINE):
            checked(shlex.split(run))


@pytest.mark.parametrize("target", ["study", "plan", "status", "report", "ui"])
def test_make_passes_on_what_it_is_given(target: str) -> None:
    run = made(["make", target, "STUDY=a.yaml", "ARGS=--home 'my home'"]).splitlines()[-1]
    assert shlex.split(run)[1:3] == ["run" if target == "study" else target, "a.yaml"]
    assert parsed(shlex.split(run))["home"] == Path("my home")


@pytest.mark.parametrize("line", lines("python"), ids=lambda line: shlex.join(line.words))
def test_modules_that_are_run_exist(line: Line) -> None:
    path = ROOT / line.words[2].replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


NAMES = re.compile(r"`((?:studies|orchestrator|operators|tests|docs)/[\w/.-]+|[\w/-]+\.(?:py|h))`")
TESTS = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


@every_tested
def test_named_files_exist(page: Path) -> None:
    """A name that begins at no folder of the top lies in the folder of the one before it."""
    folder = ROOT
    for name in NAMES.findall(page.read_text(encoding="utf-8")):
        whole = ROOT / name
        if not whole.exists():
            assert (folder / name).exists(), name
        elif "/" in name:
            folder = whole if whole.is_dir() else whole.parent


@every_tested
def test_named_tests_exist(page: Path) -> None:
    for path, name in TESTS.findall(page.read_text(encoding="utf-8")):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


@pytest.mark.parametrize("page", GENERATED, ids=named)
def test_what_is_generated_is_up_to_date(page: Path) -> None:
    assert written(page, "tests.pages") == GENERATED[page](), "run python -m tests.pages --write"


def test_the_readme_counts_the_types_of_the_table() -> None:
    passing, refused = written(FAMILIES, "tests.models").split("| refused | because |")
    rows = re.findall(r"^\| ([\w.-]+) \|", passing, flags=re.MULTILINE)[1:]
    names = re.findall(r"^\| ([^|]+) \|", refused, flags=re.MULTILINE)
    every = len(rows) + sum(len(row.split(", ")) for row in names)
    assert written(README, "tests.models").startswith(f"{len(rows)} of the {every} causal-LM types")


@every_tested
def test_examples_of_study_files_are_valid(page: Path, tmp_path: Path) -> None:
    documents = [document for text in blocks(page, "yaml") for document in yaml.safe_load_all(text)]
    documents += [{"operator": yaml.safe_load(found)} for found in inline(page) if OPERATOR.match(found)]
    for document in documents:
        if document.keys() <= Study.model_fields.keys():
            path = tmp_path / "study.yaml"
            path.write_text(yaml.safe_dump({**yaml.safe_load(LEAST), **document}))
            validate(read_document(path, ()))


@every_tested
def test_examples_in_python_can_be_compiled(page: Path) -> None:
    for text in blocks(page, "python"):
        compile(text, str(page), "exec")


def test_the_answer_of_the_readme_is_that_of_the_results() -> None:
    """Every number of its table stands in the table of the default study."""
    told = README.read_text(encoding="utf-8").partition("| what takes attention's place")[2].partition("\n\n")[0]
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    table = results.partition("## The default study")[2].partition("\n\nThe eight trials")[0]
    for row in told.splitlines()[2:]:
        ratio, agree, *speeds = (cell.strip() for cell in row.strip("|").split("|")[1:])
        agree = f"{int(agree.removesuffix(' %')) / 100:.2f}"
        matching = [line for line in table.splitlines() if f"| {ratio} | {agree} |" in line]
        assert matching, row
        assert all(f"| {speed} |" in matching[0] for speed in speeds if speed), row


def test_ci_runs_what_the_readme_tells() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
