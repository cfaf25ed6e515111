"""Exported students of many types load in one process that has nothing of this project, and are themselves.

Logits are bitwise equal but for mixtures of experts, whose grouped products differ in a last bit by process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from operators.config import HyenaConfig
from orchestrator.distill.models.export import exported
from tests.models.models import CHANNELS, logits, student_of, text

ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path = [path for path in sys.path if path != ""]
import json, torch
from pathlib import Path
from transformers import AutoModelForCausalLM

def told(folder, load):
    model = load(folder)
    for parameter in model.parameters():  # a product of tensors at odd addresses differs in its last bit
        parameter.data = parameter.data.clone()
    case = torch.load(folder / "case.pt")
    with torch.no_grad():
        found = model(input_ids=case["ids"], use_cache=False).logits
        if not torch.equal(found, case["logits"]):
            off = float((found - case["logits"]).abs().max() / case["logits"].abs().max())
            if not off < 1e-5 or not any("expert" in name for name, _ in model.named_modules()):
                return f"logits are {off:.1g} of their size off"
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if (head.weight is table.weight) != case["tied"]:
            return "the output head is not tied as it was"
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if not torch.equal(model.generate(case["ids"], **settings), case["text"]):
            return "it generates another text"
    return ""

assert "orchestrator" not in sys.modules
def by_auto(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

first = by_auto(Path(sys.argv[1]))
code = sys.modules[type(first).__module__]
found = {}
for number, folder in enumerate(map(Path, sys.argv[1:])):
    try:  # the code of all folders is the same, and is loaded once
        load = by_auto if number < 2 else lambda name: code.LayerswapForCausalLM.from_pretrained(name).eval()
        found[folder.name] = told(folder, load)
    except Exception as error:
        found[folder.name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def export(name: str, folder: Path) -> None:
    """Write a student of a type, its tokens, logits and text into a folder of that name."""
    student = student_of(name, HyenaConfig(heads=2) if len(name) % 2 else CHANNELS)
    ids = text(1, 8)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    wanted = {"ids": ids, "logits": logits(student, ids), "text": student.generate(ids, **settings), "tied": tied}
    exported(student, torch.float32).save_pretrained(folder / name)
    torch.save(wanted, folder / name / "case.pt")


def loaded_alone(names: Iterable[str], folder: Path) -> dict[str, str]:
    """By type, what is wrong with the student of it in a folder once it is loaded elsewhere; nothing: empty."""
    command = [sys.executable, "-c", ALONE, *(str(folder / name) for name in names)]
    environment = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert len({path.read_bytes() for name in names for path in (folder / name).glob("*.py")}) == 3
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found
