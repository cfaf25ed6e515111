"""The rows that keep a study honest: attention left out, and operators trained from random weights.

Pure functions. Invariant: a control is a stage like any other, so trials and studies share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from operators.config import SkipConfig
from orchestrator.study.names import operator_name
from orchestrator.study.placing import mapped
from orchestrator.study.schema import Study
from orchestrator.study.sources import Resolved
from orchestrator.study.spec import DistilSpec, ImportSpec, ScratchSpec
from orchestrator.study.stages import Roots, Step, alone, drawn, evaluation_of, probes_of, text_windows, whole
from orchestrator.study.trial import Trial


def controls_of(
    study: Study, resolved: Resolved, roots: Roots, trials: Sequence[Trial], complete: bool
) -> Iterator[tuple[str, Step]]:
    """The controls that a study asks for, by name, of the trials that it has; of a search that is not `complete`, none
    that hang on the longest path."""
    tokens, teacher, optimizer = roots.tokens, roots.teacher, study.recipe.optimizer.canonical
    if study.controls.scratch != "none" and complete:
        names: set[str] = set()
        longest: dict[Any, Step] = {}  # by the operator of the study
        for trial in trials:
            operator, last = trial.study.operator, trial.end
            if last is None or trial.open:
                continue
            if study.controls.scratch == "own" and operator != study.operator:
                continue
            if not isinstance(operator, SkipConfig):
                bare = _drawn(operator)
                if bare not in longest or longest[bare].tokens < last.tokens:
                    longest[bare] = last
        may_be_longer = [trial for trial in trials if trial.open]
        for bare, last in longest.items():
            alike = [trial.path for trial in may_be_longer if _drawn(trial.study.operator) == bare]
            if any(path.most > last.tokens for path in alike):
                continue  # until that is known
            operator = mapped(last.operator, drawn)
            spec = ScratchSpec(
                tokens=tokens.key,
                teacher=teacher.key if isinstance(teacher, ImportSpec) else None,
                architecture=resolved.architecture,
                operator=operator,
                layers=last.swapped,
                token_budget=last.tokens,
                batch_size=study.recipe.batch_size,
                sequence_length=study.data.sequence_length,
                text_windows=text_windows(study),
                optimizer=optimizer.model_copy(update={"rest_scale": 1.0}),
                numerics=whole(study.numerics),
                processor=roots.device,
                checkpoint_activations=study.recipe.checkpoint_activations,
                seed=study.seed,
            )
            name = f"scratch {operator_name(operator)}"
            if name in names:
                name += f" {spec.key[:6]}"
            names.add(name)
            yield name, Step(spec, evaluation_of(study, roots, spec.key), last.swapped, last.tokens, placed=operator)
    if study.controls.skip:
        for skipped in [*((layer,) for layer in resolved.sites), resolved.sites]:
            name = f"skip {skipped[0]}" if len(skipped) == 1 else "skip all"
            skip = DistilSpec(
                tokens=tokens.key, teacher=teacher.key, parent=teacher.key, layers=skipped, new_layers=skipped,
                operator=SkipConfig(), phases=(), batch_size=1, sequence_length=study.data.sequence_length,
                first_sequence=0, freeze=(), optimizer=optimizer, numerics=alone(study.numerics),
                processor=roots.device, seed=0,
            )  # fmt: skip
            probes = probes_of(study, roots, skip.key) if skipped == resolved.sites else None
            yield name, Step(skip, evaluation_of(study, roots, skip.key), skipped, 0, probes=probes)


def _drawn(operator: Any) -> tuple[Any, ...]:
    """A study's operator, or its candidates, from random weights."""
    return tuple(mapped(each, drawn) for each in (operator if isinstance(operator, tuple) else (operator,)))
