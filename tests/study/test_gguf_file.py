"""What the plan reads of a teacher in a GGUF file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.study.gguf_file import TYPES, gguf_card, gguf_config
from orchestrator.study.loader import StudyError
from orchestrator.study.model_sizes import sizes_of
from orchestrator.study.shapes import causal_types, inner_width, sizes
from orchestrator.study.spec import Architecture
from tests.gguf_files import small_llama, write_gguf

NO_LANGUAGE_MODELS = {"general", "tokenizer", "t5", "umt5", "deci"}  # parts of a file, encoders, own code


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, small_llama())
    return path


def test_the_plan_knows_the_sizes_of_the_file(file: Path) -> None:
    assert sizes(gguf_config(file)) == {
        "layers": 2, "hidden": 32, "heads": 4, "intermediate": 48, "max_length": 64, "vocabulary": 300,
    }  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1}], ids=str)
def test_the_plan_counts_the_parameters_of_the_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    """But for norms: of 2 layers two each and a last one, of width 32."""
    model = small_llama(**changes)
    write_gguf(tmp_path / "small.gguf", model)
    told = gguf_config(tmp_path / "small.gguf")
    counted = sizes_of(Architecture(**sizes(told)), told)
    assert counted.parameters == sum(p.numel() for p in model.parameters()) - 5 * 32
    assert counted.gated


def test_values_of_another_width_are_known(tmp_path: Path) -> None:
    write_gguf(tmp_path / "wide.gguf", small_llama(head_dim=12))
    told = gguf_config(tmp_path / "wide.gguf")
    assert inner_width(told, sizes(told)) == 48


def test_it_names_its_licence(file: Path) -> None:
    assert gguf_card(file) == {"license": "apache-2.0"}


def test_every_decoder_that_transformers_reads_is_planned_by_its_type() -> None:
    known = {TYPES.get(name, name) for name in set(GGUF_SUPPORTED_ARCHITECTURES) - NO_LANGUAGE_MODELS}
    assert known <= causal_types()
    assert {"llama", "qwen2_moe", "gemma3_text"} <= known


def test_without_the_package_the_extra_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(StudyError, match=r"needs the package gguf: pip install 'layerswap\[gguf\]'"):
        gguf_config(file)


def test_a_study_of_a_file_is_planned(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(
        f"study: small\nteacher: {{kind: pretrained, folder: {file.parent}, gguf: small.gguf}}\n"
        "data: {sequence_length: 32}\nevaluation: {prompts: 0}\nthroughput: {lengths: [64]}\n"
        "recipe: {phases: [{tokens: 1024, losses: {kl: 1.0}}]}\n"
    )
    done = CliRunner().invoke(app, ["plan", "study.yaml", "--home", "home"])
    assert done.exit_code == 0, done.stderr
    assert "teacher  2 layers" in done.stdout
    assert "note: the tokenizer has no padding token: windows are full, so a study needs none" in done.stderr
