"""Tasks of lm-eval: found, loaded, identified by what they ask, and asked of a model in this process.

The only importer of lm_eval. Invariant: a task's fingerprint covers every prompt, option, target and rule of scoring,
so one fingerprint is one set of questions, wherever its files lie.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import logging
import random
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.distill.measuring.rotation import RotationError, rotations
from orchestrator.distill.measuring.scores import Items

HARNESS = "0.4.13"  # its tasks, prompts and scores differ between versions
SEED = 1234  # of few-shot examples and sampling, lm-eval's own
GUESSED = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # of options, one is right by chance
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object, in its text
DATA_FILES = ("data_files", "data_dir")


class TaskError(ValueError):
    """A task that cannot be found, loaded or asked."""


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A task as it is asked.

    Attributes:
        owners: by document the item that it belongs to; documents are items, or their rotations.
        guesses: by item the chance of a right guess.
        rotated: whether every item is asked once for every rotation of its options.
    """

    name: str
    task: Any
    limit: int | None
    fingerprint: str
    requests: int
    owners: tuple[int, ...]
    guesses: tuple[float, ...]
    rotated: bool

    @property
    def items(self) -> int:
        """How many items it has."""
        return len(self.guesses)


def check_installed() -> None:
    """Raise `TaskError` unless the lm-eval that this program was tested with is installed."""
    remedy = f"pip install 'layerswap[eval]' brings lm-eval {HARNESS}"
    try:
        found = version("lm_eval")
    except PackageNotFoundError:
        raise TaskError(f"tasks are asked by lm-eval, which is not installed: {remedy}") from None
    if found != HARNESS:
        raise TaskError(f"lm-eval {found} is installed, and its tasks are not those of {HARNESS}: {remedy}")


def find_tasks(names: Sequence[str], folder: Path | None) -> dict[str, Path]:
    """The files of tasks by their names: those of `folder` first, then lm-eval's own.

    A name may be that of a task, of a tag or group, which stands for its tasks, or the path of a task's file.
    """
    from lm_eval.tasks._index import TaskIndex

    own = TaskIndex.build([folder]) if folder is not None else {}
    found: dict[str, Path] = {}
    every: dict[str, Any] = own
    for name in names:
        if Path(name).suffix == ".yaml":
            found |= _of_file(Path(name))
            continue
        if name not in every and every is own:
            import lm_eval.tasks

            every = {**TaskIndex.build([Path(lm_eval.tasks.__file__).parent]), **own}
        found |= _members(name, every, folder)
    return found


def load_task(name: str, file: Path, limit: int | None, rotate: bool) -> Asked:
    """The task of a file, its first `limit` items, rotated where `rotate` asks for it and order can matter.

    Raises `TaskError` where its data cannot be had, or it is of a kind that is not asked here.
    """
    with quiet():
        task = _loaded(name, file)
        rules = json.dumps(_rules(task), sort_keys=True, default=str)
        documents = list(task.eval_docs)[:limit]
        try:
            turned = rotations(task, documents) if rotate else None
        except RotationError as error:
            raise TaskError(f"--rotate: task {name} {error}: leave --rotate out, or the task") from None
        if turned is not None:
            flat = [document for several in turned for document in several]
            task.config.process_docs = lambda _: flat
            limit = None
        counts = [1] * len(documents) if turned is None else [len(several) for several in turned]
        _build(task, limit)
    asked = [[i.doc_id, i.request_type, i.args, i.doc, task.doc_to_target(i.doc)] for i in task.instances]
    text = ADDRESS.sub("", rules + json.dumps(asked, sort_keys=True, default=str))
    return Asked(
        name, task, limit, hashlib.sha256(text.encode()).hexdigest(), len(task.instances),
        tuple(item for item, count in enumerate(counts) for _ in range(count)),
        tuple(_guess(task, document) for document in documents), turned is not None,
    )  # fmt: skip


def ask(asked: Asked, model: Any, tokenizer: Any, batch_size: int, **how: Any) -> dict[str, Items | float]:
    """By metric what the items gave, or the score alone where it is no mean; `how` goes to lm-eval's model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    random.seed(SEED)
    np.random.seed(SEED)
    task = asked.task
    task.set_fewshot_seed(seed=SEED)
    with quiet():
        asked_of = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **how)
        tasks: Any = {"tasks": {asked.name: task}, "groups": {}, "group_map": {}}
        try:
            told: Any = evaluate(asked_of, tasks, limit=asked.limit, bootstrap_iters=0)
        except AssertionError as error:
            raise TaskError(
                f"an option of task {asked.name}, or an answer that it lets a model write, is longer than the "
                f"{asked_of.max_length} positions of the model: leave it out ({_reason(error)})"
            ) from error
    samples: dict[str, list[Any]] = {}
    for sample in told["samples"][asked.name]:
        for metric in sample["metrics"]:
            samples.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    scores = told["results"][asked.name]
    return {
        key.removesuffix(",none").replace(",", " "): _items(asked, key, values) or float(scores[key])
        for key, values in samples.items()
        if isinstance(scores.get(key), int | float)
    }


def _items(asked: Asked, key: str, values: list[Any]) -> Items | None:
    """What the items gave; None for a metric that is no mean, perplexity or bits per byte."""
    from lm_eval.api import metrics

    metric = key.split(",")[0]
    rule = asked.task.aggregation().get(metric)
    if rule in (metrics.weighted_perplexity, metrics.bits_per_byte):
        sums, weights = zip(*values, strict=True)
        form: Any = "bits" if rule is metrics.bits_per_byte else "perplexity"
        return Items(form, tuple(map(float, sums)), tuple(map(float, weights)))
    if rule is metrics.perplexity:
        return Items("perplexity", tuple(map(float, values)), (1.0,) * len(values))
    if rule is not metrics.mean:
        return None
    parts: list[list[float]] = [[] for _ in range(asked.items)]
    for owner, value in zip(asked.owners, values, strict=True):
        parts[owner].append(float(value))
    means = tuple(sum(part) / len(part) for part in parts)
    return Items("mean", means, (1.0,) * len(means), _chance(asked, metric))


def _chance(asked: Asked, metric: str) -> tuple[float, ...] | None:
    """By item the score of a guess: one of the options, or nothing where text has to be met; None where unknown."""
    if asked.task.OUTPUT_TYPE == "multiple_choice":
        return asked.guesses if metric in GUESSED else None
    higher = asked.task.higher_is_better().get(metric)
    return (0.0,) * asked.items if higher else None


def _guess(task: Any, document: dict[str, Any]) -> float:
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    right = task.doc_to_target(document)
    return (len(right) if isinstance(right, list) else 1) / len(task.doc_to_choice(document))


def _of_file(file: Path) -> dict[str, Path]:
    from lm_eval.tasks._yaml_loader import load_yaml

    if not file.is_file():
        raise TaskError(f"--tasks {file}: there is no such file: give the path of a task's file, or a name")
    try:
        told = load_yaml(file, resolve_func=False)
    except Exception as error:
        raise TaskError(f"--tasks {file} cannot be read ({_reason(error)}): correct the file") from error
    if not isinstance(told.get("task"), str):
        raise TaskError(f"--tasks {file} names no task: give a file with the key task")
    return {str(told["task"]): file}


def _members(name: str, every: dict[str, Any], folder: Path | None) -> dict[str, Path]:
    """The tasks that a name stands for."""
    entry = every.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, every, 3)
        where = f"lm-eval {HARNESS}" if folder is None else f"{folder} and lm-eval {HARNESS}"
        told = f"did you mean {' or '.join(near)}?" if near else "give the folder of its file as --task-path"
        raise TaskError(f"--tasks {name}: no task of that name in {where}: {told}")
    if entry.kind.name in ("TASK", "PY_TASK"):
        return {name: entry.yaml_path}
    inner = sorted(entry.tags) if entry.kind.name == "TAG" else entry.cfg.get("task")
    if not isinstance(inner, list) or not all(isinstance(each, str) for each in inner):
        raise TaskError(f"--tasks {name}: this group changes tasks that it is made of: name the tasks themselves")
    found: dict[str, Path] = {}
    for each in inner:
        found |= _members(each, every, folder)
    return found


def _loaded(name: str, file: Path) -> Any:
    """The task of a file; files of data that it names beside itself are read from there."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        told = load_yaml(file)
        arguments = told.get("dataset_kwargs")
        if isinstance(arguments, dict):
            beside = {key: _beside(value, file.parent) for key, value in arguments.items() if key in DATA_FILES}
            told["dataset_kwargs"] = arguments | beside
        task = TaskManager(include_defaults=False).load([told])["tasks"][name]
    except Exception as error:  # whatever a task's own code, or the way to its data, raises
        raise TaskError(
            f"task {name} of {file} cannot be loaded ({_reason(error)}): if its data is on the hub it needs the "
            "network, else correct what the file names"
        ) from error
    wanted = {"MULTIMODAL": "asks about images or sound", "UNSAFE_CODE": "runs code that a model wrote"}
    barred = [told for flag, told in wanted.items() if getattr(task, flag, False)]
    if not isinstance(task, ConfigurableTask):
        barred.append("is a class that lm-eval does not configure")
    if barred:
        raise TaskError(f"task {name} {barred[0]}, which is not done here: leave it out")
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    return task


def _beside(value: Any, folder: Path) -> Any:
    """Paths in a value, those that lie in the folder by their place there."""
    if isinstance(value, dict):
        return {key: _beside(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_beside(inner, folder) for inner in value]
    found = folder / str(value)
    return str(found.resolve()) if found.exists() else value


def _build(task: Any, limit: int | None) -> None:
    task.set_fewshot_seed(seed=SEED)
    try:
        task.build_all_requests(limit=limit)
    except Exception as error:  # of templates and functions that do not fit the records
        raise TaskError(f"task {task.task_name} cannot be asked ({_reason(error)}): correct its file") from error


def _rules(task: Any) -> dict[str, Any]:
    """A task's configuration but for where its data lies: what that holds is in the questions."""
    return {**task.dump_config(), "dataset_kwargs": None}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither reports nor, where nobody watches a terminal, bars of lm-eval and datasets."""
    import datasets

    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)
        if not bars:
            datasets.enable_progress_bars()
