"""A look at the files of a pretrained teacher's folder: what is lost, torn or damaged fails in the plan.

Known without torch: from the headers of safetensors files, and from their numbers, which are looked at once for any
that are not finite. Whether the tensors are those of the model that config.json tells of is the loader's to say, see
`orchestrator.distill.models.whole`; so is what lies in pickled files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.study.loader import StudyError

KEY = "teacher.folder"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
BFLOAT16_EXPONENT = 0x7F80
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
AT_ONCE = 1 << 24  # numbers
NAMED = 6  # tensors, in a message


class Tensor(NamedTuple):
    """A tensor in a safetensors file: its kind by the format's name, its shape, and where its first byte lies."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    begin: int


def check_teacher(folder: Path) -> None:
    """Raise `StudyError` unless the files of the weights in `folder` are whole, and of finite numbers."""
    if (folder / "adapter_config.json").exists():
        raise _wrong(f"{folder} is an adapter: merge it into its model (merge_and_unload), and save that")
    weights = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise _wrong(f"{folder} holds no weights: save them there with model.save_pretrained")
    tensors = {name: tensor for file in _files(weights) for name, tensor in _header(file).items()}
    _check_kinds(tensors)
    _check_numbers(tensors)


def check_precision(config: dict[str, Any]) -> None:
    """Raise `StudyError` for a configuration of quantised weights."""
    told = config.get("quantization_config")
    if told is not None:
        method = told.get("quant_method", "an unnamed method") if isinstance(told, dict) else told
        raise StudyError(
            f"teacher: config.json says that the weights are quantised ({method}): give the model's float weights"
        )


def _check_kinds(tensors: dict[str, Tensor]) -> None:
    """Raise `StudyError` for weights that are not floating-point numbers. Masks and positions of old may be."""
    for name, tensor in tensors.items():
        if tensor.kind not in FLOATS and name.endswith(".weight"):
            raise _wrong(f"{name} is of {tensor.kind} in {tensor.file}: give the model's float weights")


def _check_numbers(tensors: dict[str, Tensor]) -> None:
    """Raise `StudyError` for a tensor with numbers that are not finite."""
    import numpy as np  # loaded only by studies of pretrained teachers

    for name, tensor in tensors.items():
        size = math.prod(tensor.shape)
        if tensor.kind not in FLOATS or size == 0:
            continue
        values: Any = np.memmap(tensor.file, FLOATS[tensor.kind], "r", tensor.begin, (size,))
        wrong = 0
        for start in range(0, size, AT_ONCE):
            part = values[start : start + AT_ONCE]
            if tensor.kind == "BF16":
                wrong += int(((part & BFLOAT16_EXPONENT) == BFLOAT16_EXPONENT).sum())
            else:
                wrong += len(part) - int(np.isfinite(part).sum())
        if wrong:
            raise _wrong(
                f"{wrong} of the {size} numbers of {name} in {tensor.file} are not finite (nan or infinite): give "
                "weights from before the model diverged, or copy the file again"
            )


def _files(weights: Path) -> Iterator[Path]:
    """The safetensors files behind a file of weights, which may be an index; all files that it names are there."""
    if weights.suffix != ".json":
        if weights.suffix == ".safetensors":
            yield weights
        return
    told = _json(weights).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told.values()):
        raise _wrong(f"{weights} has no weight_map, from tensors to files: save the model again")
    for name in sorted(set(told.values())):
        file = weights.parent / name
        if not file.is_file():
            raise _wrong(f"{weights} names {name}, which is not there: copy all files of the model")
        if file.suffix == ".safetensors":
            absent = sorted({tensor for tensor, place in told.items() if place == name} - _header(file).keys())
            if absent:
                raise _wrong(f"{file} lacks {_some(absent)}, which {weights.name} places there: copy it again")
            yield file


def _header(file: Path) -> dict[str, Tensor]:
    """What a safetensors file holds, by name. `StudyError` where it is torn."""
    whole = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 0 < length <= min(whole - 8, LONGEST_HEADER) else b""
    try:
        told = json.loads(text)
        told.pop("__metadata__", None)
        tensors = {
            name: Tensor(file, str(each["dtype"]), tuple(map(int, each["shape"])), 8 + length + each["data_offsets"][0])
            for name, each in told.items()
        }
        end = max((each["data_offsets"][1] for each in told.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _wrong(f"{file} is no safetensors file, or torn in its header: copy it again") from None
    if 8 + length + end != whole:
        raise _wrong(f"{file} has {whole} bytes and its header tells of {8 + length + end}: copy it again")
    return tensors


def _json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _wrong(f"{path} cannot be read as JSON ({error}): save it again") from error
    return told if isinstance(told, dict) else {}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _wrong(told: str) -> StudyError:
    return StudyError(f"{KEY}: {told}")
