"""Every shipped study parses and plans; the hub study also runs, a local folder and local files in the hub's place."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.study import sources
from orchestrator.study.loader import StudyError, read_document, validate
from orchestrator.study.plan import make_plan
from orchestrator.study.sources import resolve
from tests.computed import computed
from tests.gguf_files import small_llama, write_gguf
from tests.texts import save_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
SMOLLM2 = [path.stem for path in STUDIES if path.stem.startswith("smollm2")]


@pytest.fixture(scope="module", autouse=True)
def hashed_once() -> Iterator[None]:
    """The standard library, which nearly every study reads, stays as it is: each of its files is read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "sha256_file", functools.cache(sources.sha256_file))
        yield


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub would give, on a small scale: a GPT-NeoX folder with its tokenizer, and text files."""
    root = tmp_path_factory.mktemp("hub")
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "orchestrator").rglob("*.py"))]
    save_tokenizer(root / "model", texts, 400)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(root / "model")
    (root / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (root / "valid.txt").write_text("\n".join(texts[:6]))
    return root


def local(hub: Path) -> list[str]:
    """The overrides that put a local folder and local files in the hub's place, and small budgets."""
    return [
        f"teacher={{kind: pretrained, folder: {hub / 'model'}}}",
        f"data.train={{source: jsonl, files: [{hub / 'train.jsonl'}]}}",
        f"data.validation={{source: text, files: [{hub / 'valid.txt'}]}}",
        "data.sequence_length=64",
        "recipe.phases.0.tokens_per_layer=1024",
        "recipe.phases.1.tokens_per_layer=1024",
        "recipe.joint.0.tokens=2048",
        "evaluation={tokens: 2048, prompts: 2, prompt_tokens: 16, new_tokens: 8}",
        "throughput={lengths: [64, 128], decode_tokens: 8, repeats: 1}",
    ]


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GGUF file of as many layers as the one that `make teacher-smollm2` fetches."""
    root = tmp_path_factory.mktemp("fetched")
    heads = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}
    write_gguf(root / "small.gguf", small_llama(num_hidden_layers=30, max_position_embeddings=8192, **heads))
    return root


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_parses_plans_and_asks_its_question(path: Path, hub: Path, fetched: Path) -> None:
    smollm2 = [f"teacher.folder={fetched}", "teacher.gguf=small.gguf"]
    elsewhere = {"pythia-70m": local(hub), "long": smollm2} | dict.fromkeys(SMOLLM2, smollm2)
    document = read_document(path, tuple(elsewhere.get(path.stem, ())))
    study = validate(document)
    plan = make_plan(document, study, resolve(study, path.parent))
    assert study.study == path.stem
    assert study.question.endswith("?")
    assert plan.trials
    assert len(path.read_text().splitlines()) <= 90


def test_a_teacher_that_is_not_fetched_yet_is_told_with_the_target_that_brings_it(tmp_path: Path) -> None:
    study = shutil.copytree(ROOT / "studies", tmp_path / "studies") / "smollm2.yaml"
    with pytest.raises(StudyError, match=r"holds no SmolLM2-[\w.-]+gguf: run `make teacher-smollm2`"):
        resolve(validate(read_document(study)), study.parent)
    told = validate(read_document(study)).teacher
    target = Path(told.folder).relative_to("..") / str(told.gguf)  # type: ignore[union-attr,arg-type]
    done = subprocess.run(
        ["make", "--dry-run", "teacher-smollm2", "SMOLLM2=gone"], capture_output=True, text=True, cwd=ROOT
    )
    assert f"gone/{target.name}" in done.stdout, done.stderr
    assert f"SMOLLM2 := {target.parent}\n" in (ROOT / "Makefile").read_text()


def test_default_study_sweeps_what_it_promises() -> None:
    document = read_document(ROOT / "studies" / "layerwise.yaml")
    study = validate(document)
    plan = make_plan(document, study, resolve(study, ROOT / "studies"))
    operators = {(trial.study.operator.order, trial.study.operator.heads) for trial in plan.trials}  # type: ignore[union-attr]
    assert {(2, None), (3, None), (2, 4)} <= operators
    assert len(plan.trials) >= 8
    assert sum(len(trial.steps) >= 3 for trial in plan.trials) >= 3
    assert len({str(trial.study.schedule) for trial in plan.trials}) >= 3
    assert len({str(trial.study.recipe.joint) for trial in plan.trials}) >= 2
    assert max(trial.path.most for trial in plan.trials) <= 400_000
    assert any(trial.study.schedule.choice is not None for trial in plan.trials)  # by what was measured
    assert study.teacher.tokens <= 2_500_000  # type: ignore[union-attr]


@pytest.mark.slow
def test_pythia_study_runs_with_the_hub_replaced(hub: Path, tmp_path: Path) -> None:
    changes = [*local(hub), "search.space=[{schedule.layers_per_stage: [3]}]", "controls.skip=false"]
    study = ROOT / "studies" / "pythia-70m.yaml"
    computed(study, tmp_path, *changes)
    words = [word for change in changes for word in ("--set", change)]
    done = CliRunner().invoke(app, ["run", str(study), "--home", str(tmp_path), *words])
    assert done.exit_code == 0, done.output
    assert "best path: trial-00" in done.stdout
