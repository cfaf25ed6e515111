"""How multi-head operators go on from what they have seen, a class a mode.

    modal    a sum of products of keys and values a mode (`mixing.head_states`), of a constant size; exact for modal
             filters and features of queries and keys that are at hand
    direct   all keys and values; every step goes over them once; exact, the reference

Shapes: B batch, H heads, K key width, V value width, S modes, T positions.
"""

from operators.decoding.history import History
from operators.decoding.state import HyenaState, Kept, MemoryState


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


HEAD_STATES: dict[str, type[HyenaState]] = {state.mode: state for state in (HeadMemory, KeysAndValues)}
