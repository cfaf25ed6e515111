"""Exported students under what people put around a model: compilation, device maps, adapters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from operators.config import HyenaConfig, ImplicitFilterConfig
from orchestrator.distill.models.auto import AutoModelForCausalLM
from orchestrator.distill.models.export import exported
from orchestrator.distill.models.swap import swapped
from tests.distill.students import gpt2, llama, student_of

ATTENTION = ("query_key_value", "q_proj", "c_attn")  # of GPT-NeoX, Llama and GPT-2
within_peft = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to:UserWarning",
)
IDS = torch.arange(40)[None]
POWER = HyenaConfig(
    heads=2, feature_map="power", key_dim=4, normalise=True, key_gate=True, init="random",
    filter=ImplicitFilterConfig(positive=True),
)  # fmt: skip
NEW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=["gpt_neox", "llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported student of three layers, two of them swapped."""
    made = tmp_path_factory.mktemp(request.param)
    if request.param != "gpt_neox":
        torch.manual_seed(0)
        (llama if request.param == "llama" else gpt2)().save_pretrained(made / "teacher")
    teacher = tiny_teacher if request.param == "gpt_neox" else made / "teacher"
    exported(student_of(teacher, {0: POWER, 2: HyenaConfig(init="random")}), torch.float32).save_pretrained(made)
    return made


def layers_of(model: Any) -> tuple[str, Any]:
    """The name of the model's list of layers, and the list."""
    return next((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["gpt_neox"], indirect=True)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_student_gives_the_same_logits_and_gradients(model: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    out = compiled(IDS, labels=IDS, use_cache=False)
    torch.testing.assert_close(out.logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    out.loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    wanted = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("places", ["cpu", "auto"])
def test_a_device_map_of_one_device_changes_no_bit(folder: Path, model: Any, places: str) -> None:
    placed = AutoModelForCausalLM.from_pretrained(folder, device_map=places).eval()
    assert torch.equal(placed(IDS).logits, model(IDS).logits)


def test_layers_may_lie_on_disk(folder: Path, model: Any, tmp_path: Path) -> None:
    layers, _ = layers_of(model)
    trunk = layers.split(".")[0]
    places = {f"{trunk}.{name}": "cpu" for name, _ in model.get_submodule(trunk).named_children()}
    places = {"lm_head": "cpu", **places, **{f"{layers}.{layer}": "disk" for layer in range(3)}}
    del places[layers]
    kept = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(kept(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(kept.generate(IDS[:, :9], **NEW), model.generate(IDS[:, :9], **NEW))
    held = [parameter.is_meta for placed in swapped(kept) for parameter in placed.operator.parameters()]
    assert held and all(held), "weights stayed in memory"
    with pytest.raises(IndexError):
        kept(torch.tensor([[10_000]]))
    with pytest.raises((ValueError, IndexError), match=r"max_length 96|out of range"):  # the operator, or GPT-2's table
        kept(IDS.repeat(1, 3))
    assert all(parameter.is_meta for placed in swapped(kept) for parameter in placed.operator.parameters())


@within_peft
@pytest.mark.parametrize("targets", ["all-linear", [*ATTENTION, "in_proj", "out_proj"]])
def test_adapters_train_save_and_merge(folder: Path, model: Any, targets: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    torch.testing.assert_close(adapted(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    adapted(IDS, labels=IDS).loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for place in (
        r"\.0\..*operator\.in_proj",
        r"\.0\..*operator\.out_proj",
        rf"\.1\..*({'|'.join(ATTENTION)})",
        r"\.2\..*in_proj",
    ):
        assert any(re.search(rf"{place}\.lora_B", name) for name in trained), place
    for name, parameter in trained.items():
        assert "lora_A" in name or parameter.grad.abs().sum() > 0, name
        parameter.data.add_(parameter.grad, alpha=-0.1)
    moved = adapted.eval()(IDS).logits
    assert (moved - model(IDS).logits).abs().max() > 0.01
    cached, plain = (adapted.generate(input_ids=IDS[:, :9], use_cache=cache, **NEW) for cache in (True, False))
    assert torch.equal(cached, plain)
    adapted.save_pretrained(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(IDS).logits, moved, rtol=1e-4, atol=1e-4)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, moved, rtol=1e-3, atol=1e-3)


@within_peft
def test_adapters_want_their_targets_named(folder: Path) -> None:
    """What peft knows by a model's type is of the teacher's attention, which a student may have none of."""
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM"))
