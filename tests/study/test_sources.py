"""What a study refers to outside its file becomes a fingerprint of its content, or an error that says what to do."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from orchestrator.study import sources
from orchestrator.study.loader import StudyError
from orchestrator.study.schema import Study
from orchestrator.study.sources import Location, Resolved, resolve, stdlib_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_DATA = {"source": "hub", "name": "a/b", "max_tokens": 100}


def study_of(train: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None, **data: Any) -> Study:
    values: dict[str, Any] = {"study": "s", "recipe": {"phases": [{"tokens": 9, "losses": {"ce": 1.0}}]}}
    values["data"] = {"train": train or {"source": "text", "files": ["a.txt"]}, **data}
    return Study.model_validate_json(json.dumps(values | ({"teacher": teacher} if teacher else {})))


def found(base: Path, *files: str, source: str = "text", **more: Any) -> Resolved:
    return resolve(study_of({"source": source, "files": list(files), **more}), base)


def complaint(study: Study, base: Path) -> str:
    with pytest.raises(StudyError) as caught:
        resolve(study, base)
    return str(caught.value)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for name, text in (("a.txt", "one"), ("b.txt", "two"), ("deep/c.txt", "three")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_standard_library_has_one_fingerprint_and_no_tests() -> None:
    study = study_of({"source": "python-stdlib"})
    first, second = resolve(study, Path()), resolve(study, Path("/"))
    assert first.train == second.train
    names = [name for name, _ in stdlib_files()]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert len(first.locations[first.train.fingerprint].files) == len(names)


def test_a_fingerprint_is_of_the_content_not_of_the_name(texts: Path) -> None:
    before = found(texts, "a.txt").train
    shutil.copy(texts / "a.txt", texts / "deep" / "other.txt")
    assert found(texts, "deep/other.txt").train == before
    (texts / "a.txt").write_text("One")
    assert found(texts, "a.txt").train != before


def test_the_order_of_files_is_part_of_the_text(texts: Path) -> None:
    assert found(texts, "a.txt", "b.txt").train != found(texts, "b.txt", "a.txt").train


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("*.txt", ["a.txt", "b.txt"]), ("**/*.txt", ["a.txt", "b.txt", "deep/c.txt"]), ("d*/[c]?txt", ["deep/c.txt"])],
)
def test_a_glob_takes_its_files_in_the_order_of_their_names(texts: Path, pattern: str, names: list[str]) -> None:
    resolved = found(texts, pattern)
    location = resolved.locations[resolved.train.fingerprint]
    assert [Path(name) for name in location.files] == [texts / name for name in names]


ODD = ["part[0].txt", "what?.txt", "all*.txt", "[!a].txt", "{b}.txt", "a b.txt", "50%.txt", "café.txt", "-a.txt"]


@pytest.mark.parametrize("name", ODD)
def test_a_file_of_any_name_can_be_named_and_is_found_by_a_pattern(tmp_path: Path, name: str) -> None:
    for one, text in (
        (name, "wanted"),
        ("part0.txt", "a pattern"),
        ("whats.txt", "would"),
        ("allow.txt", "find these"),
    ):
        (tmp_path / one).write_text(text)
    named = found(tmp_path, name)
    assert named.locations[named.train.fingerprint].files == (str(tmp_path / name),)
    every = found(tmp_path, "*.txt")
    assert sorted(every.locations[every.train.fingerprint].files) == sorted(map(str, tmp_path.glob("*.txt")))


def test_a_folder_of_any_name_holds_the_files_of_a_pattern(tmp_path: Path) -> None:
    base = tmp_path / "run[1]*"
    base.mkdir()
    (base / "a.txt").write_text("one")
    (tmp_path / "run1").mkdir()
    (tmp_path / "run1" / "other.txt").write_text("of another folder that the name matches")
    resolved = found(base, "*.txt")
    assert resolved.locations[resolved.train.fingerprint].files == (str(base / "a.txt"),)


def test_a_file_that_several_names_mean_is_read_once(texts: Path) -> None:
    resolved = found(texts, "b.txt", "*.txt", str(texts / "b.txt"), "deep/../a.txt")
    assert resolved.locations[resolved.train.fingerprint].files == (str(texts / "b.txt"), str(texts / "a.txt"))


def test_locations_do_not_depend_on_the_working_directory(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    resolved = found(Path(), "a.txt")
    assert resolved.locations[resolved.train.fingerprint].files == (str(texts / "a.txt"),)


def test_an_absolute_path_is_taken_as_it_is(texts: Path) -> None:
    assert found(Path("/nowhere"), str(texts / "a.txt")).train == found(texts, "a.txt").train


def test_what_git_keeps_beside_a_teacher_is_not_the_teacher(texts: Path, tiny_teacher: Path) -> None:
    shutil.copytree(tiny_teacher, texts / "model")
    study = study_of(teacher={"kind": "pretrained", "folder": "model"})
    before = resolve(study, texts).teacher
    (texts / "model" / ".git" / "objects").mkdir(parents=True)
    (texts / "model" / ".git" / "objects" / "ab").write_text("of a clone")
    (texts / "model" / "empty").mkdir()
    assert resolve(study, texts).teacher == before
    (texts / "model" / "empty" / "more.json").write_text("{}")
    assert resolve(study, texts).teacher != before


@pytest.mark.parametrize(
    ("revision", "commit"),
    [("0123456789abcdef" * 2 + "01234567", True), ("0" * 39, False), ("g" * 40, False), ("A" * 40, False), ("", False)],
)
def test_a_commit_is_forty_hex_digits(revision: str, commit: bool) -> None:
    assert sources._is_commit(revision) is commit


@pytest.mark.parametrize("files", [["gone.txt"], ["a.txt", "*.md"], ["deep"]])
def test_a_missing_file_is_told_with_its_key(texts: Path, files: list[str]) -> None:
    told = complaint(study_of({"source": "text", "files": files}), texts)
    where = f"data.train.files.{len(files) - 1}: no file at {texts / files[-1]}"
    folder = " (a folder: write deep/*)" if files == ["deep"] else ""
    assert told == f"{where}{folder}: give a path relative to the study file"


def test_an_empty_file_is_told_with_its_key(texts: Path) -> None:
    (texts / "empty.txt").touch()
    study = study_of(validation={"source": "text", "files": ["empty.txt"]})
    assert (
        complaint(study, texts) == f"data.validation.files.0: {texts / 'empty.txt'} is empty: leave it out or fill it"
    )


@pytest.mark.parametrize("source", ["json", "jsonl", "parquet"])
def test_records_have_a_field_in_their_identity_and_texts_have_none(texts: Path, source: str) -> None:
    records = [found(texts, "a.txt", source=source, field=field).train for field in ("text", "body")]
    assert [record.field for record in records] == ["text", "body"]
    assert records[0].fingerprint == records[1].fingerprint
    assert found(texts, "a.txt").train.field is None


def test_packed_files_are_fingerprinted_as_they_lie(texts: Path) -> None:
    (texts / "a.txt.gz").write_bytes(gzip.compress(b"one", mtime=0))
    assert found(texts, "a.txt.gz").train != found(texts, "a.txt").train


def test_training_and_validation_text_are_resolved_apart(texts: Path) -> None:
    resolved = resolve(study_of(validation={"source": "text", "files": ["b.txt"]}), texts)
    assert resolved.validation is not None
    assert resolved.train != resolved.validation
    assert set(resolved.locations) == {resolved.train.fingerprint, resolved.validation.fingerprint}


def test_a_teacher_made_here_has_the_shape_the_study_says(texts: Path) -> None:
    made = resolve(study_of(teacher={"kind": "pretrain", "layers": 2, "hidden": 64}, vocabulary=512), texts)
    assert made.teacher is None
    assert made.architecture.model_dump() == {
        "layers": 2, "hidden": 64, "heads": 4, "intermediate": 256, "max_length": 1024, "vocabulary": 512,
        "pretrained": None,
    }  # fmt: skip


def test_a_teachers_folder_gives_its_shape_and_a_fingerprint_of_its_files(texts: Path, tiny_teacher: Path) -> None:
    shutil.copytree(tiny_teacher, texts / "model")
    study = study_of(teacher={"kind": "pretrained", "folder": "model"})
    resolved = resolve(study, texts)
    shape = resolved.architecture
    assert (shape.layers, shape.hidden, shape.heads, shape.max_length, shape.vocabulary) == (3, 32, 4, 96, 300)
    assert shape.pretrained == resolved.teacher
    assert resolved.locations[str(resolved.teacher)] == Location(files=(str(texts / "model"),))
    elsewhere = study_of(teacher={"kind": "pretrained", "folder": str(tiny_teacher)})
    assert resolve(elsewhere, texts).teacher == resolved.teacher
    (texts / "model" / "generation_config.json").write_text("{}")
    assert resolve(study, texts).teacher != resolved.teacher


@pytest.mark.parametrize(
    ("config", "tokenizer", "told"),
    [
        (None, True, "teacher.folder: {folder} holds no config.json: give the folder of a saved model"),
        ("{}", False, "teacher.folder: {folder} holds no tokenizer: save it there with tokenizer.save_pretrained"),
        (
            '{"model_type": "llama"}',
            True,
            "teacher: config.json has no number num_hidden_layers: save the model again with save_pretrained",
        ),
    ],
)
def test_a_folder_that_is_no_teacher_is_told_so(texts: Path, config: str | None, tokenizer: bool, told: str) -> None:
    folder = texts / "model"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    study = study_of(teacher={"kind": "pretrained", "folder": "model"})
    assert complaint(study, texts) == told.format(folder=folder)


def unreachable(*_: Any, **__: Any) -> Any:
    raise OSError("no route to host\nand a long story")


def test_a_hub_that_cannot_be_reached_is_told_with_what_to_do(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    remedy = "(no route to host): check the name and the network, or use a local folder or files"
    data = "data.train: data set a/b at revision main cannot be reached"
    assert complaint(study_of(HUB_DATA), texts) == f"{data} {remedy}"
    study = study_of(teacher={"kind": "pretrained", "hub": "c/d", "revision": "v1"})
    assert complaint(study, texts) == f"teacher.hub: model c/d at revision v1 cannot be reached {remedy}"


def test_a_hub_data_set_is_pinned_to_the_commit_of_its_revision(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        sha = COMMIT

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info)
    branch = resolve(study_of(HUB_DATA), texts)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)  # a commit needs no question
    commit = resolve(study_of({**HUB_DATA, "revision": COMMIT}), texts)
    assert branch.train == commit.train
    assert branch.train.max_tokens == 100
    wanted = Location(hub="a/b", revision=COMMIT, split="train")
    assert branch.locations[branch.train.fingerprint] == wanted
    other = resolve(study_of({**HUB_DATA, "revision": COMMIT, "split": "test"}), texts)
    assert other.train.fingerprint != commit.train.fingerprint


def test_a_hub_teacher_is_pinned_to_the_commit_of_its_revision(
    texts: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = texts / "snapshots" / COMMIT
    shutil.copytree(tiny_teacher, snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(snapshot / "config.json"))
    resolved = resolve(study_of(teacher={"kind": "pretrained", "hub": "c/d"}), texts)
    assert resolved.architecture.layers == 3
    assert resolved.locations[str(resolved.teacher)] == Location(hub="c/d", revision=COMMIT)
