"""The device in what stages are called: the bits of a GPU are no CPU's, and neither are its speeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import make_plan, throughput_specs
from orchestrator.study.spec import DEVICES
from tests.study.test_plan import RESOLVED, STUDY


def test_what_another_device_computes_is_another_stage_and_what_is_read_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    document = read_document(tmp_path / "study.yaml", ("evaluation.probes={}",))
    study = validate(document)
    here, there = (make_plan(document, study, RESOLVED, device) for device in DEVICES)
    assert (here.device, there.device) == ("cpu", "cuda")
    assert list(here.specs) == list(make_plan(document, study, RESOLVED).specs)
    assert len(here.specs) == len(there.specs)
    assert set(here.specs) & set(there.specs) == {here.tokens.key}
    assert {getattr(spec, "processor", "none") for spec in there.specs.values()} == {"none", "cuda"}
    pretrained = RESOLVED.architecture.model_copy(update={"pretrained": "w"})
    found = dataclasses.replace(RESOLVED, architecture=pretrained, teacher="w")
    brought = [make_plan(document, study, found, device) for device in DEVICES]
    assert set(brought[0].specs) & set(brought[1].specs) == {brought[0].tokens.key, brought[0].teacher.train.key}


@pytest.mark.parametrize("device", DEVICES)
def test_speeds_belong_to_the_hardware_that_is_told(tmp_path: Path, device: str) -> None:
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    document = read_document(tmp_path / "study.yaml")
    plan = make_plan(document, validate(document), RESOLVED)
    assert {spec.hardware for spec in throughput_specs(plan, device).values()} == {device}
