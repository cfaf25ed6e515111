"""A student that is loaded is bitwise the student that was saved, and only what changed is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from operators.config import (
    FirFilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModalFilterConfig,
    OperatorConfig,
    SkipConfig,
)
from orchestrator.distill.context import Workplace
from orchestrator.distill.models import student as student_module
from orchestrator.distill.models import whole
from orchestrator.distill.models.auto import AutoModelForCausalLM
from orchestrator.distill.models.export import exported
from orchestrator.distill.models.origin import Origin, origin_of
from orchestrator.distill.models.sites import attention_of
from orchestrator.distill.models.student import (
    STUDENT,
    WEIGHTS,
    import_teacher,
    load_student,
    load_teacher,
    new_teacher,
    parameter_count,
    random_like,
    save_student,
)
from orchestrator.distill.models.swap import SwappedAttention, swapped
from orchestrator.study.sources import Location
from orchestrator.study.spec import Architecture, ImportSpec
from tests.distill.students import student_of

EARLIER = Path(__file__).parents[1] / "data" / "earlier"
SHAPE = Architecture(layers=2, hidden=32, heads=4, intermediate=64, max_length=64, vocabulary=300)
MIXED: dict[int, OperatorConfig] = {
    0: HyenaConfig(heads=4, filter=ImplicitFilterConfig(width=8, window="linear")),
    1: HyenaConfig(order=3, init="random"),
    2: SkipConfig(),
}
FILTERS: dict[int, OperatorConfig] = {
    0: HyenaConfig(heads=4, filter=ModalFilterConfig(modes=2)),
    1: HyenaConfig(order=3, init="random", filter=FirFilterConfig(taps=4)),
    2: HyenaConfig(filter=ModalFilterConfig(positive=True)),
}


def same(first: Any, second: Any) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("placed", [MIXED, FILTERS], ids=["operators", "filters"])
@pytest.mark.parametrize("complete", [False, True])
def test_a_student_comes_back_bitwise(
    teacher: Any, tiny_teacher: Path, tmp_path: Path, ids: Tensor, complete: bool, placed: dict[int, OperatorConfig]
) -> None:
    student = student_of(tiny_teacher, placed)
    with torch.no_grad():
        student.get_parameter("lm_head.weight").add_(0.01)
    save_student(student, None if complete else teacher.state_dict(), tmp_path)
    again = load_student(tmp_path, load_teacher(tiny_teacher))
    assert same(student, again)
    assert [getattr(attention_of(again, i), "operator").config for i in range(3)] == list(placed.values())  # noqa: B009
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids).logits, again(input_ids=ids).logits)


def test_only_what_differs_from_the_teacher_is_stored(teacher: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    student = student_of(tiny_teacher, {1: HyenaConfig()})
    with torch.no_grad():
        student.get_parameter("gpt_neox.final_layer_norm.bias")[3] += 1
    save_student(student, teacher.state_dict(), tmp_path)
    stored = set(load_file(tmp_path / WEIGHTS))
    assert stored == {name for name in student.state_dict() if ".operator." in name} | {
        "gpt_neox.final_layer_norm.bias"
    }


@pytest.mark.parametrize("complete", [False, True])
def test_a_tied_head_is_stored_once_and_comes_back_tied(tied_teacher: Path, tmp_path: Path, complete: bool) -> None:
    base = {name: tensor.clone() for name, tensor in load_teacher(tied_teacher).state_dict().items()}
    student = student_of(tied_teacher, {1: HyenaConfig()})
    with torch.no_grad():
        student.lm_head.weight.add_(0.01)
    (tmp_path / "saved").mkdir()
    save_student(student, None if complete else base, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / WEIGHTS)
    assert "lm_head.weight" not in stored and torch.equal(stored["gpt_neox.embed_in.weight"], student.lm_head.weight)
    again = load_student(tmp_path / "saved", load_teacher(tied_teacher))
    assert again.lm_head.weight is again.gpt_neox.embed_in.weight
    assert same(student, again)
    if complete:  # and is asked for
        save_file({k: v for k, v in stored.items() if "embed_in" not in k}, tmp_path / "saved" / WEIGHTS)
        with pytest.raises(ValueError, match=r"missing \['gpt_neox\.embed_in\.weight'\]"):
            load_student(tmp_path / "saved", load_teacher(tied_teacher))


def test_a_student_that_skips_stores_no_tensor(teacher: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    student = student_of(tiny_teacher, {2: SkipConfig()})
    save_student(student, teacher.state_dict(), tmp_path)
    assert load_file(tmp_path / WEIGHTS) == {}
    assert same(load_student(tmp_path, load_teacher(tiny_teacher)), student)


def test_a_teachers_folder_is_the_teacher(teacher: Any, tiny_teacher: Path) -> None:
    assert load_student(tiny_teacher, teacher) is teacher
    assert not any(isinstance(attention_of(teacher, i), SwappedAttention) for i in range(3))


def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("operator.direct")}


@pytest.mark.parametrize(
    ("complete", "edit", "told"),
    [
        (
            False,
            without,
            r"does not fit the model: unknown \[\], missing \['gpt_neox\.layers\.1\.attention\.operator\.direct",
        ),
        (
            False,
            lambda t: {**t, "extra": torch.ones(1)},
            r"does not fit the model: unknown \['extra'\], missing \[\], ",
        ),
        (True, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, r"missing \['lm_head\.weight'\]"),
        (False, lambda t: {**t, "lm_head.weight": torch.ones(300, 1)}, r"of another shape \['lm_head\.weight'\]"),
    ],
    ids=["missing operator", "unknown", "incomplete", "wrong shape"],
)
def test_tensors_that_do_not_fit_are_refused(
    teacher: Any, tiny_teacher: Path, tmp_path: Path, complete: bool, edit: Any, told: str
) -> None:
    student = student_of(tiny_teacher, {1: HyenaConfig()})
    save_student(student, None if complete else teacher.state_dict(), tmp_path)
    save_file(edit(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=told):
        load_student(tmp_path, load_teacher(tiny_teacher))


def test_an_operator_configuration_that_is_none_is_refused(teacher: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    save_student(student_of(tiny_teacher, {1: HyenaConfig()}), teacher.state_dict(), tmp_path)
    told = json.loads((tmp_path / STUDENT).read_text())
    told["operators"]["1"]["heds"] = 4
    (tmp_path / STUDENT).write_text(json.dumps(told))
    with pytest.raises(ValueError, match="heds"):
        load_student(tmp_path, load_teacher(tiny_teacher))


def test_a_new_teacher_is_decided_by_its_shape_and_seed() -> None:
    first, second, other = (new_teacher(SHAPE, seed) for seed in (0, 0, 1))
    assert same(first, second)
    assert not same(first, other)
    config = first.config
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size)
    assert shape == (2, 32, 4, 300)
    assert (config.intermediate_size, config.max_position_embeddings, config.tie_word_embeddings) == (64, 64, False)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25


def test_random_like_has_the_teachers_shape_and_not_its_weights(teacher: Any, tiny_teacher: Path) -> None:
    first, second = random_like(tiny_teacher, 0), random_like(tiny_teacher, 0)
    assert same(first, second)
    assert not same(first, teacher)
    assert parameter_count(first) == parameter_count(teacher)


def test_a_loaded_teacher_is_frozen_and_does_not_drop_anything(teacher: Any) -> None:
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


def test_an_imported_teacher_is_the_model_of_its_folder_with_its_tokenizer(
    place: Any, teacher: Any, tiny_teacher: Path
) -> None:
    made: Workplace = place(locations={"f": Location(files=(str(tiny_teacher),))})
    assert import_teacher(ImportSpec(fingerprint="f"), made) == {"parameters": parameter_count(teacher)}
    assert same(load_teacher(made.out), teacher)
    assert (made.out / "tokenizer.json").read_bytes() == (tiny_teacher / "tokenizer.json").read_bytes()


def lost(name: str) -> Any:
    return lambda tensors: {known: tensor for known, tensor in tensors.items() if name not in known}


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (
            lambda t: {f"module.{name}": tensor for name, tensor in t.items()},
            "lacks gpt_neox.embed_in.weight, ",
        ),
        (
            lost("layers.1."),
            "lacks gpt_neox.layers.1.attention.dense.bias, .* and 6 more, of the 40 tensors .*: save the whole",
        ),
        (lost("embed_out"), "lacks lm_head.weight, of the 40 tensors that config.json tells of: save"),
        (lambda t: {**t, "gpt_neox.layers.3.mlp.bias": torch.ones(3)}, "has gpt_neox.layers.3.mlp.bias, for which"),
        (
            lambda t: {**t, "embed_out.weight": torch.ones(200, 32)},
            r"lm_head.weight has the shape \[200, 32\] in .*, and \[300, 32\] by config.json",
        ),
        (
            lambda t: {**t, "embed_out.weight": t["embed_out.weight"].index_fill(0, torch.tensor([7]), float("inf"))},
            "32 of the 9600 numbers of lm_head.weight in .* are not finite",
        ),
    ],
    ids=["wrapped", "lost layer", "lost head", "a layer too many", "another shape", "infinite"],
)
@pytest.mark.parametrize("kind", ["safetensors", "pickled"])
def test_a_teacher_that_is_not_whole_is_not_imported(
    place: Any, tiny_teacher: Path, tmp_path: Path, edit: Any, told: str, kind: str
) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "torn")
    tensors = edit(load_file(tmp_path / "torn" / "model.safetensors"))
    if kind == "pickled":
        (tmp_path / "torn" / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "torn" / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "torn" / "model.safetensors", {"format": "pt"})
    made: Workplace = place(locations={"f": Location(files=(str(tmp_path / "torn"),))})
    with pytest.raises(ValueError, match=told):
        import_teacher(ImportSpec(fingerprint="f"), made)
    assert list(made.out.iterdir()) == []


def test_a_tokenizer_with_more_entries_than_the_model_is_not_imported(
    place: Any, tiny_teacher: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(tiny_teacher, tmp_path / "more"))
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path / "more")
    made: Workplace = place(locations={"f": Location(files=(str(tmp_path / "more"),))})
    with pytest.raises(ValueError, match="the end of text '<end>' is entry 300 of the tokenizer, and the model"):
        import_teacher(ImportSpec(fingerprint="f"), made)


def test_a_teacher_in_half_precision_is_imported_in_single(place: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "half")
    load_teacher(tiny_teacher).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    made: Workplace = place(locations={"f": Location(files=(str(tmp_path / "half"),))})
    import_teacher(ImportSpec(fingerprint="f"), made)
    assert {tensor.dtype for tensor in load_file(made.out / "model.safetensors").values()} == {torch.float32}


def test_what_lies_in_a_students_folder(teacher: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    """Stages of other days are read by these names."""
    save_student(student_of(tiny_teacher, {1: SkipConfig()}), teacher.state_dict(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"student.json", "student.safetensors"}
    assert json.loads((tmp_path / "student.json").read_text()) == {
        "operators": {"1": {"kind": "skip"}},
        "complete": False,
    }


def test_loading_a_model_draws_no_progress_bars(tiny_teacher: Path) -> None:
    from transformers.utils import logging

    load_teacher(tiny_teacher)
    assert not logging.is_progress_bar_enabled()


def test_what_a_folder_says_of_outputs_does_not_count(
    place: Any, tiny_teacher: Path, tmp_path: Path, teacher: Any
) -> None:
    folder = tmp_path / "said"
    shutil.copytree(tiny_teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"output_hidden_states": True, "output_attentions": True, "return_dict": False}
    (folder / "config.json").write_text(json.dumps(config))
    made: Workplace = place(locations={"f": Location(files=(str(folder),))})
    import_teacher(ImportSpec(fingerprint="f"), made)
    ids = torch.arange(12)[None]
    for model in (load_teacher(folder), random_like(folder, seed=1).eval(), load_teacher(made.out)):
        output = model(ids)
        assert output.hidden_states is None and output.attentions is None
        assert output.logits.shape == teacher(ids).logits.shape
    left = json.loads((made.out / "config.json").read_text())
    assert not left.get("output_hidden_states") and not left.get("output_attentions")


def test_a_teacher_of_the_hub_is_that_of_its_revision(
    place: Any, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def at_home(kind: Any) -> Any:
        real = kind.from_pretrained

        def load(name: str, *, revision: str, **more: Any) -> Any:
            asked.append((kind.__name__, name, revision))
            return real(tiny_teacher, **more)

        return load

    for kind in (whole.AutoModelForCausalLM, whole.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", at_home(kind))

    def origin(given: whole.Given, *, hub: str | None) -> Origin:
        asked.append(("origin", given.name, str(given.revision)))
        return Origin(name=hub)

    monkeypatch.setattr(student_module, "origin_in", origin)
    made: Workplace = place(locations={"f": Location(hub="a/b", revision="0123abcd")})
    import_teacher(ImportSpec(fingerprint="f"), made)
    wanted = [(name, "a/b", "0123abcd") for name in ("AutoModelForCausalLM", "AutoTokenizer", "origin")]
    assert asked == wanted and (made.out / "model.safetensors").exists()
    assert origin_of(made.out) == Origin(name="a/b")


@pytest.mark.parametrize(
    ("card", "origin"),
    [
        (None, Origin("bfloat16")),
        ("# No metadata\n", Origin("bfloat16")),
        ("---\nlicense: apache-2.0\nbase_model: a/b\n---\n", Origin("bfloat16", "a/b", "apache-2.0")),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nbase_model: [a/b, c/d]\n---\n",
            Origin("bfloat16", None, "other", "own", "LICENSE"),
        ),
    ],
    ids=["no card", "no metadata", "licence", "licence of its own"],
)
def test_what_a_folder_says_of_itself_is_kept_beside_its_weights(
    place: Any, tiny_teacher: Path, tmp_path: Path, card: str | None, origin: Origin
) -> None:
    folder = shutil.copytree(tiny_teacher, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.bfloat16).save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    made: Workplace = place(locations={"f": Location(files=(str(folder),))})
    import_teacher(ImportSpec(fingerprint="f"), made)
    assert origin_of(made.out) == origin and origin_of(folder) == Origin("float32")
    assert load_teacher(made.out).dtype == torch.float32


def test_a_student_of_a_student_is_itself_again(tmp_path: Path, tiny_teacher: Path) -> None:
    """Its teacher's swapped layer is stored once, with the teacher, unless it was trained on."""
    exported(student_of(tiny_teacher, {0: HyenaConfig(heads=2)}), torch.float32).save_pretrained(tmp_path / "teacher")
    student = student_of(tmp_path / "teacher", {1: HyenaConfig(), 2: SkipConfig()})
    ids = torch.arange(30)[None]
    for trained in (False, True):
        if trained:
            swapped(student)[0].operator.out_proj.weight.data.mul_(1.5)
        save_student(student, load_teacher(tmp_path / "teacher").state_dict(), tmp_path)
        stored = {name.split(".")[2] for name in load_file(tmp_path / WEIGHTS)}
        assert stored == ({"0", "1"} if trained else {"1"})
        again = load_student(tmp_path, load_teacher(tmp_path / "teacher"))
        assert torch.equal(again(ids).logits, student(ids).logits)
        assert [placed.layer for placed in swapped(again)] == [0, 1, 2]


def test_a_student_that_an_earlier_version_saved_is_still_itself() -> None:
    """Files of `tests/data/earlier`: names, shapes and meaning of what is stored have not changed since."""
    student = load_student(EARLIER / "student", load_teacher(EARLIER / "teacher")).eval()
    kinds = [type(placed.operator).__name__ for placed in swapped(student)]
    assert kinds == ["ChannelHyena", "HeadHyena", "HeadHyena"]
    with torch.no_grad():
        logits = student(torch.arange(40)[None] % 64).logits
    torch.testing.assert_close(logits, load_file(EARLIER / "logits.safetensors")["logits"], rtol=1e-5, atol=1e-5)
