"""Where an imported teacher came from: what an exported student takes over from it beside its weights."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load
from transformers.utils.hub import cached_file

from orchestrator.distill.models.auto import AutoConfig
from orchestrator.distill.models.whole import Given
from orchestrator.files import read_json, write_json
from orchestrator.study.gguf_file import gguf_card

ORIGIN = "origin.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a teacher's folder said of itself.

    Attributes:
        dtype: the precision of its weights, as torch calls it; here they are in float32.
        name: its name on the hub, where it has one.
        license: its licence by the metadata of its card, by the hub's short names, and under "other" the licence's own
            name and link.
    """

    dtype: str = "float32"
    name: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


def origin_in(given: Given, *, hub: str | None) -> Origin:
    """What a folder, or a model on the hub, says of itself in config.json and in the metadata of its card.

    A model in a folder has the name of the one on the hub that its card says it was made from. A GGUF file is its own
    card, and its weights are taken for single precision, which holds all of their values.
    """
    config = AutoConfig.from_pretrained(given.name, **given.options)
    dtype = config.dtype or getattr(config.get_text_config(), "dtype", None)
    told = _card(given.name, given.revision) if given.gguf is None else gguf_card(Path(given.name) / given.gguf)
    names = [hub, told.get("base_model")]
    known = [each for each in names if isinstance(each, str) and HUB_NAME.fullmatch(each)]
    licence = {key: told[key] for key in ("license", "license_name", "license_link") if isinstance(told.get(key), str)}
    return Origin(
        "float32" if dtype is None else str(dtype).removeprefix("torch."), known[0] if known else None, **licence
    )


def _card(name: str, revision: str | None) -> dict[str, Any]:
    """The metadata of a model's card; empty where there is none."""
    card = cached_file(
        name, "README.md", revision=revision, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return (metadata_load(card) if card else None) or {}


def write_origin(folder: Path, origin: Origin) -> None:
    """Write it beside the teacher's weights."""
    write_json(folder / ORIGIN, dataclasses.asdict(origin))


def origin_of(folder: Path) -> Origin:
    """Where the teacher in a stage's artefacts came from; of one that was trained here nothing is told."""
    return Origin(**read_json(folder / ORIGIN)) if (folder / ORIGIN).exists() else Origin()
