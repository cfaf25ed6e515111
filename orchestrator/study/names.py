"""Short names of operators and schedules, for people."""

from __future__ import annotations

from typing import Any

from operators.config import HyenaConfig, WindowConfig
from orchestrator.study.choosing import Choice, Joint, Kept, Local, Probe
from orchestrator.study.placing import PerLayer
from orchestrator.study.schema import Schedule


def operator_name(operator: Any) -> str:
    """A short name for people: `hyena-2` by order, `hyena-4h` by heads, `hyena-4h-power` with a feature map,
    `hyena-2-modal` with filters that are not implicit, `hyena-4h-power-w32` with a window, `window-64`, `skip`, and
    `hyena-2 + hyena-4h in 4,5` where layers have operators of their own; of candidates `hyena-2 or hyena-4h`."""
    if isinstance(operator, tuple):
        return " or ".join(map(operator_name, operator))
    if isinstance(operator, PerLayer):
        others: dict[str, list[str]] = {}
        for layer, other in sorted(operator.layers.items(), key=lambda item: int(item[0])):
            others.setdefault(operator_name(other), []).append(layer)
        told = [f"{name} in {','.join(layers)}" for name, layers in others.items()]
        return " + ".join([operator_name(operator.default), *told])
    if isinstance(operator, WindowConfig):
        return f"window-{operator.window}"
    if not isinstance(operator, HyenaConfig):
        return str(operator.kind)
    shape = f"{operator.order}" if operator.heads is None else f"{operator.heads}h"
    features = "" if operator.feature_map == "identity" else f"-{operator.feature_map}"
    kind = "" if operator.filter.kind == "implicit" else f"-{operator.filter.kind}"
    return f"hyena-{shape}{features}{kind}" + ("" if operator.window is None else f"-w{operator.window}")


def schedule_name(schedule: Schedule) -> str:
    """What a schedule swaps when: `bottom_up`, `by kl, until 4 layers`, `3|1,2`, with its gate and kept layers."""
    if schedule.choice is not None:
        told = [_choice_name(schedule.choice)]
    elif isinstance(schedule.layer_order, tuple):
        told = ["|".join(",".join(map(str, stage)) for stage in schedule.layer_order)]
    else:
        told = [schedule.layer_order]
    told += [f"{schedule.layers_per_stage} a stage"] if schedule.layers_per_stage > 1 else []
    told += [f"kept {','.join(map(str, schedule.keep))}"] if schedule.keep else []
    if schedule.gate is not None:
        extended = f" after {schedule.gate.extend} more" if schedule.gate.extend else ""
        told.append(f"gate {schedule.gate.ratio:g}{extended}, else {schedule.gate.otherwise.replace('_', ' ')}")
    return ", ".join(told)


def _choice_name(choice: Choice) -> str:
    match choice.score if choice.layers is None else choice.layers:
        case Kept(keep=keep):
            told = [f"all but {','.join(map(str, keep))}"]
        case tuple() as order:
            told = [f"by the list {','.join(map(str, order))}"]
        case Probe(probe=tokens):
            told = [f"by kl after {tokens} tokens"]
        case Joint(joint=tokens):
            told = [f"by joint scalars of {tokens} tokens"]
        case score:
            told = [f"by {score}"]
    told += ["restored alone"] if choice.scored == "restored_alone" else []
    told += [f"prepared by {choice.prepared.local} tokens"] if isinstance(choice.prepared, Local) else []
    told += [choice.rerank.replace("_", " ")] if choice.rerank != "once" else []
    told += ["solved exactly"] if choice.solver == "exact" else []
    told += [f"{choice.take} a stage"] if choice.take > 1 else []
    if choice.until is not None:
        ends = {"layers": "{:g} layers", "ratio": "ratio {:g}", "decode": "decode {:g}x"}
        asked = [(text, getattr(choice.until, name)) for name, text in ends.items()]
        told.append("until " + " or ".join(text.format(end) for text, end in asked if end is not None))
    return ", ".join(told)
