"""Teachers in GGUF files: weights and tokenizer as transformers' own loader reads them, brought into the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from orchestrator.distill.data import prepare_tokens
from orchestrator.distill.models.origin import Origin, origin_in
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.models.whole import Given, load_tokenizer, load_whole
from orchestrator.study.documents import DataError
from orchestrator.study.sources import Location
from orchestrator.study.spec import SourceIdentity, TokensSpec
from tests.gguf_files import small_llama, write_gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Given]:
    """A model, and the folder and file that hold it."""
    folder = tmp_path_factory.mktemp("gguf")
    model = small_llama()
    write_gguf(folder / "small.gguf", model)
    return model, Given(str(folder), gguf="small.gguf")


@pytest.fixture(scope="module")
def imported(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the stage which imports a teacher writes of it."""
    folder = tmp_path_factory.mktemp("imported")
    model = load_whole(llama[1])
    model.save_pretrained(folder)
    load_tokenizer(llama[1], model.config).save_pretrained(folder)
    return folder


def test_a_model_is_the_one_in_the_file_and_can_be_saved(llama: Any, imported: Path) -> None:
    model, loaded = llama[0], load_teacher(imported)
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.state_dict().keys() == wanted.keys()
    ids = torch.arange(40)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.generation_config.bos_token_id, loaded.generation_config.eos_token_id) == (1, 2)
    assert "quantization_config" not in json.loads((imported / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(imported)
    assert tokenizer.decode(tokenizer("ab tea")["input_ids"]) == "ab tea"
    assert tokenizer.eos_token_id == 2


def test_a_file_is_its_own_card(llama: Any) -> None:
    assert origin_in(llama[1], hub=None) == Origin("float32", None, "apache-2.0")


def test_an_output_head_that_is_the_embedding_stays_so(tmp_path: Path) -> None:
    model = small_llama(tie_word_embeddings=True)
    write_gguf(tmp_path / "tied.gguf", model)
    loaded = load_whole(Given(str(tmp_path), gguf="tied.gguf"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_file_that_lacks_a_tensor_is_told(tmp_path: Path) -> None:
    write_gguf(tmp_path / "torn.gguf", small_llama(), without="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight, of the 21"):
        load_whole(Given(str(tmp_path), gguf="torn.gguf"))


def test_a_token_that_only_the_tokenizer_has_is_told_where_a_text_holds_it(
    place: Any, imported: Path, tmp_path: Path
) -> None:
    assert len(AutoTokenizer.from_pretrained(imported)) == 301  # one more than the model: transformers adds it
    spec = TokensSpec(
        train=SourceIdentity(source="text", fingerprint="t"), validation=None, validation_share=0.5, sequence_length=8,
        vocabulary=None, teacher="k",
    )  # fmt: skip
    texts = ["plain words, and more of them", *(f"the {number} of a text that is plain" for number in range(8))]
    for written in (texts, [*texts, "one with <|endoftext|> in it"]):
        files = [tmp_path / f"{number}.txt" for number in range(len(written))]
        for file, text in zip(files, written, strict=True):
            file.write_text(text)
        made = place(locations={"t": Location(files=tuple(map(str, files)))}, inputs={"teacher": imported})
        if written is texts:
            assert prepare_tokens(spec, made)["train_tokens"] > 0
        else:
            with pytest.raises(DataError, match=r"the text holds '<\|endoftext\|>', for which the model has no"):
                prepare_tokens(spec, made)
