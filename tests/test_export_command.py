"""`layerswap export` on a study that ran: the folder that comes out, and a study that begins with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.distill.models.auto import AutoModelForCausalLM
from orchestrator.distill.models.student import load_student, load_teacher
from orchestrator.distill.models.swap import swapped
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan
from tests.computed import computed
from tests.conftest import TEXT
from tests.distill.students import gpt2, llama
from tests.texts import save_tokenizer

STUDY = """\
study: exported
question: What does it write?
teacher: {kind: pretrain, layers: 3, hidden: 16, heads: 2, max_length: 32, tokens: 1_600, batch_size: 4}
data: {train: {source: jsonl, files: [text.jsonl]}, sequence_length: 16, vocabulary: 300, validation_share: 0.2}
operator: {kind: hyena, heads: 2}
schedule: {layer_order: [[2], [0]]}
recipe:
  batch_size: 2
  phases: [{tokens: 64, losses: {kl: 1.0}}]
evaluation: {tokens: 64, prompts: 2, prompt_tokens: 4, new_tokens: 4}
throughput: {lengths: [16], decode_tokens: 4, repeats: 1}
controls: {skip: true, scratch: none}
"""


def layerswap(*words: str) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """A folder with a study, `study.yaml`, that ran in the home `home`."""
    root = tmp_path_factory.mktemp("ran")
    (root / "study.yaml").write_text(STUDY)
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    return root, computed(root / "study.yaml", root / "home")


@pytest.fixture(scope="module")
def folder(ran: tuple[Path, Plan]) -> Path:
    """Its student, exported."""
    root, _ = ran
    told = layerswap("export", str(root / "study.yaml"), "--home", str(root / "home"), "--to", str(root / "out"))
    assert f"to {root / 'out'}; load it with" in told
    return root / "out"


def test_the_student_of_the_store_comes_out(ran: tuple[Path, Plan], folder: Path) -> None:
    root, plan = ran
    store = Store(root / "home" / "store")
    student = load_student(
        store.artefacts(plan.trials[0].steps[-1].train.key), load_teacher(store.artefacts(plan.teacher.train.key))
    )
    ids = torch.arange(20)[None]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert [placed.layer for placed in swapped(loaded)] == [0, 2]
    assert AutoTokenizer.from_pretrained(folder)("def f").input_ids


def test_the_card_tells_what_the_student_is(ran: tuple[Path, Plan], folder: Path) -> None:
    _, plan = ran
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(metadata)
    assert (told["library_name"], told["pipeline_tag"]) == ("transformers", "text-generation")
    assert "layerswap" in told["tags"] and told.keys().isdisjoint({"base_model", "license"})
    assert "# exported: 2 of 3 attention layers swapped" in text and "in the layers 0,2." in text
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and "swapped" not in line]
    assert rows[:5] == ["teacher", "skip 0", "skip 1", "skip 2", "skip all"]
    assert rows[5:7] == ["trial-00 stage 1", "trial-00 stage 2"]
    for step in [plan.teacher, *plan.trials[0].steps]:
        assert f"`{step.train.key}`" in text
    assert plan.tokens.key in text and plan.tokens.train.fingerprint in text
    assert f"torch {torch.__version__}" in text and "rounded" not in text
    code = text.split("```python\n")[1].split("```")[0].replace('folder = "."', f"folder = {str(folder)!r}")
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "LayerswapGPTNeoXForCausalLM" and names["tokenizer"]("a").input_ids


def test_an_exported_student_begins_another_study(ran: tuple[Path, Plan], folder: Path, tmp_path: Path) -> None:
    """Its swapped layers stay so, the others can be swapped; what comes out of that has them all."""
    root, _ = ran
    half = torch.bfloat16
    AutoModelForCausalLM.from_pretrained(folder, dtype=half).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "half")
    card = "---\nlicense: apache-2.0\nbase_model: some/model\n---\n# A card\n"
    (tmp_path / "half" / "README.md").write_text(card)
    values = yaml.safe_load(STUDY)
    values |= {"study": "further", "teacher": {"kind": "pretrained", "folder": "half"}, "operator": {"kind": "hyena"}}
    values["schedule"] = {"layer_order": "bottom_up"}
    values["data"] |= {"train": {"source": "jsonl", "files": [str(root / "text.jsonl")]}}
    del values["data"]["vocabulary"]
    (tmp_path / "further.yaml").write_text(yaml.safe_dump(values))
    plan = computed(tmp_path / "further.yaml", tmp_path / "home")
    assert [step.train.layers for step in plan.trials[0].steps] == [(1,)]
    assert [step.swapped for step in plan.controls.values()] == [(1,)]
    words = ["export", str(tmp_path / "further.yaml"), "--home", str(tmp_path / "home")]
    layerswap(*words, "--to", str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    operators = [(placed.layer, placed.operator.config.heads) for placed in swapped(loaded)]
    assert operators == [(0, 2), (1, None), (2, 2)] and loaded.dtype == half
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "apache-2.0"
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "some/model"
    assert "rounded to bfloat16" in text and "# further: 3 of 3 attention layers swapped" in text
    assert "the model in the folder `half`, made from some/model, which had such in 0,2 already." in text
    store = Store(tmp_path / "home" / "store")
    student = load_student(
        store.artefacts(plan.trials[0].steps[-1].train.key), load_teacher(store.artefacts(plan.teacher.train.key))
    )
    before = load_teacher(store.artefacts(plan.teacher.train.key)).gpt_neox.layers[0].attention.operator.in_proj.weight
    assert not torch.equal(student.gpt_neox.layers[0].attention.operator.in_proj.weight, before)  # it trained on
    ids = torch.arange(20)[None]
    assert torch.equal(student.to(half)(ids).logits, loaded(ids).logits)


@pytest.mark.slow  # tests/test_real_folders.py goes the same way with models of these families as people have them
@pytest.mark.parametrize("make", [llama, gpt2])
def test_other_families_go_out_and_in(make: Any, tmp_path: Path) -> None:
    """Swapped in two of three stages, exported, and in another study swapped to the end."""
    save_tokenizer(tmp_path / "teacher", TEXT, 300)
    torch.manual_seed(0)
    make().to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    values = yaml.safe_load(STUDY)
    del values["data"]["vocabulary"]
    for name, study, words in (("teacher", "first", ["--trial", "trial-00", "--stage", "1"]), ("first", "second", [])):
        values |= {"study": study, "teacher": {"kind": "pretrained", "folder": name}}
        values["schedule"] = {"layer_order": "bottom_up", "layers_per_stage": 2}
        (tmp_path / f"{study}.yaml").write_text(yaml.safe_dump(values))
        plan = computed(tmp_path / f"{study}.yaml", tmp_path / "home", speeds=False)
        place = [str(tmp_path / f"{study}.yaml"), "--home", str(tmp_path / "home")]
        layerswap("export", *place, "--to", str(tmp_path / study), *words)
    assert [step.train.layers for step in plan.trials[0].steps] == [(2,)]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert isinstance(loaded, type(make())) and loaded.dtype == torch.bfloat16
    assert [placed.layer for placed in swapped(loaded)] == [0, 1, 2]
    new: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(1, 9)}
    cached, plain = (loaded.generate(torch.arange(9)[None], use_cache=cache, **new) for cache in (True, False))
    assert torch.equal(cached, plain)
