"""An exported student loads with transformers alone and gives the logits it had in memory, bit for bit."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from operators.config import FirFilterConfig, HyenaConfig, ImplicitFilterConfig, ModalFilterConfig, SkipConfig
from orchestrator.distill.models.export import export_student
from orchestrator.distill.models.exported_model import LayerswapForCausalLM, operator_config
from orchestrator.distill.models.student import load_teacher, new_teacher, save_student
from orchestrator.distill.models.swap import attention_of, swap
from orchestrator.study.spec import Architecture

SHAPE = Architecture(layers=3, hidden=32, heads=2, intermediate=64, max_length=64, vocabulary=300)
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path = [path for path in sys.path if path != ""]
import torch
from transformers import AutoModelForCausalLM
folder, logits, head = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    raise SystemExit("loaded without its code")
except ValueError:
    pass
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert torch.equal(model(torch.arange(40)[None]).logits, torch.load(logits))
assert (model.lm_head.weight is model.gpt_neox.embed_in.weight) == (head == "tied")
assert (model.generation_config.eos_token_id, model.generation_config.repetition_penalty) == ([7, 9], 1.25)
new = {"max_new_tokens": 6, "do_sample": False}
cached, plain = (model.generate(torch.arange(5)[None], use_cache=cache, **new) for cache in (True, False))
assert torch.equal(cached, plain)
one, two = torch.arange(5, 25)[None], torch.arange(30, 42)[None]
positions = torch.cat([torch.arange(20), torch.arange(12)])[None]
packed = model(torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
torch.testing.assert_close(packed, torch.cat([model(one).logits, model(two).logits], 1), rtol=1e-3, atol=1e-4)
try:
    model(torch.cat([one, two], 1), position_ids=positions)
    raise SystemExit("took packed documents into a cache")
except ValueError as error:
    assert "use_cache=False" in str(error)
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, step_mode="modal")
    raise SystemExit("took a mode that heads lack")
except ValueError as error:
    assert "mode must be one of" in str(error)
assert not any(name.split(".")[0] in ("operators", "orchestrator") for name in sys.modules)
"""


@pytest.fixture
def student(tmp_path: Path) -> Any:
    """Of three layers the first and the last swapped, by nothing and by channels; saved in `tmp_path / "student"`."""
    return saved(tmp_path, {0: SkipConfig(), 2: HyenaConfig(order=2, filter=ImplicitFilterConfig(width=8))})


def saved(folder: Path, swapped: dict[int, Any], head: str = "own") -> Any:
    """A student in memory; itself, its teacher and a tokenizer of bytes in the folder."""
    model = new_teacher(SHAPE, seed=0)
    torch.nn.init.normal_(model.get_output_embeddings().weight)  # at zero all logits would be, whatever the layers do
    if head == "tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.generation_config.update(eos_token_id=[7, 9], repetition_penalty=1.25)
    model.save_pretrained(folder / "teacher")
    for layer, operator in swapped.items():
        swap(model, [layer], operator, torch.Generator().manual_seed(layer))
    (folder / "student").mkdir()
    save_student(model, load_teacher(folder / "teacher").state_dict(), folder / "student")
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder / "tokenizer")
    return model.eval()


def export(folder: Path) -> Path:
    export_student(folder / "student", folder / "teacher", folder / "tokenizer", folder / "out")
    return folder / "out"


@pytest.mark.parametrize(("layers", "head"), [([0, 1, 2], "own"), ([1], "tied")], ids=["all", "hybrid, tied head"])
def test_exported_student_is_the_student_in_memory(tmp_path: Path, layers: list[int], head: str) -> None:
    filters = [FirFilterConfig(taps=4), ImplicitFilterConfig(), ModalFilterConfig()]
    student = saved(tmp_path, {layer: HyenaConfig(heads=2, filter=filters[layer]) for layer in layers}, head)
    torch.save(student(torch.arange(40)[None]).logits, tmp_path / "logits.pt")
    out = export(tmp_path)
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (head == "own")
    command = [sys.executable, "-c", ALONE, str(out), str(tmp_path / "logits.pt"), head]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_exported_folder_has_weights_tokenizer_and_the_code_to_load_them(tmp_path: Path, student: Any) -> None:
    out = export(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab()
    loaded = LayerswapForCausalLM.from_pretrained(out)
    assert torch.equal(loaded(torch.arange(40)[None]).logits, student(torch.arange(40)[None]).logits)
    kinds = [type(getattr(attention_of(loaded, i), "operator", None)).__name__ for i in range(3)]
    assert kinds == ["Skip", "NoneType", "ChannelHyena"]
    assert loaded.config.operators["0"] == {"kind": "skip"} and set(loaded.config.operators) == {"0", "2"}
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("layerswap_gpt_neox", ["LayerswapForCausalLM"])
    assert config["auto_map"] == {
        "AutoConfig": "exported_model.LayerswapConfig",
        "AutoModelForCausalLM": "exported_model.LayerswapForCausalLM",
    }


def test_the_code_of_an_exported_folder_imports_itself_and_packages_only(tmp_path: Path, student: Any) -> None:
    code = {path.stem: path.read_text(encoding="utf-8") for path in export(tmp_path).glob("*.py")}
    assert {"exported_model", "swap", "families", "operators_config", "operators_native"} <= set(code)
    assert not [name for name in code if "main" in name or name.endswith("__init__") or name == "operators"]
    for name, text in code.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (node.level, node.module in code) == (1, True), f"{name} imports {node.module}"
            elif isinstance(node, ast.ImportFrom | ast.Import):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not [m for m in modules if m.split(".")[0] in ("operators", "orchestrator")], name


def test_an_exported_student_decodes_from_fitted_modes_where_it_is_asked_to(tmp_path: Path, student: Any) -> None:
    plain = LayerswapForCausalLM.from_pretrained(export(tmp_path))
    assert plain.config.step_mode is None and plain.config.croppable is True
    assert plain.fit_errors() == {}
    fitted = LayerswapForCausalLM.from_pretrained(tmp_path / "out", step_mode="modal", croppable=False)
    errors = fitted.fit_errors()
    assert list(errors) == [2] and errors[2].shape == (32,) and 0 < errors[2].max() < 0.5
    prompt = torch.arange(5, 20)[None]
    cached, whole = (fitted.generate(prompt, max_new_tokens=5, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole) and cached.shape == (1, 20)


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        export_student(tmp_path, tmp_path, tmp_path, tmp_path)


def test_only_a_student_is_exported(tmp_path: Path, student: Any) -> None:
    with pytest.raises(ValueError, match=r"teacher holds no student: name a stage that swaps layers$"):
        export_student(tmp_path / "teacher", tmp_path / "teacher", tmp_path / "tokenizer", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_filters_of_an_exported_student_are_computed_once_where_it_says_so(tmp_path: Path, student: Any) -> None:
    loaded = LayerswapForCausalLM.from_pretrained(export(tmp_path)).eval()
    ids, computed = torch.arange(40)[None], []
    attention_of(loaded, 2).operator.filter.register_forward_hook(lambda *_: computed.append(1))
    with torch.no_grad(), loaded.frozen_filters():
        first = loaded(ids, use_cache=True).logits
        once = len(computed)
        assert torch.equal(loaded(ids, use_cache=True).logits, first)
    assert len(computed) == once
    torch.testing.assert_close(first, student(ids).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        loaded(ids, use_cache=True)
    assert len(computed) > once > 0


def test_a_filter_without_a_kind_is_an_implicit_one() -> None:
    assert operator_config({"kind": "hyena", "filter": {"width": 8}}) == HyenaConfig(
        filter=ImplicitFilterConfig(width=8)
    )
