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
        profile: (heads, lags) mean of the logarithm of the attention's weights by lag, over positions of real text,
            or None where nobody looked.
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
    profile: Tensor | None = None

    def check(self, d_model: int) -> None:
        """Raise ValueError unless every weight is (d_model, d_model) and every bias (d_model,) or None."""
        for name in ("query", "key", "value", "output"):
            weight: Tensor = getattr(self, name)
            bias: Tensor | None = getattr(self, f"{name}_bias")
            _check_shape(f"{name} weight", tuple(weight.shape), (d_model, d_model))
            if bias is not None:
                _check_shape(f"{name} bias", tuple(bias.shape), (d_model,))

    def profile_of(self, heads: int) -> Tensor:
        """The profile for another number of heads that owns the same rows, (heads, lags): cut or averaged.

        Raises ValueError without a profile, or where neither number of heads divides the other.
        """
        if self.profile is None:
            raise ValueError("init: transfer of a positive filter needs the attention's profile by lag but got None.")
        if heads % self.heads and self.heads % heads:
            raise ValueError(
                f"heads must divide the attention's {self.heads} or be a multiple of it but is {heads}: "
                "choose such a number, or use init: random."
            )
        if heads >= self.heads:
            return self.profile.repeat_interleave(heads // self.heads, dim=0)
        return self.profile.view(heads, -1, self.profile.shape[1]).mean(1)


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ValueError(
            f"{name} of the attention must have shape {wanted} to be transferred but has {shape}: "
            "expand grouped heads first, or use init: random."
        )
