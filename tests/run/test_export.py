"""An exported student loads with transformers alone and gives the logits it had in memory, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from operators.config import FirFilterConfig, HyenaConfig, ImplicitFilterConfig, ModalFilterConfig
from orchestrator.distill.models.export import export_student
from orchestrator.distill.models.student import load_student, load_teacher, new_teacher, save_student
from orchestrator.distill.models.swap import swap
from orchestrator.study.spec import Architecture

SHAPE = Architecture(layers=3, hidden=32, heads=2, intermediate=64, max_length=64, vocabulary=300)
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path = [path for path in sys.path if path != ""]
import torch
from transformers import AutoModelForCausalLM
folder, logits, tied = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    raise SystemExit("loaded without its code")
except ValueError:
    pass
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert torch.equal(model(torch.arange(40)[None]).logits, torch.load(logits))
assert (model.lm_head.weight is model.gpt_neox.embed_in.weight) == (tied == "tied")
assert (model.generation_config.eos_token_id, model.generation_config.repetition_penalty) == ([7, 9], 1.25)
cached, plain = (model.generate(torch.arange(5)[None], max_new_tokens=6, do_sample=False, use_cache=c) for c in (1, 0))
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


@pytest.mark.parametrize(("layers", "head"), [([0, 1, 2], "own"), ([1], "tied")], ids=["all", "hybrid, tied head"])
def test_exported_student_is_the_student_in_memory(tmp_path: Path, layers: list[int], head: str) -> None:
    torch.set_num_threads(1)
    teacher = new_teacher(SHAPE, seed=0)
    torch.nn.init.normal_(teacher.get_output_embeddings().weight)
    if head == "tied":
        teacher.config.tie_word_embeddings = True
        teacher.tie_weights()
    teacher.generation_config.update(eos_token_id=[7, 9], repetition_penalty=1.25)
    teacher.save_pretrained(tmp_path / "teacher")
    filters = [FirFilterConfig(taps=4), ImplicitFilterConfig(), ModalFilterConfig()]
    for layer in layers:
        swap(teacher, [layer], HyenaConfig(heads=2, filter=filters[layer]), torch.Generator().manual_seed(layer))
    (tmp_path / "student").mkdir()
    save_student(teacher, load_teacher(tmp_path / "teacher").state_dict(), tmp_path / "student")
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "tokenizer")
    export_student(tmp_path / "student", tmp_path / "teacher", tmp_path / "tokenizer", tmp_path / "out")

    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (head == "own")
    student = load_student(tmp_path / "student", load_teacher(tmp_path / "teacher")).eval()
    torch.save(student(torch.arange(40)[None]).logits, tmp_path / "logits.pt")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "out"), str(tmp_path / "logits.pt"), head]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        export_student(tmp_path, tmp_path, tmp_path, tmp_path)
