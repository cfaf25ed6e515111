"""What figures of speed belong to, told without torch where there is no accelerator to ask it about."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orchestrator.distill.context import RunContext
from orchestrator.run import hardware
from orchestrator.run.compute import compute
from orchestrator.run.store import Store
from orchestrator.study.spec import TokensSpec

ROOT = Path(__file__).resolve().parents[2]

PLAN = """
import sys
from typer.testing import CliRunner
from orchestrator.cli import app
told = CliRunner().invoke(app, ["plan", "studies/layerwise.yaml", "--home", sys.argv[1]])
assert told.exit_code == 0, told.output
print(sorted({"torch", "ray", "mlflow"} & sys.modules.keys()))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch is asked for the accelerator's name")
def test_a_plan_imports_nothing_that_takes_seconds(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PLAN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(("shown", "count"), [("nvidia0", 3), ("kfd", 3), ("dxg", 3), ("nvram", 0), (None, 0)])
def test_torch_counts_what_the_system_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str | None, count: int
) -> None:
    if shown is not None:
        (tmp_path / shown).touch()
    monkeypatch.setattr(hardware, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert hardware.accelerators() == count
    name = "a card" if count else "none"
    assert hardware.hardware().endswith(f", accelerator {name}, torch {torch.__version__}")


def test_figures_of_the_accelerator_are_marked_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(hardware, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    processor, *rest = hardware.hardware().split(", ")
    assert rest == ["accelerator a card", f"torch {torch.__version__}"]
    assert hardware.hardware("cpu") == hardware.hardware()
    assert hardware.hardware("cuda").split(", ") == [processor, "on accelerator a card", rest[1]]


def test_where_devices_have_no_files_torch_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "DEVICES", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.accelerators() == 2


def test_the_processor_is_named_as_the_system_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: A Chip: Second\nprocessor\t: 1\nmodel name\t: Other\n"
    )
    monkeypatch.setattr(hardware, "PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert hardware.hardware().startswith("A Chip: Second x7, accelerator ")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_finished_stage_says_what_it_ran_on(text: tuple[TokensSpec, RunContext], device: str) -> None:
    """This one reads files, which no device does."""
    spec, context = text
    compute(spec.model_dump_json(), dataclasses.replace(context, device=device))
    assert Store(Path(context.store)).done(spec.key)["machine"] == hardware.machine("cpu")
