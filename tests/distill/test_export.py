"""An exported student loads with transformers alone and gives the logits it had in memory, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from operators.config import FirFilterConfig, HyenaConfig, ImplicitFilterConfig, ModalFilterConfig, SkipConfig
from orchestrator.distill.models.auto import AutoModelForCausalLM
from orchestrator.distill.models.export import export_student
from orchestrator.distill.models.exported_model import CODE, LayerswapConfig, LayerswapForCausalLM, operator_config
from orchestrator.distill.models.origin import Origin, write_origin
from orchestrator.distill.models.sites import attention_of
from orchestrator.distill.models.student import load_teacher, new_teacher, save_student
from orchestrator.distill.models.swap import swap
from orchestrator.study.spec import Architecture

SHAPE = Architecture(layers=3, hidden=32, heads=2, intermediate=64, max_length=64, vocabulary=300)
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path = [path for path in sys.path if path != ""]
import pickle, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
for case in map(Path, sys.argv[1:]):
    folder, head = case / "out", (case / "head").read_text()
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        raise SystemExit("loaded without its code")
    except ValueError:
        pass
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    wanted, ids = torch.load(case / "logits.pt"), torch.arange(40)[None]
    assert model.dtype == wanted.dtype and torch.equal(model(ids).logits, wanted)
    assert (model.lm_head.weight is model.gpt_neox.embed_in.weight) == (head == "tied")
    assert (model.generation_config.eos_token_id, model.generation_config.repetition_penalty) == ([7, 9], 1.25)
    new = {"max_new_tokens": 6, "do_sample": False}
    cached, plain = (model.generate(torch.arange(5)[None], use_cache=cache, **new) for cache in (True, False))
    assert torch.equal(cached, plain)
    model.save_pretrained(case / "again")
    names = [path.name for path in folder.iterdir() if "token" not in path.name]
    assert sorted(names) == sorted(path.name for path in (case / "again").iterdir())
    assert all((folder / name).read_bytes() == (case / "again" / name).read_bytes() for name in names)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, wanted)
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
writer = pipeline("text-generation", model=str(folder), trust_remote_code=True)
assert writer.model.config.operators == model.config.operators
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
written = model.generate(tokenizer("as", return_tensors="pt").input_ids, **new)[0]
assert writer("as", return_tensors=True, **new) == [{"generated_token_ids": written.tolist()}]
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


@pytest.mark.timeout(600)
def test_exported_students_are_the_students_in_memory(tmp_path: Path) -> None:
    """In a process without this package: one in half precision, and hybrids in float32; the last with a tied head."""
    filters = [FirFilterConfig(taps=4), ImplicitFilterConfig(), ModalFilterConfig()]
    cases = [("half", [0, 1, 2], "own", "bfloat16"), ("hybrid", [1], "tied", "float32")]
    for name, layers, head, dtype in cases:
        (tmp_path / name).mkdir()
        student = saved(tmp_path / name, {layer: HyenaConfig(heads=2, filter=filters[layer]) for layer in layers}, head)
        write_origin(tmp_path / name / "teacher", Origin(dtype))
        logits = student.to(getattr(torch, dtype))(torch.arange(40)[None]).logits
        torch.save(logits, tmp_path / name / "logits.pt")
        (tmp_path / name / "head").write_text(head)
        out = export(tmp_path / name)
        assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (head == "own")
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    command = [sys.executable, "-c", ALONE, *(str(tmp_path / name) for name, *_ in cases)]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_exported_folder_has_weights_tokenizer_and_the_code_to_load_them(tmp_path: Path, student: Any) -> None:
    out = export(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded(torch.arange(40)[None]).logits, student(torch.arange(40)[None]).logits)
    kinds = [type(getattr(attention_of(loaded, i), "operator", None)).__name__ for i in range(3)]
    assert kinds == ["Skip", "NoneType", "ChannelHyena"]
    assert loaded.config.operators["0"] == {"kind": "skip"} and set(loaded.config.operators) == {"0", "2"}
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("layerswap", "gpt_neox")
    assert config["architectures"] == ["LayerswapForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "modeling_layerswap.LayerswapConfig",
        "AutoModelForCausalLM": "modeling_layerswap.LayerswapForCausalLM",
    }
    teacher = json.loads((tmp_path / "teacher" / "config.json").read_text())
    own = {"architectures", "model_type"}
    assert {name: config.get(name) for name in teacher.keys() - own} == {n: teacher[n] for n in teacher.keys() - own}
    assert sorted(path.name for path in out.glob("*.py")) == sorted(CODE)


def test_a_student_is_of_a_class_of_its_teacher(tmp_path: Path, student: Any) -> None:
    loaded = LayerswapForCausalLM.from_pretrained(export(tmp_path))
    assert isinstance(loaded, LayerswapForCausalLM) and isinstance(loaded, GPTNeoXForCausalLM)
    assert isinstance(loaded.config, LayerswapConfig) and isinstance(loaded.config, GPTNeoXConfig)
    assert type(loaded).__name__ == "LayerswapGPTNeoXForCausalLM"
    assert type(loaded) is type(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_a_student_made_anew_is_drawn_at_random(tmp_path: Path, student: Any) -> None:
    config = LayerswapConfig.from_pretrained(export(tmp_path))
    torch.manual_seed(1)
    one, two = (attention_of(AutoModelForCausalLM.from_config(config), 2).operator for _ in range(2))
    torch.manual_seed(1)
    again = attention_of(LayerswapForCausalLM(config), 2).operator
    for name, tensor in one.state_dict().items():
        assert tensor.isfinite().all() and torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(one.in_proj.weight, two.in_proj.weight)


def test_an_unknown_base_type_is_told(tmp_path: Path, student: Any) -> None:
    config = export(tmp_path) / "config.json"
    config.write_text(config.read_text().replace('"base_model_type": "gpt_neox"', '"base_model_type": "gpt_neoz"'))
    with pytest.raises(ValueError, match=r"^base_model_type 'gpt_neoz' is no causal language model of transformers "):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="base_model_type 't5' is no causal"):
        LayerswapConfig(base_model_type="t5")


def test_a_tokenizer_keeps_its_chat_template(tmp_path: Path, student: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    told = AutoTokenizer.from_pretrained(export(tmp_path)).apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False
    )
    assert told == "<a>"


def test_a_card_is_written_as_it_is_given(tmp_path: Path, student: Any) -> None:
    export_student(tmp_path / "student", tmp_path / "teacher", tmp_path / "tokenizer", tmp_path / "out", "# A card\n")
    assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"


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


def test_large_students_are_saved_in_shards_and_loaded_from_a_folder_in_a_folder(tmp_path: Path, student: Any) -> None:
    whole = AutoModelForCausalLM.from_pretrained(export(tmp_path))
    whole.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len([*(tmp_path / "shards").glob("model-*.safetensors")]) > 1
    for load in (AutoModelForCausalLM, LayerswapForCausalLM):
        loaded = load.from_pretrained(tmp_path, subfolder="shards", dtype=torch.float32)
        for name, tensor in student.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        # Products on a CPU differ in the last bit where a tensor begins at another place of its cache lines.
        found, wanted = loaded(torch.arange(40)[None]).logits, student(torch.arange(40)[None]).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.slow  # loads in a process of its own, as other tests of this file do
def test_what_goes_to_the_hub_has_the_code(tmp_path: Path, student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, sent = AutoModelForCausalLM.from_pretrained(export(tmp_path)), []

    def send(_: Any, folder: str, repository: str, before: dict[str, float], **more: Any) -> None:
        sent.append((repository, {path.name for path in Path(folder).iterdir()} - before.keys()))

    hub = SimpleNamespace(create_repo=lambda *_, **__: SimpleNamespace(repo_id="a/b"))
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: hub)
    monkeypatch.setattr(type(loaded), "_upload_modified_files", send)
    loaded.save_pretrained(tmp_path / "sent", push_to_hub=True)
    ((repository, names),) = sent
    assert repository == "a/b" and {*CODE, "config.json", "model.safetensors"} <= names


def test_what_did_not_train_is_as_the_stage_held_it(tmp_path: Path, student: Any) -> None:
    places = [tmp_path / name for name in ("student", "teacher", "tokenizer", "out")]
    export_student(places[0], places[1], places[2], places[3], held="bfloat16")
    loaded, teacher = AutoModelForCausalLM.from_pretrained(places[3]), load_teacher(places[1])
    kept, theirs = (model.gpt_neox.layers[1].attention.dense.weight for model in (loaded, teacher))
    assert torch.equal(kept, theirs.bfloat16().float()) and not torch.equal(kept, theirs)
    made, own = (attention_of(model, 2).operator.in_proj.weight for model in (loaded, student))
    assert torch.equal(made, own) and loaded.dtype == torch.float32


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
