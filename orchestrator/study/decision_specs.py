"""The specifications of what decides how a study goes on: scores and choices of layers, draws of points."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from orchestrator.study.keyed import Processor, Spec, TextWindows
from orchestrator.study.placing import Placed
from orchestrator.study.recipe import Numerics
from orchestrator.study.values import Model

Prepared = Annotated[str | None, Field(exclude_if=lambda value: value is None)]


class ScoreSpec(Spec):
    """What a student costs with further layers swapped and nothing trained, on text that no report reads.

    `reference` is the score of the teacher itself, which keeps the teacher's side for all others; that one has none.
    """

    kind: Literal["score"] = "score"
    tokens: str
    teacher: str
    subject: str  # the student that it begins from, or the teacher
    reference: str | None = None
    prepared: Prepared = None  # a student in which each of the layers has its operator; none: as operators start
    layers: tuple[int, ...]  # swapped beside those of the subject
    operator: Placed  # of these layers
    sequence_length: int
    text_windows: TextWindows = None  # as of the stage that is to train the layers: operators may start from text
    batch_size: int = 16  # windows that are read at a time
    text: int  # tokens of held-out text, at least two windows of them
    reported: int  # tokens of held-out text that evaluations read: none of them are read here
    numerics: Numerics
    processor: Processor = "cpu"
    seed: int

    def of(self, subject: str, layers: tuple[int, ...], reference: str | None, **more: Any) -> ScoreSpec:
        """The same score of another student."""
        return self.changed(subject=subject, layers=layers, reference=reference, **more)


class BlendSpec(Spec):
    """One number a layer that blends attention and operator, all of them trained together and all else frozen."""

    kind: Literal["blend"] = "blend"
    tokens: str
    teacher: str
    subject: str
    prepared: Prepared = None
    layers: tuple[int, ...]  # candidates
    operator: Placed
    steps: int
    batch_size: int
    sequence_length: int
    first_sequence: int
    text_windows: TextWindows = None
    numerics: Numerics
    processor: Processor = "cpu"
    seed: int


class Candidate(Model):
    """A layer that may be swapped next, by which of the study's operators, and the key of that score."""

    layer: int
    score: str
    operator: Annotated[int, Field(ge=0, exclude_if=lambda value: value == 0)] = 0

    @property
    def role(self) -> str:
        """What its score is among the parents of a choice."""
        return f"layer {self.layer}" + (f" operator {self.operator}" if self.operator else "")


class Solve(Model):
    """What a set of swaps has to have: a decoding speed over the teacher's, a number of layers, or both."""

    decode: float | None
    layers: int | None
    seconds: float  # of the teacher for a token, measured
    added: tuple[float, ...]  # to it by each candidate alone, in their order; mostly below zero


class ChoiceSpec(Spec):
    """Which layers go next: candidates in order, by their scores."""

    kind: Literal["choice"] = "choice"
    subject: str  # the student whose layers are chosen
    reference: str | None = None  # the teacher's own score
    candidates: tuple[Candidate, ...] = ()
    blend: Prepared = None  # in the place of candidates: the highest gate first, whatever is measured
    measure: Literal["kl", "loss", "hits"] = "kl"
    solve: Annotated[Solve | None, Field(exclude_if=lambda value: value is None)] = None  # none: all of them
    ascending: bool = True  # the lowest score first: of swapped layers; of restored ones the highest
    seed: int

    @property
    def parents(self) -> dict[str, str]:
        """As of any stage, and the score of every candidate by its layer and operator."""
        return {**super().parents, **{each.role: each.score for each in self.candidates}}


class DrawSpec(Spec):
    """Points of a search space to try next, by what trials of the points before came to: Optuna's."""

    kind: Literal["draw"] = "draw"
    previous: str | None = None  # the draw before, whose storage it goes on with
    told: tuple[tuple[float, ...], ...] = ()  # for each of that one's points, what its trial came to
    spaces: tuple[dict[str, Any], ...]  # as a study file has them
    whole: tuple[str, ...]  # keys that take whole numbers
    sampler: Literal["tpe", "nsga2", "qmc"]
    directions: tuple[Literal["minimize", "maximize"], ...]
    count: int  # points to draw
    seed: int
