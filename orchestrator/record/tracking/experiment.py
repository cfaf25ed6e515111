"""A study's experiment in MLflow: found or made, described for people, with views to open.

Imports mlflow, as `client` does. Invariant: what a person wrote stays. A description, as the note of a run, is renewed
only where it is as this program left it, which a digest beside it tells.
"""

from __future__ import annotations

import hashlib

from mlflow import MlflowClient

from orchestrator.record.home import Home
from orchestrator.record.tracking.database import renew_places
from orchestrator.record.tracking.identity import HOME
from orchestrator.record.tracking.view import SHARED

KIND = "mlflow.experimentKind"  # tag: the UI then opens on runs and metrics
NOTE, NOTED = "mlflow.note.content", "layerswap.note"  # tags: what people read, the digest of what was written last
LONGEST_NOTE = 7_500  # letters; MLflow refuses 8,000


def experiment_of(client: MlflowClient, home: Home, study: str, home_id: str) -> str:
    """The id of a study's experiment, made where there is none and restored where its owner deleted it.

    Where another home has one of this name in the same place, this one's id stands behind its own.
    """
    name, artefacts = study, home.artefacts
    found = client.get_experiment_by_name(name)
    if found is not None and artefacts is not None and found.tags.get(HOME, home_id) != home_id:
        name = f"{study} {home_id[:8]}"  # files of the other one lie in another home
        found = client.get_experiment_by_name(name)
    place = None if artefacts is None else f"{artefacts}/{name}"
    if found is None:
        return str(client.create_experiment(name, place, {KIND: "custom_model_development", HOME: home_id}))
    if home.tracking is None and found.artifact_location != place:  # the home was moved
        renew_places(home)
    if found.lifecycle_stage == "deleted":  # in the UI, by its owner, who now runs the study again
        client.restore_experiment(found.experiment_id)
    if KIND not in found.tags:
        client.set_experiment_tag(found.experiment_id, KIND, "custom_model_development")
    return str(found.experiment_id)


def show(client: MlflowClient, experiment: str, name: str, view: str) -> None:
    """Keep a view of the experiment for people to open."""
    tags = client.get_experiment(experiment).tags
    if tags.get(f"{SHARED}{name}") != view:
        client.set_experiment_tag(experiment, f"{SHARED}{name}", view)


def describe(client: MlflowClient, experiment: str, text: str) -> None:
    """Give the experiment a description, unless a person wrote or removed it: the list of experiments shows it."""
    text, tags = text[:LONGEST_NOTE], client.get_experiment(experiment).tags
    there = tags.get(NOTE)
    if text and (there == text or is_ours(there, tags.get(NOTED))):
        for name, value in ((NOTE, text), (NOTED, digest(text))):
            if tags.get(name) != value:
                client.set_experiment_tag(experiment, name, value)


def digest(text: str) -> str:
    """A text in few letters, to know it again by."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_ours(note: str | None, noted: str | None) -> bool:
    """Whether a note is what this program wrote last, told by its digest; none where it never wrote one."""
    return noted == (digest(note) if note else None)
