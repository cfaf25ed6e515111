"""How likely a model and its teacher find every token of a text: the table that measurements of quality are made of.

The teacher's logits are made of its last hidden states again, chunk by chunk; kept, they would be V / D times as large.

Shapes: B windows, L positions, P of them, N = B (L - 1) predicted positions, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.distill.training.head import final_hidden, wide_heads
from orchestrator.distill.training.loop import autocast
from orchestrator.distill.training.losses import chunk_size
from orchestrator.study.recipe import Numerics

COLUMNS = ("nll", "teacher_nll", "right", "teacher_right", "same", "kl")  # a number for every predicted position


@torch.no_grad()
def hidden_states(model: Any, windows_BL: Tensor, batch: int, numerics: Numerics, device: str) -> Tensor:
    """The last hidden states of a model, (B, L, D), `batch` windows at a time; on the CPU."""
    hidden = []
    for ids_BL in windows_BL.split(batch):
        with autocast(numerics, device):
            hidden.append(final_hidden(model, ids_BL.to(device)).cpu())
    return torch.cat(hidden)


@torch.no_grad()
def token_table(
    teacher: Any, subject: Any, hidden_BLD: Tensor, windows_BL: Tensor, batch: int, numerics: Numerics, device: str
) -> dict[str, Tensor]:
    """By `COLUMNS` a number for every predicted position, (N,) float64, window by window; on the CPU.

    `nll` and `teacher_nll` are nats lost on the token, `right`, `teacher_right` and `same` are 1 where the top-1 is the
    token or that of the other, `kl` is the divergence (teacher || subject) in nats.

    Args:
        hidden_BLD: the teacher's last hidden states of the windows.
        batch: windows that the subject reads at a time.
    """
    count = windows_BL[:, 1:].numel()
    # Made before the logits: small results kept between them would split the memory that the next ones need.
    table = {name: torch.empty(count, dtype=torch.float64, device=device) for name in COLUMNS}
    heads = wide_heads(subject, teacher)
    size, done = chunk_size(heads[0], torch.device(device)), 0
    batches = (rows.split(batch) for rows in (windows_BL, hidden_BLD))
    for ids_BL, wanted_BLD in zip(*batches, strict=True):
        ids_BL = ids_BL.to(device)
        with autocast(numerics, device):
            own_BLD = final_hidden(subject, ids_BL)
        for ids_L, own_LD, wanted_LD in zip(ids_BL, own_BLD, wanted_BLD.to(device), strict=True):
            rows = (own_LD[:-1].float(), wanted_LD[:-1].float(), ids_L[1:])
            for own_PD, wanted_PD, target_P in zip(*(row.split(size) for row in rows), strict=True):
                columns = {name: column[done : done + len(target_P)] for name, column in table.items()}
                _compare(columns, heads[0](own_PD), heads[1](wanted_PD), target_P)
                done += len(target_P)
    return {name: column.cpu() for name, column in table.items()}


def _compare(columns: dict[str, Tensor], own_PV: Tensor, wanted_PV: Tensor, target_P: Tensor) -> None:
    """Fill the columns (P,) of some positions."""
    own_PV, wanted_PV = (F.log_softmax(logits.float(), dim=-1) for logits in (own_PV, wanted_PV))
    own_top, wanted_top = own_PV.argmax(-1), wanted_PV.argmax(-1)
    columns["nll"].copy_(-own_PV.gather(1, target_P[:, None])[:, 0])
    columns["teacher_nll"].copy_(-wanted_PV.gather(1, target_P[:, None])[:, 0])
    columns["right"].copy_(own_top == target_P)
    columns["teacher_right"].copy_(wanted_top == target_P)
    columns["same"].copy_(own_top == wanted_top)
    apart_PV = torch.sub(wanted_PV, own_PV, out=own_PV)  # in the place of what is not needed any more
    columns["kl"].copy_(wanted_PV.exp_().mul_(apart_PV).sum(-1))
