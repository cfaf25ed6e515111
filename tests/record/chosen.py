"""A home whose choices and gates are written by hand: four layers, known scores, no training and no Ray.

trial-00  by hits, every stage, until two layers: layer 2, then layer 0
trial-01  layers 0 and 1 at once, then 2, with a gate: 0 and 1 are trained on and given back
    trial-02  by joint scalars, until one layer: layer 3
trial-03  the stages of trial-01 the other way around: the last two are given back
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.record.home import Home
from orchestrator.run.growing import Growing
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ScoreSpec
from orchestrator.study.stages import Step
from tests.record.handmade import Hand, asked, quality, speed

SPACE = (
    "search.space=[{schedule: [{choice: {score: hits, texts: 64, rerank: every_stage, until: {layers: 2}}}, "
    "{layer_order: [[0, 1], [2]], gate: {ratio: 1.1, extend: 1}}, "
    "{choice: {score: {joint: 160}, texts: 64, until: {layers: 1}}}, "
    "{layer_order: [[2], [0, 1]], gate: {ratio: 1.1, extend: 1}}]}]"
)
FOUR = ("teacher.layers=4", "recipe.joint=[]", "controls={skip: false, scratch: none}")
HITS = {  # by what is swapped already: layer -> hit loss more than the teacher's, its error, order of the choice
    (): ({0: (0.02, 0.004), 1: (0.5, 0.1), 2: (0.01, 0.002), 3: (0.4, 0.05)}, [2, 0, 3, 1]),
    (2,): ({0: (0.03, 0.004), 1: (0.6, 0.1), 3: (0.7, 0.05)}, [0, 1, 3]),
}
GATES = {"0": 0.25, "1": 0.5, "2": 0.125, "3": 0.75}
RATIOS = {(2,): 1.02, (0, 2): 1.04, (0, 1): 1.3, (3,): 1.06, (0, 1, 2): 1.25}
SECONDS = 0.5


class Chosen(Hand):
    """The home; `grow` lets the next thing that its plan waits for be there."""

    def __init__(self, root: Path) -> None:
        self.asked = asked(root, SPACE, *FOUR)
        self.file = root / "handmade.yaml"
        self.home = Home(root / "home")
        self.store = Store(self.home.store)
        self.growing = Growing(self.asked.growing(self.store).planner, self.store)

    @property
    def plan(self) -> Plan:  # type: ignore[override]
        return self.growing.plan

    @property
    def speeds(self) -> dict[str, Any]:  # type: ignore[override]
        return self.growing.speeds

    def teach(self) -> None:
        """Let text and teacher be there."""
        self.write(self.plan.tokens, {"train_tokens": 12_345})
        self.student(self.plan.teacher, 1.0)

    def student(self, step: Step, ratio: float) -> None:
        """Let a stage be trained, evaluated and measured."""
        self.write(step.train, {"seconds": 4.0, "tokens": 160, "tokens_per_s": 40.0, "parameters": 5_000})
        self.write(step.evaluate, quality(ratio))
        self.write(self.speeds[step.train.key], speed(1.0 + len(step.swapped), 1.5))

    def everything(self) -> None:
        """Let all be there, as far as it is decided, again and again."""
        self.teach()
        for _ in range(9):
            self.grow()
        assert not self.plan.waits

    def grow(self) -> None:
        """Let all be there that is known now."""
        for trial in self.plan.trials:
            for decision in trial.path.decisions:
                self._decide(decision, trial.steps)
            for index, step in enumerate(trial.steps):
                more = 0.1 * sum(other.swapped == step.swapped for other in trial.steps[:index])
                self.student(step, RATIOS[step.swapped] - more)
        self.growing.grow()

    def _decide(self, decision: Any, steps: Any) -> None:
        swapped = next((step.swapped for step in steps if step.train.key == decision.spec.subject), ())
        if decision.spec.blend is not None:
            self.write(decision.needs[-1], {"gates": GATES, "tokens": 160}, seconds=SECONDS)
            scores = {layer: {"score": gate} for layer, gate in GATES.items()}
            self.write(decision.spec, {"order": [3, 1, 0, 2], "scores": scores}, seconds=SECONDS)
            return
        excess, order = HITS[swapped]
        for spec in decision.needs:
            layer = spec.layers[-1] if spec.layers else None
            more, error = (0.0, 0.0) if layer is None else excess[layer]
            assert isinstance(spec, ScoreSpec)
            found = {"tokens": 64, "excess_hit_loss": more, "excess_hit_loss_error": error}
            self.write(spec, found, seconds=SECONDS)
        told = {str(layer): {"score": 1.5 + more, "error": 0.2} for layer, (more, _) in excess.items()}
        tau = {"mean": 0.75, "low": 0.5, "high": 1.0}
        more_ = {"teacher": {"score": 1.5, "error": 0.25}, "tied": order[1:2], "tau": tau}
        self.write(decision.spec, {"order": order, "scores": told, **more_}, seconds=SECONDS)
