"""What this machine computes with, and what figures of speed belong to.

torch is asked about accelerators only where the system shows one: its import takes longer than most commands.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path

DEVICES = Path("/dev")
SHOWN = (
    "nvidia[0-9]*",
    "nvidiactl",
    "nvgpu",
    "nvhost-gpu",
    "kfd",
    "dxg",
)  # NVIDIA's, of boards too, AMD's, under Windows
PROCESSORS = Path("/proc/cpuinfo")


def accelerators() -> int:
    """How many accelerators torch can use."""
    if not _shown():
        return 0
    import torch

    return torch.cuda.device_count()


def hardware(device: str = "cpu") -> str:
    """Processor, cores, accelerator and torch; it says where `device` is the accelerator."""
    name = "none"
    if accelerators():
        import torch

        name = torch.cuda.get_device_name()
    used = "accelerator" if device == "cpu" else "on accelerator"
    return f"{_processor()}, {used} {name}, torch {importlib.metadata.version('torch')}"


@functools.cache
def machine(device: str = "cpu") -> str:
    """What a stage on `device` computes with here: the processor and its cores, or the accelerator, and torch."""
    name = _processor()
    if device != "cpu":
        name = "no accelerator"
        if accelerators():
            import torch

            name = torch.cuda.get_device_name()
    return f"{name}, torch {importlib.metadata.version('torch')}"


def _processor() -> str:
    """The processor's name and its cores."""
    lines = PROCESSORS.read_text().splitlines() if PROCESSORS.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(models or [platform.machine()])[0]} x{os.cpu_count()}"


def _shown() -> bool:
    """Whether the system shows an accelerator; one whose devices have no files, as on macOS or Windows, does."""
    return not DEVICES.is_dir() or platform.system() != "Linux" or any(next(DEVICES.glob(n), None) for n in SHOWN)
