"""Folders as real models have them: shards, half precision, padded vocabularies, tokenizers that lack tokens.

Each goes through the plan and the stages of a study in which one line, the teacher, differs from an embedded one's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.distill.data import load_tokens
from orchestrator.distill.models.auto import AutoModelForCausalLM
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.models.swap import swapped
from orchestrator.run.store import Store
from tests.conftest import TEXT
from tests.test_export_command import computed

STUDY = """\
study: real
question: Does the model of a folder become a student?
teacher: {kind: pretrained, folder: model}
data: {train: {source: jsonl, files: [text.jsonl]}, sequence_length: 16, validation_share: 0.2}
operator: {kind: hyena, heads: 4, feature_map: power, key_dim: 4, normalise: true, filter: {positive: true}}
schedule: {layers_per_stage: 2}
recipe:
  batch_size: 2
  phases: [{tokens: 64, losses: {kl: 1.0}}]
evaluation: {tokens: 64, prompts: 2, prompt_tokens: 4, new_tokens: 4}
throughput: {lengths: [16], decode_tokens: 4, repeats: 1}
controls: {skip: false, scratch: none}
"""
NO_PADDING = "note: the tokenizer has no padding token: windows are full, so a study needs none"


def byte_level() -> Tokenizer:
    """A byte-level BPE of 300 entries, of which the first two are special."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXT, trainer)
    return bpe


def save_llama(folder: Path) -> torch.nn.Module:
    """Grouped heads, bfloat16 in shards, more entries than its tokenizer, which names no end of text; no
    generation_config.json."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "generation_config.json").unlink()
    bpe = byte_level()
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>").save_pretrained(folder)
    return model


def save_gpt2(folder: Path) -> torch.nn.Module:
    """float16, tied, with learned positions; a tokenizer of two files, as it was published."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1,
        initializer_range=0.2, resid_pdrop=0.1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(torch.float16)
    model.save_pretrained(folder)
    byte_level().model.save(str(folder))
    settings = {"tokenizer_class": "GPT2Tokenizer", **dict.fromkeys(("eos_token", "bos_token", "unk_token"), "</s>")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


SAVED: dict[str, tuple[Any, list[str]]] = {
    "llama": (
        save_llama,
        [
            "note: the tokenizer has no end of text: "
            "documents are separated by '</s>', the eos_token_id of config.json",
            "note: the tokenizer begins a text with '<s>': so does every window",
            NO_PADDING,
        ],
    ),
    "gpt2": (save_gpt2, [NO_PADDING]),
}


@pytest.fixture(params=SAVED)
def given(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A study of a folder's model in the working directory; the model, and what the plan notes of it."""
    monkeypatch.chdir(tmp_path)
    save, notes = SAVED[request.param]
    Path("study.yaml").write_text(STUDY)
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    return save(tmp_path / "model"), notes


def test_a_folders_model_becomes_a_student_that_loads_anywhere(given: Any) -> None:
    model, notes = given
    folder = Path("model")
    assert len(list(folder.glob("*.safetensors"))) == (1 if isinstance(model, GPT2LMHeadModel) else 4)
    shown = CliRunner().invoke(app, ["plan", "study.yaml", "--home", "home"])
    assert shown.exit_code == 0, shown.stderr
    assert shown.stderr.splitlines() == notes

    plan = computed(Path("study.yaml"), Path("home"))
    store = Store(Path("home/store"), write=False)
    teacher = load_teacher(store.artefacts(plan.teacher.train.key))
    wanted = model.float().eval()
    assert {name: t.tolist() for name, t in teacher.state_dict().items()} == {
        name: t.tolist() for name, t in wanted.state_dict().items()
    }
    begin = None if isinstance(model, GPT2LMHeadModel) else 0
    tokens = load_tokens(store.artefacts(plan.tokens.key), "train")
    assert (tokens == 1).sum() > 30  # an end of text after every document
    assert begin is None or (tokens[::16] == begin).all()

    exported = CliRunner().invoke(app, ["export", "study.yaml", "--home", "home", "--to", "student"])
    assert exported.exit_code == 0, exported.stderr
    stored = load_file("student/model.safetensors")
    kept = {tensor.dtype for name, tensor in stored.items() if ".operator." not in name}
    assert kept == {torch.bfloat16 if begin == 0 else torch.float16}
    student = AutoModelForCausalLM.from_pretrained("student", dtype=torch.float32).eval()
    assert [placed.layer for placed in swapped(student)] == [0, 1]
    tokenizer = AutoTokenizer.from_pretrained("student")
    ids = tokenizer("def f(x):", return_tensors="pt")["input_ids"]
    told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    assert torch.equal(student.generate(ids, **told), student.generate(ids, use_cache=False, **told))
