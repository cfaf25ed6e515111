"""What a study refers to outside its file: text sources and pretrained teachers, resolved to fingerprints.

Place in the flow: between the study file and the plan, so that the plan is a pure function. Reads files and asks the
hub for commits; loads no model.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os.path
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.files import canonical_json, sha256_file
from orchestrator.study.gguf_file import gguf_config
from orchestrator.study.loader import StudyError
from orchestrator.study.model_sizes import Sizes, sizes_of
from orchestrator.study.pretrained import check_precision
from orchestrator.study.schema import FileSource, HubSource, Pretrain, Pretrained, Source, StdlibSource, Study
from orchestrator.study.shapes import attention_layers, inner_width, sizes, text_config
from orchestrator.study.spec import Architecture, SourceIdentity

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "__pycache__",
    "lib2to3",
    "encodings",
    "pydoc_data",
}  # the last two: tables a program wrote
TOKENIZERS = ("tokenizer", "vocab.", "merges.", "spiece.")  # beginnings of the names of files that make one


@dataclasses.dataclass(frozen=True)
class Location:
    """Where the content behind a fingerprint lies on this machine; never part of an identity."""

    files: tuple[str, ...] = ()
    hub: str | None = None
    configuration: str | None = None
    revision: str | None = None
    split: str | None = None
    gguf: str | None = None  # name of the file in the folder that holds a teacher


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A study's outside world: identities for the plan, locations for the stages that read it."""

    train: SourceIdentity
    validation: SourceIdentity | None
    architecture: Architecture
    teacher: str | None  # fingerprint of a pretrained one
    locations: dict[str, Location]  # by fingerprint
    sites: tuple[int, ...]  # the teacher's layers that have softmax attention, which can be swapped
    inner: int  # width between the projections of its attention, and of what takes its place
    sizes: Sizes | None = None  # of a pretrained teacher, which the memory of its stages follows from


def resolve(study: Study, base: Path) -> Resolved:
    """Fingerprint what the study reads; relative paths are relative to `base`, the study file's folder.

    Raises `StudyError` for a missing or empty file, an unreachable hub, an unsupported model family.
    """
    base = base.absolute()
    locations: dict[str, Location] = {}
    train = _source(study.data.train, base, "data.train", locations)
    validation = _source(study.data.validation, base, "data.validation", locations) if study.data.validation else None
    if isinstance(study.teacher, Pretrain):
        made = study.teacher
        architecture = Architecture(
            layers=made.layers, hidden=made.hidden, heads=made.heads, max_length=made.max_length,
            intermediate=made.intermediate or 4 * made.hidden, vocabulary=study.data.effective_vocabulary,
        )  # fmt: skip
        return Resolved(train, validation, architecture, None, locations, tuple(range(made.layers)), made.hidden)
    if study.teacher.folder is not None:
        fingerprint, config = _teacher_folder(study.teacher, base / study.teacher.folder, locations)
    else:
        fingerprint, config = _teacher_hub(str(study.teacher.hub), study.teacher.revision, locations)
    found = sizes(config)
    check_precision(config)
    sites = attention_layers(config, found["layers"])
    if not sites:
        raise StudyError("teacher: by config.json no layer has softmax attention: give a model with some that have")
    architecture = Architecture(**found, pretrained=fingerprint)
    inner, described = inner_width(config, found), sizes_of(architecture, text_config(config))
    return Resolved(train, validation, architecture, fingerprint, locations, sites, inner, described)


def stdlib_files() -> list[tuple[str, Path]]:
    """(name, path) of the standard library's sources, tests left out, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [(path.relative_to(root), path) for path in root.rglob("*.py")]
    return sorted((name.as_posix(), path) for name, path in found if not SKIPPED_FOLDERS.intersection(name.parts))


def _source(source: Source, base: Path, key: str, locations: dict[str, Location]) -> SourceIdentity:
    if isinstance(source, StdlibSource):
        files = stdlib_files()
        fingerprint = _digest((name, sha256_file(path)) for name, path in files)
        locations[fingerprint] = Location(files=tuple(str(path) for _, path in files))
        return SourceIdentity(source=source.source, fingerprint=fingerprint)
    if isinstance(source, FileSource):
        paths = _expand(source, base, key)
        fingerprint = _digest((path.suffix if path.suffix == ".gz" else "", _sha256(path, key)) for path in paths)
        locations[fingerprint] = Location(files=tuple(str(path) for path in paths))
        field = None if source.source == "text" else source.field
        return SourceIdentity(source=source.source, fingerprint=fingerprint, field=field)
    return _hub_source(source, key, locations)


def _expand(source: FileSource, base: Path, key: str) -> list[Path]:
    """The files that the study names, each once, by absolute paths: whoever reads them may work in another folder.

    A name is a pattern only where no file has it, so that a file called `part[0].jsonl` can be named.
    """
    paths: dict[str, None] = {}
    for index, name in enumerate(source.files):
        where = f"{key}.files.{index}"
        given = os.path.abspath(base / name)  # noqa: PTH100 (without following links)
        found = [given] if os.path.isfile(given) else _glob(name, base)  # noqa: PTH113 (takes names of any length)
        if not found:
            folder = f" (a folder: write {name.rstrip('/')}/*)" if os.path.isdir(given) else ""  # noqa: PTH112
            raise StudyError(f"{where}: no file at {base / name}{folder}: give a path relative to the study file")
        empty = [path for path in found if os.path.getsize(path) == 0]  # noqa: PTH202
        if empty:
            raise StudyError(f"{where}: {empty[0]} is empty: leave it out or fill it")
        paths.update(dict.fromkeys(found))
    return [Path(path) for path in paths]


def _glob(pattern: str, base: Path) -> list[str]:
    """The files of a pattern in the order of their names; what stands before it is taken as it is."""
    names = sorted(glob.glob(pattern, root_dir=base, recursive=True))  # noqa: PTH207 (takes absolute patterns too)
    paths = [os.path.abspath(base / name) for name in names]  # noqa: PTH100
    return [path for path in paths if os.path.isfile(path)]  # noqa: PTH113


def _sha256(path: Path, key: str) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise StudyError(f"{key}: {path} cannot be read ({error.strerror}): check its permissions") from error


def _hub_source(source: HubSource, key: str, locations: dict[str, Location]) -> SourceIdentity:
    from huggingface_hub import HfApi  # loaded only by studies that use the hub

    commit = source.revision
    if not _is_commit(commit):
        try:
            commit = str(HfApi().dataset_info(source.name, revision=source.revision).sha)
        except Exception as error:
            raise StudyError(_unreachable(key, f"data set {source.name}", source.revision, error)) from error
    identity = (source.name, source.configuration, commit, source.split)
    fingerprint = _digest([(canonical_json(identity), "hub")])
    locations[fingerprint] = Location(
        hub=source.name, configuration=source.configuration, revision=commit, split=source.split
    )
    return SourceIdentity(source="hub", fingerprint=fingerprint, field=source.field, max_tokens=source.max_tokens)


def _teacher_folder(given: Pretrained, folder: Path, locations: dict[str, Location]) -> tuple[str, dict[str, Any]]:
    remedy = f"run `{given.fetched_by}`, which brings it" if given.fetched_by else "give the folder of a saved model"
    if given.gguf is not None:
        file = folder / given.gguf
        if not os.path.isfile(file):  # noqa: PTH113 (takes names of any length)
            raise StudyError(f"teacher.gguf: {folder} holds no {given.gguf}: {remedy}")
        fingerprint = _digest([("gguf", sha256_file(file))])
        locations[fingerprint] = Location(files=(str(folder),), gguf=given.gguf)
        return fingerprint, gguf_config(file)
    if not os.path.isfile(folder / "config.json"):  # noqa: PTH113
        raise StudyError(f"teacher.folder: {folder} holds no config.json: {remedy}")
    try:
        fingerprint = folder_fingerprint(folder)
    except StudyError as error:
        raise StudyError(f"teacher.folder: {error}") from None
    locations[fingerprint] = Location(files=(str(folder),))
    return fingerprint, read_config(folder / "config.json")


def _teacher_hub(name: str, revision: str, locations: dict[str, Location]) -> tuple[str, dict[str, Any]]:
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:
        raise StudyError(_unreachable("teacher.hub", f"model {name}", revision, error)) from error
    commit = config.parent.name  # the hub's cache files a snapshot under its commit
    fingerprint = _digest([(name, commit)])
    locations[fingerprint] = Location(hub=name, revision=commit)
    return fingerprint, read_config(config)


def folder_fingerprint(folder: Path) -> str:
    """Digest of the names and contents of all files in the folder of a model; StudyError without a tokenizer."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts)
    if not any(path.name.startswith(TOKENIZERS) for path in files):
        raise StudyError(f"{folder} holds no tokenizer: save it there with tokenizer.save_pretrained")
    return _digest((path.relative_to(folder).as_posix(), sha256_file(path)) for path in files)


def read_config(path: Path) -> dict[str, Any]:
    """A config.json; `StudyError` where it is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyError(f"teacher: {path} is not JSON ({error}): save the model again with save_pretrained") from error
    return config if isinstance(config, dict) else {}


def _unreachable(key: str, what: str, revision: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return (
        f"{key}: {what} at revision {revision} cannot be reached ({reason}): check the name and the network, "
        "or use a local folder or files"
    )


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision)


def _digest(entries: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256(canonical_json(list(entries)).encode()).hexdigest()
