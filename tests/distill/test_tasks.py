"""Tasks of lm-eval asked of an exported student: every number once more from logits of plain torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoTokenizer

from operators.config import HyenaConfig
from orchestrator.distill.context import RunContext, Workplace
from orchestrator.distill.measuring.harness import HARNESS, SEED, TaskError, find_tasks, load_task
from orchestrator.distill.measuring.rotation import RotationError, rotations
from orchestrator.distill.measuring.scores import Items, read_items
from orchestrator.distill.measuring.tasks import measure_task
from orchestrator.distill.models.auto import AutoModelForCausalLM
from orchestrator.distill.models.export import exported
from orchestrator.study.recipe import Numerics
from orchestrator.study.sources import Location
from orchestrator.study.spec import TasksSpec
from tests.distill.students import student_of

pytest.importorskip("lm_eval")
TASKS = Path(__file__).resolve().parents[1] / "data" / "tasks"
LENGTH = 96  # positions of the model
LETTERS = [" A", " B", " C", " D"]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


@pytest.fixture(scope="module")
def folder(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported student of three layers, two of them swapped, with its tokenizer."""
    made = tmp_path_factory.mktemp("student")
    placed = {0: HyenaConfig(heads=2, init="random"), 2: HyenaConfig(init="random")}
    exported(student_of(tiny_teacher, placed), torch.float32).save_pretrained(made)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


class Asking:
    """Asks the student in a folder a task."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out

    def __call__(
        self, file: Path, limit: int | None = None, rotate: bool = False, batch_size: int = 3
    ) -> tuple[dict[str, Any], dict[str, Items]]:
        (name,) = find_tasks([str(file)], None)
        asked = load_task(name, file, limit, rotate)
        spec = TasksSpec(
            tokens=None, teacher=None, subject=None, folder="f", task=name, fingerprint=asked.fingerprint,
            harness=HARNESS, limit=limit, rotate=asked.rotated, batch_size=batch_size, numerics=Numerics(), seed=SEED,
        )  # fmt: skip
        places = {"f": Location(files=(str(self.folder),)), asked.fingerprint: Location(files=(str(file),))}
        place = Workplace({}, self.out, self.out, self.out, RunContext(str(self.out), locations=places), print)
        return measure_task(spec, place), read_items(self.out)


@pytest.fixture
def ask(folder: Path, tmp_path: Path) -> Asking:
    (tmp_path / "out").mkdir()
    return Asking(folder, tmp_path / "out")


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


def write(folder: Path, name: str, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """A task like the one of that name, of other records."""
    told = yaml.safe_load((TASKS / f"{name}.yaml").read_text()) | changes
    (folder / Path(told["dataset_kwargs"]["data_files"]["test"])).write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
    )
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(told))
    return folder / f"{name}.yaml"


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, prompt: str, text: str) -> float:
    """Of the text after the prompt, which loses its beginning where both are too long."""
    whole, before = tokenizer(prompt + text).input_ids, len(tokenizer(prompt).input_ids)
    count = len(whole) - before
    ids = torch.tensor(whole[-(LENGTH + 1) :])
    logs_LV = F.log_softmax(model(ids[None, :-1]).logits[0], dim=-1)
    return float(logs_LV.gather(1, ids[1:, None])[-count:].sum())


def test_options_are_scored_by_their_log_likelihoods(ask: Asking, model: Any, tokenizer: Any) -> None:
    told, items = ask(TASKS / "choice.yaml", limit=6)
    right, by_sign = [], []
    for row in records("choice")[:6]:
        logs = [log_likelihood(model, tokenizer, row["text"], "\n" + option) for option in row["choices"]]
        shares = [each / len(option) for each, option in zip(logs, row["choices"], strict=True)]
        right.append(float(max(range(4), key=logs.__getitem__) == row["answer"]))
        by_sign.append(float(max(range(4), key=shares.__getitem__) == row["answer"]))
    assert items["acc"] == Items("mean", tuple(right), (1.0,) * 6, (0.25,) * 6) and 0 < sum(right) < 6
    assert items["acc_norm"].sums == tuple(by_sign)
    assert told["metrics"]["acc"] == {"value": sum(right) / 6, "stderr": items["acc"].stderr, "chance": 0.25}
    assert (told["items"], told["requests"]) == (6, 24)


@torch.no_grad()
def test_a_text_is_scored_window_by_window_after_the_end_of_text(ask: Asking, model: Any, tokenizer: Any) -> None:
    """The first window is full, the last one begins so early that it is full as well."""
    told, items = ask(TASKS / "rolling.yaml", limit=4)
    logs, words = [], []
    for row in records("rolling")[:4]:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(row["text"]).input_ids])
        assert len(ids) > LENGTH + 1
        total, done = 0.0, 0
        while done < len(ids) - 1:
            end = min(done + LENGTH, len(ids) - 1)
            window = ids[max(0, end - LENGTH) : end + 1]
            each = F.log_softmax(model(window[None, :-1]).logits[0], dim=-1).gather(1, window[1:, None])
            total += float(each[-(end - done) :].sum())
            done = end
        logs.append(total)
        words.append(float(len(row["text"].split())))
    assert items["word_perplexity"].sums == pytest.approx(logs, rel=1e-5)
    assert items["word_perplexity"].weights == tuple(words)
    assert items["byte_perplexity"].weights == tuple(float(len(row["text"])) for row in records("rolling")[:4])
    assert told["metrics"]["word_perplexity"]["value"] == pytest.approx(
        float(torch.tensor(-sum(logs) / sum(words), dtype=torch.float64).exp()), rel=1e-5
    )
    assert told["metrics"]["word_perplexity"]["chance"] is None and items["bits_per_byte"].form == "bits"


@torch.no_grad()
def test_what_is_generated_has_to_be_the_rest(ask: Asking, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Prompts of three lengths in one batch; the first and the last rest are what greedy decoding says alone."""
    rows = [dict(row) for row in records("generate")[:3]]
    for row in (rows[0], rows[2]):
        ids = tokenizer(row["text"], return_tensors="pt").input_ids[:, -(LENGTH - 16) :]
        said = []
        while len(said) < 16 and "\n" not in tokenizer.decode(said):
            said.append(int(model(torch.cat([ids, torch.tensor([said], dtype=torch.long)], 1)).logits[0, -1].argmax()))
        row["rest"] = tokenizer.decode(said).split("\n")[0]
    assert len({len(tokenizer(row["text"]).input_ids) for row in rows}) == 3
    told, items = ask(write(tmp_path, "generate", rows))
    assert items["exact_match"] == Items("mean", (1.0, 0.0, 1.0), (1.0,) * 3, (0.0,) * 3)
    assert told["metrics"]["exact_match"]["value"] == pytest.approx(2 / 3)


def test_a_rotated_item_is_the_mean_of_its_rotations(ask: Asking, model: Any, tokenizer: Any) -> None:
    told, items = ask(TASKS / "letters.yaml", limit=3, rotate=True)
    means = []
    for row in records("choice")[:3]:
        right = []
        for first in range(4):
            options = row["choices"][first:] + row["choices"][:first]
            listed = "\n".join(f"{letter.strip()}. {text}" for letter, text in zip(LETTERS, options, strict=True))
            prompt = f"{row['text']}\nNext is\n{listed}\nAnswer:"
            logs = [log_likelihood(model, tokenizer, prompt, letter) for letter in LETTERS]
            best = max(range(4), key=logs.__getitem__)
            right.append(options[best] == row["choices"][row["answer"]])
        means.append(sum(right) / 4)
    assert items["acc"].sums == tuple(means)
    assert (told["items"], told["requests"], told["metrics"]["acc"]["chance"]) == (3, 48, 0.25)


class Options:
    """A multiple-choice task as far as rotation looks at it."""

    OUTPUT_TYPE = "multiple_choice"

    def __init__(self, **config: Any) -> None:
        told = {"doc_to_choice": ["A", "B"], "doc_to_target": "answer", "num_fewshot": 0, "test_split": "test"}
        self.config = type("Config", (), {**told, **config})
        self.fewshot_cfg = type("Config", (), {"split": "test"})

    def doc_to_choice(self, doc: dict[str, Any]) -> list[str]:
        named = self.config.doc_to_choice
        return named if isinstance(named, list) else doc[named]

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return f"{doc.get('text')} {doc.get('choices')}"


def test_every_option_is_once_in_every_place() -> None:
    task = Options(doc_to_choice=["A", "B", "C"])
    (turned,) = rotations(task, [{"choices": ["x", "y", "z"], "answer": 2}]) or [[]]
    assert turned == [
        {"choices": ["x", "y", "z"], "answer": 2},
        {"choices": ["y", "z", "x"], "answer": 1},
        {"choices": ["z", "x", "y"], "answer": 0},
    ]


def test_an_order_that_no_prompt_tells_is_left_alone() -> None:
    task = Options(doc_to_choice="endings")
    assert rotations(task, [{"endings": ["x", "y"], "answer": 0}]) is None
    assert load_task("choice", TASKS / "choice.yaml", 3, True).rotated is False
    assert load_task("rolling", TASKS / "rolling.yaml", 3, True).rotated is False


@pytest.mark.parametrize(
    ("config", "record", "told"),
    [
        ({}, {"options": ["x", "y"], "answer": 0}, "without a list 'choices'"),
        ({"doc_to_target": "{{answer}}"}, {"choices": ["x", "y"], "answer": 0}, "has no field with the place"),
        ({}, {"choices": ["x", "y"], "answer": "A"}, "has no field with the place"),
        ({}, {"choices": ["x", "y", "z"], "answer": 0}, "do not fit its options"),
        ({}, {"choices": ["x", "y"], "answer": 2}, "do not fit its options"),
        ({"num_fewshot": 2}, {"choices": ["x", "y"], "answer": 0}, "takes its examples from the items"),
    ],
)
def test_what_cannot_be_rotated_says_why(config: dict[str, Any], record: dict[str, Any], told: str) -> None:
    with pytest.raises(RotationError, match=told):
        rotations(Options(**config), [record])


def test_a_task_is_what_it_asks_wherever_it_lies(tmp_path: Path) -> None:
    def fingerprint(rows: list[dict[str, Any]], limit: int | None = None, name: str = "letters", **changes: Any) -> str:
        return load_task(name, write(tmp_path, name, rows, **changes), limit, False).fingerprint

    rows = records("choice")[:3]
    same = load_task("letters", TASKS / "letters.yaml", 3, False).fingerprint
    assert fingerprint(rows) == same and fingerprint(records("choice")[:5], 3) == same
    other = [{**rows[0], "answer": (rows[0]["answer"] + 1) % 4}, *rows[1:]]
    shots = {"num_fewshot": 2, "fewshot_split": "test"}
    different = [
        fingerprint(rows, 2), fingerprint(other), fingerprint(rows, doc_to_text="{{text}}"), fingerprint(rows, **shots),
        fingerprint(rows, metric_list=[{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]),
    ]  # fmt: skip
    assert len({same, *different}) == 6
    assert fingerprint(rows, **shots) == different[3]  # its examples are drawn alike


def test_questions_that_changed_while_they_were_waited_for_are_not_asked(ask: Asking, tmp_path: Path) -> None:
    file = write(tmp_path, "letters", records("choice")[:2])
    asked = load_task("letters", file, None, False)
    write(tmp_path, "letters", records("choice")[1:3])
    spec = TasksSpec(
        tokens=None, teacher=None, subject=None, folder="f", task="letters", fingerprint=asked.fingerprint,
        harness=HARNESS, batch_size=1, numerics=Numerics(), seed=SEED,
    )  # fmt: skip
    context = RunContext(str(tmp_path), locations={asked.fingerprint: Location(files=(str(file),))})
    with pytest.raises(ValueError, match="changed while it was waited for"):
        measure_task(spec, Workplace({}, tmp_path, tmp_path, tmp_path, context, print))


def test_tags_and_groups_stand_for_their_tasks(tmp_path: Path) -> None:
    one = yaml.safe_load((TASKS / "choice.yaml").read_text())
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**one, "task": name, "tag": "both"}))
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "all", "task": ["both", "first"]}))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"group": "changed", "task": [{"task": "first", "tag": "x"}]}))
    both = {name: tmp_path / f"{name}.yaml" for name in ("first", "second")}
    assert find_tasks(["both"], tmp_path) == both == find_tasks(["all"], tmp_path)
    with pytest.raises(TaskError, match="this group changes tasks that it is made of: name the tasks themselves"):
        find_tasks(["changed"], tmp_path)
