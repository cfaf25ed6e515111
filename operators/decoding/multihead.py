"""How multi-head operators go on from what they have seen, a class a mode.

    modal    a sum of products of keys and values a mode (`mixing.head_states`), of a constant size; exact for modal
             filters and features of queries and keys that are at hand
    direct   all keys and values; every step goes over them once; exact, the reference

With a window there are queries and keys of near positions too, of which "direct" keeps all that were seen, and the
others the last ones and those of the first positions (`NearMemory`); a window alone goes on by "window".

Shapes: B batch, H heads, K key width, V value width, S modes, T positions; n new positions, W positions of a window.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from operators.decoding.history import History
from operators.decoding.state import HyenaState, Kept, MemoryState
from operators.mixing.near import Seen, at_first, leading


class KeysAndValues(HyenaState):
    """All of them: `keys` (B, H, K, T) after the feature map, `values` (B, H, V, T) weighed by the gate."""

    mode = "direct"

    def __init__(self, batch: int, max_length: int, croppable: bool = True) -> None:
        super().__init__(batch, max_length, croppable)
        self.keys, self.values = History(max_length), History(max_length)

    def _select(self, kept: Kept) -> None:
        super()._select(kept)
        for history in (self.keys, self.values):
            history.select(kept, self.length)


class HeadMemory(MemoryState):
    """One memory, (B, H, S, K, V), which follows `head_recurrence` of the filters."""

    mode = "modal"


class NearHistory(KeysAndValues):
    """All keys and values, near ones too: `near_keys` (B, H, K, T), and `near_values` (B, H, V, T) as they are."""

    def __init__(self, batch: int, max_length: int, croppable: bool = True) -> None:
        super().__init__(batch, max_length, croppable)
        self.near_keys, self.near_values = History(max_length), History(max_length)
        self.padding_B: Tensor | None = None

    def see(self, k_BHKn: Tensor, v_BHVn: Tensor, mask_Bn: Tensor | None, sinks: int) -> Seen:
        """Take in new positions; returns what their queries may look at."""
        if mask_Bn is not None:
            padding_B = mask_Bn.new_zeros(self.batch, dtype=torch.long) if self.padding_B is None else self.padding_B
            self.padding_B = _padding(padding_B, mask_Bn, self.length)
        k_BHKT, v_BHVT = self.near_keys.append(self.length, k_BHKn), self.near_values.append(self.length, v_BHVn)
        sink_k, sink_v = (at_first(x, sinks, self.padding_B) for x in (k_BHKT, v_BHVT))
        return Seen(k_BHKT, v_BHVT, sink_k, sink_v, self.padding_B, k_BHKT.shape[-1])

    def _crop(self, length: int) -> None:
        super()._crop(length)
        self.padding_B = None if self.padding_B is None or length == 0 else self.padding_B.clamp_max(length)

    def _select(self, kept: Kept) -> None:
        super()._select(kept)
        for history in (self.near_keys, self.near_values):
            history.select(kept, self.length)
        self.padding_B = None if self.padding_B is None else kept(self.padding_B)


class WindowMemory(MemoryState):
    """The padding before each text (B,), keys and values of the last W positions, and those of the sinks."""

    mode = "window"
    PARTS = 5
    padded = False  # whether any mask was given

    def see(self, k_BHKn: Tensor, v_BHVn: Tensor, mask_Bn: Tensor | None, window: int, sinks: int) -> Seen:
        """Take in new positions; returns what their queries may look at."""
        new = k_BHKn.shape[-1]
        if not self.memory:
            kinds = [x.new_zeros(*x.shape[:3], size) for size in (window, sinks) for x in (k_BHKn, v_BHVn)]
            self.memory = [torch.zeros(self.batch, dtype=torch.long, device=k_BHKn.device), *kinds]
        padding_B, *lasts = self.memory[:3]
        if mask_Bn is not None:
            self.padded, padding_B = True, _padding(padding_B, mask_Bn, self.length)
        both = [torch.cat([last, x], dim=-1) for last, x in zip(lasts, (k_BHKn, v_BHVn), strict=True)]
        place_BS = padding_B[:, None] + torch.arange(sinks, device=padding_B.device) - self.length
        there_BS = (place_BS >= 0) & (place_BS < new)
        firsts = [
            torch.where(
                there_BS[:, None, None],
                x.gather(-1, place_BS.clamp(0, new - 1)[:, None, None].expand(-1, *x.shape[1:3], -1)),
                first,
            )
            for first, x in zip(self.memory[3:5], (k_BHKn, v_BHVn), strict=True)
        ]
        self.memory[:5] = [padding_B, *(x[..., new:].clone() for x in both), *firsts]
        told_B = padding_B if self.padded else None
        return Seen(both[0], both[1], firsts[0], firsts[1], told_B, self.length + new)


class NearMemory(WindowMemory):
    """The same, and keys and values of the last W positions as the far part has them, which come to its memory when
    they leave the window."""

    mode = "modal"

    def go_on(
        self, parts: list[Tensor], window: int, first: Callable[[], Tensor], mix: Callable[..., tuple[Tensor, Tensor]]
    ) -> Tensor:
        """What the new queries gather of what left the window; `parts` are queries, keys and values, `first` makes the
        memory of nothing, and `mix` is `head_states.step` or `extend` without the filters."""
        q_BHKn, *new = parts
        if len(self.memory) == self.PARTS:
            self.memory += [*(x.new_zeros(*x.shape[:3], window) for x in new), first()]
        both = [torch.cat([last, x], dim=-1) for last, x in zip(self.memory[5:7], new, strict=True)]
        count = q_BHKn.shape[-1]
        y_BHVn, far = mix(q_BHKn.to(both[0].dtype), *(x[..., :count] for x in both), self.memory[7])
        self.memory[5:] = [*(x[..., count:].clone() for x in both), far]
        return y_BHVn

    def leave(self, parts: list[Tensor], window: int, far: Tensor) -> None:
        """Begin with keys and values of the last positions, at most the window, and the memory of those before."""
        lasts = [torch.nn.functional.pad(part, (window - part.shape[-1], 0)) for part in parts]
        self.memory[5:] = [*lasts, far]


def _padding(padding_B: Tensor, mask_Bn: Tensor, start: int) -> Tensor:
    """Positions before each text, after a mask of those from `start` on."""
    return torch.where(padding_B == start, start + leading(mask_Bn), padding_B)


HEAD_STATES: dict[str, type[HyenaState]] = {state.mode: state for state in (HeadMemory, KeysAndValues)}
NEAR_STATES: dict[str, type[HyenaState]] = {state.mode: state for state in (NearMemory, NearHistory)}
WINDOW_STATES: dict[str, type[HyenaState]] = {WindowMemory.mode: WindowMemory}
