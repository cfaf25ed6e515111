"""Compiling and finding the core: once per user, source, torch and processor.

It lies in `$XDG_CACHE_HOME/layerswap/native/KEY/core.so` (`~/.cache` by default), where KEY names all that shapes its
machine code. A build writes beside it and renames, under a lock that dies with its process: any number of processes may
begin at once, and one that is killed leaves nothing that others wait for.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock

HEADERS = (
    "vec.h",
    "fft.h",
    "rows.h",
    "conv.h",
    "step.h",
    "heads.h",
    "near.h",
    "product.h",
    "mixing.h",
    "tensors.h",
    "steps.h",
    "window_state.h",
    "window.h",
)
SOURCES = ("core.cpp", "decode.cpp", "near.cpp", "window.cpp", "mixing.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-Wno-psabi")
PATIENCE = 900  # seconds that a build, or another process's, may take


def library() -> Path:
    """Where the core for this source, torch and processor lies or would lie."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    for part in (torch.__version__, _processor(), compiler(), *FLAGS):
        digest.update(f"{part}\n".encode())
    for name in HEADERS + SOURCES:
        digest.update((here / name).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "layerswap" / "native" / digest.hexdigest()[:20] / "core.so"


def compiler() -> str:
    """The C++ compiler's command: `$CXX`, else c++ or g++."""
    return os.environ.get("CXX") or next((name for name in ("c++", "g++") if shutil.which(name)), "c++")


def build() -> Path:
    """The core, compiled now if it is not there yet (a minute).

    Raises:
        RuntimeError: there is no compiler, it fails, or the cache cannot be written; in one line.
    """
    target = library()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock"), timeout=PATIENCE):
            if not target.exists():
                _compile(target)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(" ".join(str(error).split())) from error
    return target


def _compile(target: Path) -> None:
    """Every source by a compiler of its own, as many at a time as there are processors, then all into one library."""
    from torch.utils.cpp_extension import include_paths, library_paths

    if shutil.which(compiler()) is None:
        raise FileNotFoundError(f"no C++ compiler {compiler()!r}")
    unfinished = target.with_suffix(".part")
    headers = [f"-I{path}" for path in include_paths()]
    with TemporaryDirectory(dir=target.parent) as folder:
        objects = {name: f"{folder}/{name}.o" for name in SOURCES}
        commands = [["-c", str(Path(__file__).parent / name), "-o", made, *headers] for name, made in objects.items()]
        with ThreadPoolExecutor(os.cpu_count() or 1) as several:
            list(several.map(_compiled, commands))
        searched = [f"-L{path}" for path in library_paths()]
        _compiled(["-shared", *objects.values(), "-o", str(unfinished), *searched, "-lc10", "-ltorch", "-ltorch_cpu"])
    unfinished.replace(target)


def _compiled(words: list[str]) -> None:
    command = [compiler(), *FLAGS, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise OSError(f"{command[0]} failed: {(errors or ['no message'])[0]}")


def _processor() -> str:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line for line in lines if line.startswith(("model name", "cpu family", "flags", "Features"))]
    return " ".join([platform.machine(), platform.processor(), *sorted(set(named))])
