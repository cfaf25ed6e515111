"""Models and what a stage keeps of them: a Hugging Face folder for teachers, a difference against it for students.

Invariant: a student that is loaded is bitwise the student that was saved; tensors are loaded strictly. What a student
does not change of its teacher is in memory once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig

from operators.config import OperatorConfig
from orchestrator.distill.context import Workplace
from orchestrator.distill.models.auto import AutoConfig, AutoModelForCausalLM
from orchestrator.distill.models.origin import origin_in, write_origin
from orchestrator.distill.models.shards import whole
from orchestrator.distill.models.swap import fitted_config, swap, swapped
from orchestrator.distill.models.verify import check_reading
from orchestrator.distill.models.whole import OUTPUTS, Given, load_tokenizer, load_whole
from orchestrator.files import read_json, write_json
from orchestrator.study.spec import Architecture, ImportSpec

STUDENT = "student.json"
WEIGHTS = "student.safetensors"
_OPERATOR: TypeAdapter[Any] = TypeAdapter(OperatorConfig)


def new_teacher(shape: Architecture, seed: int) -> Any:
    """A GPT-NeoX of the given shape with random weights drawn from `seed`.

    The output head starts at zero, which learns a little more per token; rotary embedding is on a quarter of each head.
    """
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.max_length,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    return model


def random_like(folder: Path, seed: int) -> Any:
    """A model of the configuration in `folder` with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder, **OUTPUTS)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_teacher(folder: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> Any:
    """The teacher of a Hugging Face folder, in evaluation mode and frozen.

    In bfloat16 it is to be called under autocast to that (`loop.held`): its matrices and tables are of two bytes a
    number, vectors (norms, biases) and the residual stream float32. So where the folder's weights are numbers of
    bfloat16 its outputs have the bits of the same teacher in float32.
    """
    held = torch.float32 if dtype == "float32" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=held, **OUTPUTS)
    if held != torch.float32:
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.data = parameter.data.float()
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.register_forward_hook(_widened)
    return model.eval().requires_grad_(False)


def _widened(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()


def sharing(model: Any) -> Any:
    """A model of the same modules whose parameters are frozen and lie where those of `model` do.

    It is what a student starts from: surgery replaces modules of it, `load_student` and `own_what_trains` give it
    parameters of its own. `model` itself stays as it is.
    """
    shared = {id(each): torch.nn.Parameter(each.detach(), requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, shared)


def own_what_trains(student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Give every parameter that trains, and lies where one of the teacher's does, memory of its own, in float32."""
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    for parameter in student.parameters():
        if parameter.requires_grad and parameter.data_ptr() in theirs:
            parameter.data = parameter.data.to(torch.float32, copy=True)


def import_teacher(spec: ImportSpec, place: Workplace) -> dict[str, Any]:
    """Bring a pretrained model and its tokenizer into the store, weights in float32 as they will be used.

    Raises `ValueError` for a model that is not whole, or a tokenizer that does not fit it: what the plan looks for in
    folders of safetensors files is looked for here wherever the model comes from.
    """
    location = place.context.locations[spec.fingerprint]
    given = Given(location.hub or location.files[0], location.revision, location.gguf)
    model = load_whole(given)
    check_reading(model.eval())
    tokenizer = load_tokenizer(given, model.config)
    model.save_pretrained(place.out)
    tokenizer.save_pretrained(place.out)
    write_origin(place.out, origin_in(given, hub=location.hub))
    return {"parameters": parameter_count(model)}


def save_student(student: Any, base: Mapping[str, torch.Tensor] | None, folder: Path) -> None:
    """Write which layers are swapped by what, and all tensors that differ from the teacher's (`base`, or all for None).

    A tensor that has several names, as an output head that is tied to the embedding, is written once.
    """
    tensors = {}
    others = _other_names(student)
    for name, tensor in student.state_dict().items():
        known = None if base is None else base.get(name)
        if name not in others:
            tensor = whole(tensor)
            if known is None or not _same(whole(known), tensor):
                tensors[name] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS)
    write_json(folder / STUDENT, {"operators": operators_of(student), "complete": base is None})


def operators_of(student: Any) -> dict[str, Any]:
    """The configurations of what took the place of attention, as plain values by the layer's number in text."""
    return {
        str(placed.layer): _OPERATOR.dump_python(placed.operator.config, mode="json") for placed in swapped(student)
    }


def load_student(folder: Path, teacher: Any) -> Any:
    """Turn `teacher` (in place) into the student saved in `folder`; a folder of a teacher gives it back as it is.

    Parameters get the saved tensors in memory of their own, so a model that shares some with `teacher` keeps its own.

    Raises `ValueError` where the saved tensors do not fit the model.
    """
    if not (folder / STUDENT).exists():
        return teacher
    saved = read_json(folder / STUDENT)
    before = teacher.state_dict().keys()
    theirs = operators_of(teacher)  # of a teacher that is itself a student
    for layer in sorted(saved["operators"].keys() - theirs.keys(), key=int):
        operator = _OPERATOR.validate_python(saved["operators"][layer])
        swap(teacher, [int(layer)], operator, torch.Generator(), initialise=False, dtype=torch.float32)
    needed = teacher.state_dict().keys() - (_other_names(teacher) if saved["complete"] else before)
    _fill(teacher, load_file(folder / WEIGHTS), needed, folder)
    return teacher


def load_operators(folder: Path, student: Any, layers: tuple[int, ...], operator: OperatorConfig) -> None:
    """Swap layers of `student` (in place) for the trained operators that another student, saved in `folder`, has there.

    Nothing else of that student is taken. Raises `ValueError` where one of the layers is no operator there, or one of
    another configuration than `operator` has in this place.
    """
    saved = read_json(folder / STUDENT)["operators"] if (folder / STUDENT).exists() else {}
    before = student.state_dict().keys()
    for layer in layers:
        if str(layer) not in saved:
            there = ", ".join(sorted(saved, key=int)) or "none"
            raise ValueError(f"layer {layer} is not prepared: the student that brings operators has those of {there}")
        found, wanted = _OPERATOR.validate_python(saved[str(layer)]), fitted_config(student, layer, operator)
        if found != wanted:
            raise ValueError(f"layer {layer} was prepared as {found}, and not as {wanted}: prepare that operator")
        swap(student, [layer], found, torch.Generator(), initialise=False, dtype=torch.float32)
    needed = student.state_dict().keys() - before
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(needed & set(file.keys()))}
    _fill(student, tensors, needed, folder)


def _fill(model: Any, tensors: Mapping[str, torch.Tensor], needed: Set[str], folder: Path) -> None:
    """Put saved tensors into a model; `ValueError` where they are not its own, or do not bring those that it needs."""
    wanted = model.state_dict()
    unknown = sorted(set(tensors) - set(wanted))
    missing = sorted(needed - set(tensors))
    shapes = sorted(name for name in set(tensors) & set(wanted) if tensors[name].shape != wanted[name].shape)
    if unknown or missing or shapes:
        told = f"unknown {unknown[:3]}, missing {missing[:3]}, of another shape {shapes[:3]}"
        raise ValueError(f"{folder / WEIGHTS} does not fit the model: {told}")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in parameters:
                parameters[name].data = tensor.to(wanted[name].device, copy=True)
            else:
                wanted[name].copy_(tensor)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, which those of one place in memory are without being read."""
    return one.data_ptr() == other.data_ptr() or (one.dtype == other.dtype and torch.equal(one, other))


def _other_names(model: torch.nn.Module) -> set[str]:
    """Of parameters with several names, all but the first."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters, a shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
