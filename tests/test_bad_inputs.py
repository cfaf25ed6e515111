"""Whatever a user can get wrong is told in one line a mistake, with exit code 2, and nothing is written.

A row: its name, how the input is made (it returns the words of the command), and what must be told: the value, the rule
and the remedy; for a mistake in the study file, its place as well.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.run import temporary
from tests.bad_inputs import LOSSES, Make, Row, at, content, home, store_of, study, words
from tests.bad_teachers import TEACHERS
from tests.bad_text import TEXT

ROOT = Path(__file__).resolve().parents[1]


def no_ray(folder: Path) -> list[str]:
    """An address where something answers that is not Ray."""
    listener = socket.create_server(("127.0.0.1", 0))

    def hang_up() -> None:
        listener.accept()[0].close()
        listener.close()

    threading.Thread(target=hang_up, daemon=True).start()
    return words("--ray-address", f"127.0.0.1:{listener.getsockname()[1]}", command="run")(folder)


def taken_port(folder: Path) -> list[str]:
    """A port of the MLflow UI where something listens."""
    (folder / "home").mkdir()
    (folder / "home" / "mlflow.db").touch()
    listener = socket.create_server(("127.0.0.1", 0))

    def hang_up() -> None:
        listener.accept()[0].close()
        listener.close()

    threading.Thread(target=hang_up, daemon=True).start()
    return words("--port", str(listener.getsockname()[1]), command="ui")(folder)


def directory(_: Path) -> list[str]:
    Path("study.yaml").mkdir()
    return ["plan", "study.yaml"]


def existing_target(folder: Path) -> list[str]:
    store_of("1")(folder / "home")
    (folder / "student").mkdir()
    return words("--to", str(folder / "student"), command="export")(folder)


STUDIES: list[Row] = [
    ("missing study", lambda _: ["plan", "gone.yaml"], r"gone\.yaml: no such study file: name a YAML file"),
    ("directory as study", directory, r"study\.yaml: is a directory: name a YAML file"),
    ("study that cannot be read", lambda _: ["plan", "/proc/self/mem"], r"/proc/self/mem: cannot be read .*: give a"),
    ("binary study", content(b"\xff\xfe\x00"), r"study\.yaml: cannot be read as UTF-8 text .*: save it as UTF-8"),
    ("empty study", content(b""), at % "1:1" + "study: this key is missing; add it"),
    ("study of comments", content(b"# nothing\n"), at % "1:1" + "study: this key is missing; add it"),
    ("list as study", content(b"- a\n"), at % "1:1" + r"a study is a mapping of keys \(study: .*\), got a list"),
    ("word as study", content(b"hello\n"), at % "1:1" + "a study is a mapping of keys .*, got a plain value"),
    ("two documents", content(b"study: a\n---\nstudy: b\n"), at % "2:1" + "not valid YAML: .*single document.*"),
    ("open bracket", study(("keep: []", "keep: [")), at % "20:13" + "not valid YAML: .*expected ',' or ']'"),
    ("tab", study(("  kind: hyena", "\tkind: hyena")), at % "14:1" + r"not valid YAML: .*'\\t'.*: indent with spaces"),
    ("key twice", study(("  heads: 4\nsch", "  heads: 4\n  heads: 2\nsch")), at % "16:3" + "operator.heads: .*twice; keep"),
    ("unknown key", study(("  keep: []", "  kept: []")), at % "18:3" + r"schedule.kept: unknown key; did you mean keep\?"),
    ("unknown key deep", study((LOSSES, "losses: {kll: 1}")), at % "22:16" + r"recipe.phases.0.losses.kll: .*did you mean kl\?"),
    ("word for number", study(("layers: 6", "layers: six")), at % "4:3" + 'teacher.layers: must be an integer, got "six"'),
    ("quoted number", study(("lr: 3e-3", 'lr: "1e-4"')), at % "24:15" + '.*must be a number, got "1e-4": write it without quotes'),
    ("share above one", study(("lr: 3e-3", "warmup: 1.5")), at % "24:15" + "recipe.optimizer.warmup: must be less than or equal to 1, got 1.5"),
    ("negative budget", study(("layer: 640", "layer: -1")), at % "23:7" + ".*tokens_per_layer: must be greater than 0, got -1"),
    ("unknown operator", study(("kind: hyena", "kind: hyenna")), at % "14:3" + r"operator.kind: unknown kind hyenna; did you mean hyena\?"),
    ("unknown filter", words("--set", "operator.filter={kind: modale}"), r"operator.filter.kind: unknown kind modale; did you mean modal\?"),
    ("key of another filter", words("--set", "operator.filter={modes: 4}"), r"operator.filter.modes: unknown key; allowed here: kind, features, width"),
    ("modal filter without modes", words("--set", "operator.filter={kind: modal, modes: 0}"), "operator.filter.modes: modes must be at least 1 but is 0: 8 is a good start"),
    ("short filter of no taps", words("--set", "operator.filter={kind: fir, taps: -3}"), "operator.filter.taps: taps must be at least 1 but is -3: 16 is a good start"),
    ("filter that is a word", words("--set", "operator.filter=modal"), 'operator.filter: must be a mapping of keys, got "modal"'),
    ("sum of a signed filter", words("--set", "operator={kind: hyena, heads: 4, normalise: true, feature_map: power, filter: {kind: modal}}"), r"operator.normalise: normalise must be false where weights may be negative .*filter: \{positive: true\}"),
    ("more taps than positions", words("--set", "operator.filter={kind: fir, taps: 200}"), "operator.filter.taps: 200 exceeds the teacher's 128 positions: lower it"),
    ("no such layer", study(("keep: []", "keep: [7]")), at % "18:3" + "schedule.keep: layer 7 does not exist: the teacher has 6 layers, 0 to 5"),
    ("keep everything", study(("keep: []", "keep: [0, 1, 2, 3, 4, 5]")), at % "18:3" + "schedule.keep: every layer is kept as attention: leave at least one"),
    ("layer in two stages", study(("bottom_up", "[[0, 1], [1]]")), at % "17:3" + r"schedule.layer_order: layer_order swaps layers \[1\] more than once: name each"),
    ("empty stage", study(("bottom_up", "[[0], []]")), at % "17:3" + "schedule.layer_order: .*every stage needs at least one layer"),
    ("all weights zero", study((LOSSES, "losses: {kl: 0}")), at % "22:7" + "recipe.phases.0.losses: all loss weights are 0: give at least one of"),
    ("no budget", study(("      tokens_per_layer: 640\n", "")), at % "22:7" + "recipe.phases.0: a phase needs a token budget: exactly one of"),
    ("two budgets", study(("layer: 640", "layer: 640\n      tokens: 640")), at % "22:7" + "recipe.phases.0: .*exactly one of tokens and tokens_per_layer"),
    ("no phase", study((f"    - {LOSSES}\n      tokens_per_layer: 640\n", "    []\n")), at % "19:1" + "recipe: the recipe has no token budget: give phases, joint or both"),
    ("budget below a step", study(("layer: 640", "layer: 8")), at % "23:7" + r"recipe.phases.0.tokens_per_layer: 8 tokens are less than one step of 64 .*: raise"),
    ("teacher's budget below a step", study(("tokens: 4096", "tokens: 10")), at % "8:3" + "teacher.tokens: 10 tokens are less than one step of 256 .*: raise"),
    ("teacher's heads", study(("hidden: 64\n  heads: 4", "hidden: 64\n  heads: 3")), at % "5:3" + "teacher.hidden: hidden 64 over heads 3 must give a whole head size divisible by 8"),
    ("operator's heads", study(("hyena\n  heads: 4", "hyena\n  heads: 5")), at % "15:3" + "operator.heads: 5 must divide the teacher's width 64: give a divisor, for example 4"),
    ("sequence too long", study(("length: 32", "length: 256")), at % "12:3" + "data.sequence_length: 256 exceeds the teacher's 128 positions: lower it"),
    ("speed too long", study(("lengths: [64]", "lengths: [999]")), at % "26:14" + r"throughput.lengths: 999 must exceed decode_tokens \(8\) and be at most .* 128 positions"),
    ("generation too long", study(("new_tokens: 8", "new_tokens: 999")), at % r"25:\d+" + "evaluation.new_tokens: 999 after a prompt of 16 .* exceeds the teacher's 128 positions: lower"),
    ("random without trials", study(("method: grid", "method: random")), at % "27:1" + "search: random search needs trials: how many"),
    ("grid with trials", study(("method: grid", "method: grid\n  trials: 3")), at % "29:3" + "search.trials: trials=3 belongs to random search: a grid runs every point"),
    ("range in a grid", study(("space: {}", "space: {recipe.optimizer.lr: {low: 1e-4, high: 1e-2}}")), at % r"29:\d+" + "search.space.* is a range: a grid needs a list"),
    ("empty axis", study(("space: {}", "space: {seed: []}")), at % r"29:\d+" + "search.space.* has no value: list at least one"),
    ("axis that is no key", study(("space: {}", "space: {recipe.optimizer.lrr: [1]}")), at % r"29:\d+" + r".*names no key of the study; did you mean recipe.optimizer.lr\?"),
    ("axis that is not swept", study(("space: {}", "space: {teacher.layers: [1]}")), at % r"29:\d+" + ".*names no key of the study; can be swept: operator, schedule"),
    ("value that makes no study", study(("space: {}", "space: {seed: [1, -1]}")), at % r"29:\d+" + r"seed: must be greater than or equal to 0, got -1 \(at the search point seed=-1\)"),
    ("merge key", study(("losses: {kl: 1.0}\n", "losses: &l {kl: 1.0}\n"), ("new_tokens: 8}", "new_tokens: 8, <<: *l}")), at % r"25:\d+" + "evaluation: << is a key like any other in YAML 1.2, which merges nothing: write the values out, or .*alias"),
    ("merge key in a list", study((LOSSES, "losses: {<<: [{kl: 1.0}], ce: 1}")), at % "22:16" + "recipe.phases.0.losses: << is a key like any other .*: write the values out"),
    ("merge key at the top", study(("study: tiny\n", "base: &b {seed: 1}\n<<: *b\nstudy: tiny\n")), at % "2:1" + "study: << is a key like any other .*: write the values out"),
    ("set a merge key", words("--set", "operator={<<: {heads: 4}}"), "^--set .*: operator: << is a key like any other .*: write the values out"),
    ("template", study(("study: tiny", "study: {{ name }}")), at % "1:9" + "study: a key must be a plain word, .*: fill in a template such as {{ name }} before"),
    ("template for a number", study(("layers: 6", "layers: {{ layers }}")), at % "4:12" + "teacher.layers: a key must be a plain word, .*: fill in a template"),
    ("template in a list", study(("keep: []", "keep: [{{ a }}, {{ b }}]")), at % "18:11" + "schedule.keep.0: a key must be a plain word, .*: fill in a template"),
    ("template as a key", study(("study: tiny\n", "study: tiny\n{{ key }}: 1\n")), at % "2:1" + "study: a key must be a plain word, .*: fill in a template"),
    ("template of a shell", study(("study: tiny", "study: ${NAME}")), at % "1:1" + r"study: must match .*, got ..\{NAME\}"),
    ("list as a key", study(("keep: []", "? [keep]\n  : []")), at % "18:5" + "schedule: a key must be a plain word, and this one is a mapping or a list"),
    ("number as a key", study(("  keep: []", "  1: []")), at % "18:3" + "schedule.1: unknown key; allowed here: layer_order, "),
    ("null as a key", study(("  keep: []", "  ~: []")), at % "18:3" + "schedule: a key must be a plain word, got ~"),
    ("true as a key", study(("  keep: []", "  true: []")), at % "18:3" + "schedule: a key must be a plain word, got true"),
    ("name of 300 characters", study(("study: tiny", f"study: {'a' * 300}")), at % "1:1" + r'study: must have at most 128 characters, got "a{79} \.\.\.$'),
    ("set a name of 129 characters", words("--set", f"study={'a' * 129}"), "^--set .*: study: must have at most 128 characters"),
    ("name that is a path", study(("study: tiny", "study: ../tiny")), at % "1:1" + 'study: must match .*, got "../tiny"'),
    ("name that is null", study(("study: tiny", "study: null")), at % "1:1" + "study: must be a text, got null"),
    ("name that is a number", study(("study: tiny", "study: 2026")), at % "1:1" + "study: must be a text, got 2026"),
    ("aliases for billions", content(("a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))).encode()), at % r"\d:\d+" + "more than 100,000 values, its aliases written out; use fewer of them"),
    ("value within itself", study(("space: {}", "space: &s {operator: *s}")), at % "1:1" + "a value refers to itself or is nested too deeply"),
    ("set deep nesting", words("--set", "seed=" + "[" * 3000), "^--set .*: a value refers to itself or is nested too deeply"),
    ("number of 5000 digits", study(("layers: 6", f"layers: {'1' * 5000}")), at % "4:11" + "teacher.layers: a number of 5000 digits is no integer to work with"),
    ("byte 0", study(("kind: hyena", "kind: hye\0na")), at % "14:1" + "not valid YAML: a character of code 0x0 is not allowed; take it out"),
    ("file of a name that cannot be", words("--set", f"data.train.files=[{'a' * 300}]"), "^--set .*: data.train.files.0: no file at .*aaa: give a path"),
    ("teacher of a name that cannot be", words("--set", f"teacher={{kind: pretrained, folder: {'a' * 300}}}"), "^--set .*: teacher.folder: .*aaa holds no config.json"),
    ("set without =", words("--set", "seed"), "^--set seed: an override is written key=value, for example --set seed=1"),
    ("set an unknown key", words("--set", "sede=1"), r"^--set sede=1: sede: unknown key; did you mean seed\?"),
    ("set bad YAML", words("--set", "seed=["), r"^--set seed=\[: the value is not valid YAML: .*"),
    ("vocabulary of a pretrained teacher", words("--set", "teacher={kind: pretrained, folder: m}", "--set", "data.vocabulary=300"), "^--set data.vocabulary=300: data.vocabulary.* has no use with a pretrained teacher"),
]  # fmt: skip
PLACES: list[Row] = [
    ("home of a name that cannot be", words("--home", "h" * 300), "the store h{300}/store cannot be read .File name too long.: give another --home"),
    ("home that is a file, plan", home(lambda root: root.write_text("mine"), "plan"), "home is a file: give a directory as --home"),
    ("home that is a file, run", home(lambda root: root.write_text("mine"), "run"), "home is a file: give a directory as --home"),
    ("home that cannot be made", words("--home", "/proc/layerswap", command="run"), "the store /proc/layerswap/store cannot be made .*: give another --home"),
    ("newer store, plan", home(store_of("99"), "plan"), "layout '99', this program writes '1': use the program that wrote it"),
    ("newer store, run", home(store_of("99"), "run"), "layout '99', this program writes '1': use the program that wrote it"),
    ("newer store, gc", home(store_of("99"), "gc", "--delete"), "layout '99', this program writes '1': use the program that wrote it"),
    ("newer store, doctor", home(store_of("99"), "doctor", "--fix"), "layout '99', this program writes '1': use the program that wrote it"),
    ("store that is no store", home(store_of("not a version"), "run"), "layout 'not a version', this program writes '1'"),
    ("gc of nothing", words(command="gc"), "home holds nothing yet: run the study first, or give its --home"),
    ("report of nothing", words(command="report"), "home holds nothing yet: run the study first, or give its --home"),
    ("ui of nothing", words(command="ui"), "home holds nothing yet: run the study first, or give its --home"),
    ("export of nothing", words("--to", "out", command="export"), "home holds nothing yet: run the study first, or give its --home"),
    ("nothing finished", home(store_of("1"), "export", "--to", "out"), "no student is finished yet: run the study first"),
    ("unknown stage", home(store_of("1"), "export", "--to", "out", "--stage", "zz"), "^--stage zz: 0 finished students begin so; layerswap status lists them"),
    ("target exists", existing_target, "^--to .*student exists already: give another folder"),
    ("report into a directory", home(store_of("1"), "report", "--json", "."), r"^--json \. cannot be written: give the path of a file"),
    ("port in use", taken_port, r"^--port \d+ is taken by another program: give another one"),
]  # fmt: skip
ARGUMENTS: list[Row] = [
    ("no study", lambda _: ["plan"], "Missing argument 'STUDY'"),
    ("unknown command", lambda _: ["plann"], "No such command 'plann'"),
    ("unknown option", words("--sett", "a=1"), "No such option"),
    ("unknown device", words("--device", "tpu", command="run"), "^--device tpu is not known: give one of cpu, cuda"),
    ("no interval", words("--checkpoint-seconds", "0", command="run"), "^--checkpoint-seconds 0 must be a finite number above 0, for example"),
    ("negative interval", words("--checkpoint-seconds", "-1", command="run"), "^--checkpoint-seconds -1 must be a finite number above 0"),
    ("interval that is no number", words("--checkpoint-seconds", "nan", command="run"), "^--checkpoint-seconds nan must be a finite number"),
    ("interval in words", words("--checkpoint-seconds", "often", command="run"), "Invalid value for '--checkpoint-seconds': .*number"),
    ("absent cluster", words("--ray-address", "127.0.0.1:9", command="run"), "^--ray-address 127.0.0.1:9: no Ray cluster answers .*refused.*: start one"),
    ("cluster that is none", no_ray, r"^--ray-address .*: no Ray cluster answers \(what answers there is not Ray\): start one"),
    ("address that is none", words("--ray-address", "nonsense", command="run"), "^--ray-address nonsense is no address: give host:port"),
    ("address of a client", words("--ray-address", "ray://h:1", command="run"), "^--ray-address ray://h:1 is no address: give host:port"),
    ("a core that is not there", words("--set", "numerics.core=native", command="run"), "numerics.core native needs the compiled core, and this machine has none: run make build-ext"),
    ("more threads than cores", words("--set", "numerics.threads=999", command="run"), "an? [a-z]+ stage asks for 999 threads and the largest node has \\d+ cores: lower threads"),
    ("teacher's threads", words("--set", "teacher.threads=999", command="run"), "a teacher stage asks for 999 threads and the largest node has \\d+ cores: lower threads"),
    ("port out of range", words("--port", "70000", command="ui"), "Invalid value for '--port': .*65535"),
]  # fmt: skip
ROWS = [*STUDIES, *TEXT, *TEACHERS, *PLACES, *ARGUMENTS]


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes; none for a directory."""
    found = sorted(folder.rglob("*")) if folder.is_dir() else [folder] if folder.exists() else []
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two texts."""
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text(f"the text of {name}\n" * 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAYERSWAP_HOME", raising=False)
    monkeypatch.setenv("LAYERSWAP_NATIVE", "0")
    monkeypatch.setenv("COLUMNS", "250")  # what is told about options is not wrapped
    return tmp_path


@pytest.mark.parametrize(("make", "told"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_input_is_told_and_nothing_is_written(make: Make, told: str, place: Path) -> None:
    given = make(place)
    if "--home" not in given and len(given) > 1:
        given += ["--home", str(place / "home")]
    before = listing(place)
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert re.search(told, result.stderr, re.MULTILINE), result.stderr
    assert "Traceback" not in result.output
    assert not result.stdout
    assert listing(place) == before
    assert not Path("/proc/layerswap").exists()


def layerswap(*given: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "orchestrator.cli", *given]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)


def test_a_hub_that_is_not_there_is_told(place: Path) -> None:
    study()(place)
    change = "data.train={source: hub, name: a/b, max_tokens: 9}"
    done = layerswap("run", "study.yaml", "--set", change, "--home", "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2, done.stderr
    assert "data.train: data set a/b at revision main cannot be reached" in done.stderr
    assert "check the name and the network, or use a local folder or files" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("home").exists()


@pytest.fixture
def own_temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory for temporary files that no dead run of somebody else has left anything in."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    monkeypatch.setattr(temporary, "FALLBACKS", ())
    monkeypatch.setattr(temporary, "LONGEST", 1000)


@pytest.mark.usefixtures("own_temporary")
def test_a_store_that_cannot_be_written_is_told_and_can_be_read(place: Path) -> None:
    home = place / "home"
    home.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(home)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store_of("1")(home)
        subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
        study()(place)
        result = CliRunner().invoke(app, ["run", "study.yaml", "--home", str(home)])
        assert result.exit_code == 2
        assert re.search("the store .* cannot be written: give another --home", result.stderr)
        for command in ("plan", "status", "gc", "doctor"):
            assert CliRunner().invoke(app, [command, "study.yaml", "--home", str(home)]).exit_code == 0, command
    finally:
        subprocess.run(["umount", str(home)], check=True)


@pytest.mark.usefixtures("own_temporary")
@pytest.mark.parametrize("given", [["plan"], ["plan", "--json"], ["status"], ["doctor"], ["gc"]], ids=" ".join)
def test_looking_creates_and_changes_nothing(given: list[str], place: Path) -> None:
    study()(place)
    before = listing(place)
    absent = CliRunner().invoke(app, [given[0], "study.yaml", *given[1:], "--home", "absent"])
    assert absent.exit_code == (2 if given == ["gc"] else 0)
    assert listing(place) == before
    store_of("1")(place / "home")
    before = listing(place)
    assert CliRunner().invoke(app, [given[0], "study.yaml", *given[1:], "--home", "home"]).exit_code == 0
    assert listing(place) == before


def test_there_are_rows_enough_and_each_has_a_name() -> None:
    assert len(ROWS) >= 40
    assert len({row[0] for row in ROWS}) == len(ROWS)
