"""The part of a study file that lets measurements decide: which layers are swapped next, and what becomes of a stage.

Place in the flow: `path` asks what is decided and waits for the results that decide it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.study.values import Model, NonNegative, Positive, Rate

AtLeastOne = Annotated[float, Field(ge=1.0, allow_inf_nan=False)]


class Probe(Model):
    """Score: a layer is swapped and distilled on so many tokens, then scored by its divergence."""

    probe: Positive


class Joint(Model):
    """Score: one number a layer that blends attention and operator, all of them trained together on so many tokens."""

    joint: Positive


class Local(Model):
    """Operators of all candidates are trained on the teacher's own activations, on so many tokens, before scoring."""

    local: Positive


class Kept(Model):
    """Layers that stay attention; all others go, the lowest first."""

    keep: tuple[NonNegative, ...]


class Until(Model):
    """When a path of chosen layers ends; what is reached first where several are given."""

    layers: Positive | None = None  # swapped
    ratio: AtLeastOne | None = None  # perplexity over the teacher's after a stage: the first stage above it is the last
    decode: Rate | None = None  # measured decoding speed over the teacher's, at the longest of throughput.lengths

    @model_validator(mode="after")
    def _some_end(self) -> Until:
        if (self.layers, self.ratio, self.decode) == (None, None, None):
            raise ValueError("nothing ends the path: give at least one of layers, ratio and decode")
        return self


class Choice(Model):
    """Layers in the order of what each costs, measured on held-out text that no report reads.

    Scores are in nats per token, the teacher beside them. `swapped_alone`: a layer goes early where swapping it alone
    costs little; `restored_alone`: where giving it back to a student that has all candidates swapped gains little.
    """

    score: Literal["kl", "loss", "hits", "skip"] | Probe | Joint = "kl"
    scored: Literal["swapped_alone", "restored_alone"] = "swapped_alone"
    prepared: Literal["init"] | Local = "init"  # the operators that are scored
    # once: at the teacher. forward: again after every pick, the picked ones swapped and untrained. every_stage: again
    # at the student of every stage.
    rerank: Literal["once", "forward", "every_stage"] = "once"
    take: Positive = 1  # layers a stage
    # greedy: the lowest score first until the end is reached. exact: the layers and operators of the lowest sum of
    # scores that are predicted to decode as fast as `until` asks, by the speeds of single layers.
    solver: Literal["greedy", "exact"] = "greedy"
    until: Until | None = None  # none: until all layers are swapped
    texts: Positive = 32_768  # tokens of held-out text
    # A choice that was made elsewhere, instead of a score: layers in the order in which they go, or those that stay. A
    # study file may name a JSON file of it. Layers that the order leaves out stay attention.
    layers: Annotated[
        Annotated[tuple[NonNegative, ...], Field(min_length=1)] | Kept | None,
        Field(exclude_if=lambda value: value is None),
    ] = None

    @model_validator(mode="after")
    def _fits(self) -> Choice:
        if isinstance(self.score, Joint) and self.scored == "restored_alone":
            raise ValueError("score joint blends all candidates at once: scored has no part in it, leave it out")
        if self.score == "skip" and self.prepared != "init":
            raise ValueError("score skip leaves attention out and has no operator: set prepared to init")
        if isinstance(self.score, Probe) and self.prepared != "init":
            raise ValueError("score probe trains its operators itself: set prepared to init")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Choice:
        scoring = ("score", "scored", "prepared", "rerank", "solver", "texts")
        asked = [key for key in scoring if key in self.model_fields_set]
        if self.layers is not None and asked:
            raise ValueError(f"layers is a choice that was made already: take out {' and '.join(asked)}, or layers")
        order = self.layers if isinstance(self.layers, tuple) else ()
        twice = sorted({layer for layer in order if order.count(layer) > 1})
        if twice:
            raise ValueError(f"layers names {twice} more than once: name each layer once")
        return self

    @model_validator(mode="after")
    def _solvable(self) -> Choice:
        if self.solver == "greedy":
            return self
        if self.rerank != "once":
            raise ValueError(f"solver exact looks at all layers at once and rerank is {self.rerank}: set it to once")
        if self.scored != "swapped_alone" or isinstance(self.score, Joint):
            raise ValueError(
                "solver exact adds up what layers cost alone: set scored to swapped_alone, and score to none of joint"
            )
        if self.until is None or (self.until.decode, self.until.layers) == (None, None):
            raise ValueError("solver exact needs an end to solve for: give until with decode, layers or both")
        if self.until.decode is not None and self.until.decode <= 1:
            raise ValueError(
                f"solver exact and until.decode {self.until.decode:g}, which the teacher itself has: give more than 1"
            )
        return self


class Gate(Model):
    """What becomes of a stage whose perplexity is more than `ratio` times the teacher's.

    It is trained on as many tokens again, up to `extend` times. If that is not enough, its layers are given back and
    stay attention (roll_back), the path ends with it (stop), or it goes on all the same (keep).
    """

    ratio: AtLeastOne
    extend: Annotated[int, Field(ge=0)] = 0
    otherwise: Literal["roll_back", "stop", "keep"] = "roll_back"
