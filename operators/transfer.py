"""What an operator may inherit from the attention layer it replaces."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Projections of one attention layer, in the convention of `nn.Linear`: weights are (out, in).

    Attributes:
        query, key, value: (D, D) projections into the heads; head i owns rows i D / heads onwards.
        output: (D, D) projection out of the concatenated heads.
        heads: number of heads.
        query_bias, key_bias, value_bias, output_bias: (D,), or None where the layer has none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    heads: int
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    output_bias: Tensor | None = None

    def check(self, d_model: int) -> None:
        """Raise ValueError unless every weight is (d_model, d_model) and every bias (d_model,) or None."""
        for name in ("query", "key", "value", "output"):
            weight: Tensor = getattr(self, name)
            bias: Tensor | None = getattr(self, f"{name}_bias")
            _check_shape(f"{name} weight", tuple(weight.shape), (d_model, d_model))
            if bias is not None:
                _check_shape(f"{name} bias", tuple(bias.shape), (d_model,))


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ValueError(
            f"{name} of the attention must have shape {wanted} to be transferred but has {shape}: "
            "expand grouped heads first, or use init: random."
        )
