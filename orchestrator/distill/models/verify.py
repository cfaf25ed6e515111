"""Whether the attention of a model was read right, seen in what it does to the first token of a text.

The first token looks at itself only. So the attention's output there is its value through the output map, by whatever
rotation, mask or scale, with the gate and the norm of values at that very input. A class whose rows lie in another
order, or that does something more, shows here and not as a student that trains badly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.transfer.attention import AttentionStatistics
from orchestrator.distill.models.reading import read
from orchestrator.distill.models.sites import REMEDY, Replacement, Site, call_of, sites

FAR = 0.02  # of the output's size, which bfloat16 keeps within
CLIPS = ("clip_qkv",)


@torch.no_grad()
def check_reading(model: Any) -> None:
    """Compare what was read of every attention of a model in evaluation mode with what it does.

    Left out are those with sinks, which take weight from the first token too, those that clip their projections, and
    what is swapped already, in a teacher that is a student.
    Raises ValueError where they differ.
    """
    there = {layer: site for layer, site in sites(model).items() if _comparable(site.attention)}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    handles = [site.attention.register_forward_hook(_look(site, found), with_kwargs=True) for site in there.values()]
    try:
        model(input_ids=torch.arange(1, 5, device=model.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer, (x_D, y_D) in found.items():
        attention, family = there[layer].attention, there[layer].family
        here = AttentionStatistics(x_D.new_zeros(0, 0), x_D, x_D.new_zeros(len(x_D), len(x_D)))
        of = read(attention, family, here)
        wanted_D = F.linear(F.linear(x_D, of.value, of.value_bias), of.output, of.output_bias)
        off = float((wanted_D - y_D).norm() / y_D.norm())
        if off > FAR:
            raise ValueError(
                f"layer {layer}: what was read of {type(attention).__name__} gives outputs {off:.2g} off its own: "
                f"{REMEDY}"
            )


def _comparable(attention: Any) -> bool:
    config = getattr(attention, "config", None)
    clipped = any(getattr(where, name, None) is not None for where in (attention, config) for name in CLIPS)
    readable = isinstance(attention, nn.Module) and not isinstance(attention, Replacement)
    return readable and getattr(attention, "sinks", None) is None and not clipped


def _look(site: Site, found: dict[int, tuple[Tensor, Tensor]]) -> Callable[..., None]:
    call = call_of(site)

    def look(_: nn.Module, args: Any, kwargs: Any, answer: Any) -> None:
        given = call.by_name(args, kwargs)
        x_BLD, y_BLD = given["hidden_states"], site.family.mixed(answer, given)
        found[site.layer] = x_BLD[0, 0].float(), y_BLD[0, 0].float()

    return look
