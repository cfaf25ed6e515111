"""Where a study's results come from, as MLflow's own tags and data sets: user, command, commit, versions, text."""

from __future__ import annotations

import dataclasses
import json

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag

from orchestrator.record.passwords import without_passwords
from orchestrator.record.provenance import Provenance
from orchestrator.record.remembered import Variant
from orchestrator.study.loader import dump
from orchestrator.study.plan import Plan
from orchestrator.study.schema import FileSource, HubSource, Source
from orchestrator.study.spec import SourceIdentity

CHANGES = "+changes"  # behind a commit where files differ from it


def source_tags(provenance: Provenance | None) -> dict[str, str]:
    """Tags of a run that this process makes."""
    if provenance is None:
        return {}
    tags = {
        "mlflow.user": provenance.user,
        "mlflow.source.name": "layerswap",
        "mlflow.source.type": "LOCAL",
        "layerswap.command": without_passwords(provenance.command),
        "layerswap.host": provenance.host,
        "layerswap.hardware": provenance.hardware,
        "layerswap.python": provenance.python,
        "layerswap.versions": ", ".join(f"{name} {version}" for name, version in sorted(provenance.versions.items())),
    }
    if provenance.commit is not None:
        tags["mlflow.source.git.commit"] = provenance.commit.removesuffix(CHANGES)
        tags["mlflow.source.git.dirty"] = str(provenance.commit.endswith(CHANGES)).lower()
    return tags


def remembered_source(variant: Variant) -> Provenance | None:
    """Where the newest run of a variant came from; None where none is remembered whole."""
    names = [field.name for field in dataclasses.fields(Provenance)]
    for run in reversed(variant.runs()):
        if all(name in run for name in names):
            return Provenance(**{name: run[name] for name in names})
    return None


def data_of(plan: Plan) -> list[DatasetInput]:
    """The text that a study trains and validates on, by its fingerprint."""
    data, tokens = plan.study.data, plan.tokens
    found = [_input(data.train, tokens.train, "training" if data.validation else "training, validation")]
    if data.validation is not None and tokens.validation is not None:
        found.append(_input(data.validation, tokens.validation, "validation"))
    return found


def study_text(plan: Plan) -> str:
    """The study as it was understood: overrides laid over it, every default written out."""
    return yaml.safe_dump(dump(plan.study), sort_keys=False, allow_unicode=True)


def _input(source: Source, identity: SourceIdentity, context: str) -> DatasetInput:
    name, kind = str(identity.source), "local"
    place = {"uri": name}
    if isinstance(source, HubSource):
        name, kind = source.name, "hugging_face"
        place = {"path": source.name, "split": source.split, "revision": source.revision}
        if source.configuration is not None:
            place["config_name"] = source.configuration
    elif isinstance(source, FileSource):
        name, place = ", ".join(source.files), {"uri": ", ".join(source.files)}
    made = Dataset(name[:500], identity.fingerprint[:36], kind, json.dumps(place))
    return DatasetInput(made, [InputTag("mlflow.data.context", context)])
