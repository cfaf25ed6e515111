"""What an operator may inherit from the attention layer it replaces."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionStatistics:
    """What an attention layer does on real text.

    Attributes:
        profile: (heads, lags) mean of the logarithm of its weights by lag.
        input_mean, input_covariance: (D,) and (D, D) of its inputs.
    """

    profile: Tensor
    input_mean: Tensor
    input_covariance: Tensor


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Projections of one attention layer, in the convention of `nn.Linear`: weights are (out, in).

    Attributes:
        query, key, value: (D, D) projections into the heads; head i owns rows i D / heads onwards.
        output: (D, D) projection out of the concatenated heads.
        heads: number of heads.
        query_bias, key_bias, value_bias, output_bias: (D,), or None where the layer has none.
        statistics: what the attention does on real text, or None where nobody looked.
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
    statistics: AttentionStatistics | None = None

    def check(self, d_model: int) -> None:
        """Raise ValueError unless every weight is (d_model, d_model) and every bias (d_model,) or None."""
        for name in ("query", "key", "value", "output"):
            weight: Tensor = getattr(self, name)
            bias: Tensor | None = getattr(self, f"{name}_bias")
            _check_shape(f"{name} weight", tuple(weight.shape), (d_model, d_model))
            if bias is not None:
                _check_shape(f"{name} bias", tuple(bias.shape), (d_model,))

    def bias_of(self, name: str) -> Tensor:
        """The bias of `query`, `key`, `value` or `output`, zeros where it has none."""
        weight: Tensor = getattr(self, name)
        bias: Tensor | None = getattr(self, f"{name}_bias")
        return weight.new_zeros(weight.shape[0]) if bias is None else bias

    def products_of(self, head: int, heads: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], float]:
        """Query and key of the rows that head `head` of `heads` owns, weight and bias in float64, and what the
        attention multiplies their products by."""
        rows = self.query.shape[0] // heads
        mine = slice(head * rows, (head + 1) * rows)
        query, key = (
            (getattr(self, name)[mine].double(), self.bias_of(name)[mine].double()) for name in ("query", "key")
        )
        return query, key, float(self.query.shape[0] / self.heads) ** -0.5

    def seen(self) -> AttentionStatistics:
        """The statistics. Raises ValueError where nobody looked."""
        if self.statistics is None:
            raise ValueError(
                "init: transfer of this operator needs the attention's statistics on real text but got None: "
                "use init: random."
            )
        return self.statistics

    def profile_of(self, heads: int) -> Tensor:
        """The profile for another number of heads that owns the same rows, (heads, lags): cut or averaged.

        Raises ValueError without statistics, or where neither number of heads divides the other.
        """
        profile = self.seen().profile
        if heads % self.heads and self.heads % heads:
            raise ValueError(
                f"heads must divide the attention's {self.heads} or be a multiple of it but is {heads}: "
                "choose such a number, or use init: random."
            )
        if heads >= self.heads:
            return profile.repeat_interleave(heads // self.heads, dim=0)
        return profile.view(heads, -1, profile.shape[1]).mean(1)


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ValueError(
            f"{name} of the attention must have shape {wanted} to be transferred but has {shape}: "
            "expand grouped heads first, or use init: random."
        )
