"""The worked example of docs/families.md as an installed package: a folder of its model is a teacher like any other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.conftest import TEXT
from tests.test_real_folders import STUDY, byte_level

ROOT = Path(__file__).resolve().parents[2]
MAKE = """
import pairs
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_config(pairs.PairsConfig(vocab_size=300)).save_pretrained("model")
"""
COMPUTE = """
from pathlib import Path
from tests.test_export_command import computed
computed(Path("study.yaml"), Path("home"))
"""
LOAD = """
import pairs
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("student", trust_remote_code=True)
print(sorted(model.config.operators), model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, pad_token_id=0).shape)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a study of a model of the package, which every process finds installed."""
    site = tmp_path / "site"
    (site / "pairs-1.0.dist-info").mkdir(parents=True)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "families.md").read_text(), flags=re.DOTALL)
    (site / "pairs.py").write_text(code)
    (site / "pairs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pairs\nVersion: 1.0\n")
    (site / "pairs-1.0.dist-info" / "entry_points.txt").write_text("[layerswap.families]\npairs = pairs:FAMILY\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(site))))
    monkeypatch.chdir(tmp_path)
    done("-c", MAKE)
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>").save_pretrained("model")
    Path("study.yaml").write_text(STUDY)
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    return tmp_path


def done(*words: str) -> str:
    """What a process of its own prints."""
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_study_of_it_is_planned(installed: Path) -> None:
    assert "teacher  2 layers" in done("-m", "orchestrator.cli", "plan", "study.yaml", "--home", "home")


@pytest.mark.slow
def test_its_student_is_trained_exported_and_loaded(installed: Path) -> None:
    done("-c", COMPUTE)
    done("-m", "orchestrator.cli", "export", "study.yaml", "--home", "home", "--to", "student")
    assert done("-c", LOAD) == "['0', '1'] torch.Size([1, 6])\n"
