"""What this machine computes with, and what figures of speed belong to.

torch is asked about accelerators only where the system shows one: its import takes longer than most commands.
"""

from __future__ import annotations

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


def hardware() -> str:
    """Processor, cores, accelerator and torch."""
    name = "none"
    if accelerators():
        import torch

        name = torch.cuda.get_device_name()
    lines = PROCESSORS.read_text().splitlines() if PROCESSORS.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    version = importlib.metadata.version("torch")
    return f"{(models or [platform.machine()])[0]} x{os.cpu_count()}, accelerator {name}, torch {version}"


def _shown() -> bool:
    """Whether the system shows an accelerator; one whose devices have no files, as on macOS or Windows, does."""
    return not DEVICES.is_dir() or platform.system() != "Linux" or any(next(DEVICES.glob(n), None) for n in SHOWN)
