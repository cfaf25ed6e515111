"""What an operator may inherit from the attention layer it replaces.

Shapes: D model width, H heads, K width of a head's query and key, V of its value. Grouped heads are expanded: key and
value have as many as the query.
"""

from dataclasses import dataclass

from torch import Tensor

from operators.transfer.rotation import Rotation

Affine = tuple[Tensor, Tensor]  # weight (rows, D), bias (rows,)


@dataclass(frozen=True, eq=False)
class AttentionStatistics:
    """What an attention layer does on real text.

    Attributes:
        profile: (heads, lags) mean of the logarithm of its weights by lag.
        input_mean, input_covariance: (D,) and (D, D) of its inputs.
        examples: (B, L, D) inputs of some whole texts, or None where they were not asked for.
        rotation: what it does to queries and keys by position; None where that was not asked for.
    """

    profile: Tensor
    input_mean: Tensor
    input_covariance: Tensor
    examples: Tensor | None = None
    rotation: Rotation | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Their mean and covariance."""
        return self.input_mean, self.input_covariance


@dataclass(frozen=True, eq=False)
class QueryKeyNorm:
    """What an attention does to its queries, or to its keys, before it multiplies them.

    Attributes:
        weight: (K,) where every head is normed alike, (H, K) where each has its own weights, (H K,) where all heads are
            normed as one.
        bias: like `weight`, or None.
        centred: whether the mean is taken away first, as a layer norm does; else the root mean square alone is 1.
    """

    weight: Tensor
    bias: Tensor | None = None
    centred: bool = False


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Projections of one attention layer, in the convention of `nn.Linear`: weights are (out, in).

    Attributes:
        query, key: (H K, D) projections into the heads; head i owns rows i K onwards.
        value: (H V, D).
        output: (D, H V) projection out of the concatenated heads.
        heads: H.
        query_bias, key_bias, value_bias, output_bias: as many as rows, or None where the layer has none.
        statistics: what the attention does on real text, or None where nobody looked.
        scale: what products of query and key are multiplied by; None for K^-1/2.
        query_norm, key_norm: None where there is none.
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
    scale: float | None = None
    query_norm: QueryKeyNorm | None = None
    key_norm: QueryKeyNorm | None = None

    @property
    def key_width(self) -> int:
        """K."""
        return self.query.shape[0] // self.heads

    @property
    def groups(self) -> int:
        """How many heads of key and value there are where those are counted once that are the same."""
        parts = [self.key, self.value, self.bias_of("key"), self.bias_of("value")]
        by_head = [part.unflatten(0, (self.heads, -1)) for part in parts]
        for groups in range(1, self.heads):
            if self.heads % groups == 0 and all(_same(part.unflatten(0, (groups, -1))) for part in by_head):
                return groups
        return self.heads

    def check(self, d_model: int, inner: int) -> None:
        """Raise ValueError unless values have `inner` rows and all weights and biases fit each other and `d_model`."""
        products = (self.query.shape[0], d_model)
        wanted = {"value": (inner, d_model), "output": (d_model, inner), "query": products, "key": products}
        for name, shape in wanted.items():
            weight: Tensor = getattr(self, name)
            bias: Tensor | None = getattr(self, f"{name}_bias")
            _check_shape(f"{name} weight", tuple(weight.shape), shape)
            if bias is not None:
                _check_shape(f"{name} bias", tuple(bias.shape), shape[:1])

    def bias_of(self, name: str) -> Tensor:
        """The bias of `query`, `key`, `value` or `output`, zeros where it has none."""
        weight: Tensor = getattr(self, name)
        bias: Tensor | None = getattr(self, f"{name}_bias")
        return weight.new_zeros(weight.shape[0]) if bias is None else bias

    def products(self) -> tuple[Affine, Affine]:
        """Query and key of all heads as affine maps of the input whose products, times K^-1/2, the attention weighs by.

        A scale of the attention's own is taken into the query. A norm becomes what it is on the mean: rows are divided
        by the root mean square that they have on the inputs seen, or on inputs of unit variance where nobody looked.
        """
        query, key = (
            (getattr(self, name), self.bias_of(name)) if norm is None else self._normed(name, norm)
            for name, norm in (("query", self.query_norm), ("key", self.key_norm))
        )
        if self.scale is not None:
            factor = self.scale * float(self.key_width) ** 0.5
            query = (query[0] * factor, query[1] * factor)
        return query, key

    def _normed(self, name: str, norm: QueryKeyNorm) -> Affine:
        weight_RD, bias_R = getattr(self, name).double(), self.bias_of(name).double()
        groups = 1 if norm.weight.shape == (len(weight_RD),) else self.heads
        weight, bias = weight_RD.unflatten(0, (groups, -1)), bias_R.unflatten(0, (groups, -1))
        if norm.centred:
            weight, bias = weight - weight.mean(1, keepdim=True), bias - bias.mean(1, keepdim=True)
        if self.statistics is None:
            square = (weight * weight).sum(2) + bias * bias
        else:
            mean_D, covariance_DD = (part.double() for part in self.statistics.inputs)
            square = (weight @ covariance_DD * weight).sum(2) + (weight @ mean_D + bias) ** 2
        factor = norm.weight.double() / square.mean(1, keepdim=True).sqrt()
        shift = 0.0 if norm.bias is None else norm.bias.double().expand_as(factor)
        normed = (factor[..., None] * weight).flatten(0, 1), (factor * bias + shift).flatten()
        return normed[0].to(self.query.dtype), normed[1].to(self.query.dtype)

    def seen(self) -> AttentionStatistics:
        """The statistics. Raises ValueError where nobody looked."""
        if self.statistics is None:
            raise ValueError(
                "init: transfer of this operator needs the attention's statistics on real text but got None: "
                "use init: random."
            )
        return self.statistics

    def seen_near(self) -> tuple[Tensor, Rotation]:
        """Examples and rotation. Raises ValueError where nobody looked."""
        seen = self.seen()
        if seen.examples is None or seen.rotation is None:
            raise ValueError(
                "init: transfer of a window needs the attention's inputs and rotation on real text but got None: "
                "use init: random."
            )
        return seen.examples, seen.rotation

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


def _same(parts: Tensor) -> bool:
    return bool((parts == parts[:, :1]).all())


def first_of_groups(rows: Affine, heads: int, groups: int) -> Affine:
    """Rows that the heads of each group have in common. ValueError where they have not."""
    grouped = [part.unflatten(0, (groups, heads // groups, -1)) for part in rows]
    if not all(_same(part) for part in grouped):
        raise ValueError(
            f"groups must be heads of key and value that the attention has but is {groups}, and its {heads} heads do "
            "not share them so: leave it to the swap."
        )
    weight, bias = (part[:, 0].flatten(0, 1) for part in grouped)
    return weight, bias


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ValueError(
            f"{name} of the attention must have shape {wanted} to be transferred but has {shape}: "
            "expand grouped heads first, or use init: random."
        )
