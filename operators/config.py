"""What an operator can be asked to be. Frozen data, checked on construction, and free of torch.

`OperatorConfig` is the union that a study file is validated against, `FilterConfig` the one of its long filters;
`kind` tells their members apart. An object that exists is valid: every rule is checked in `__post_init__` and a
violation is a `ValueError` that names the field, the value, the rule and the remedy. Whether a configuration fits a
model (heads dividing its width) is known only when the operator is built, and is checked there.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

WIDEST_SQUARED = 16  # channels of a key, 153 features
_FORBID_UNKNOWN: dict[str, Any] = {"extra": "forbid"}
# For pydantic: left out of what identifies a stage where it is as before that field came.
_NEW: dict[str, Any] = {"exclude_if": lambda value: value in (None, 0, "none")}


def _require(condition: bool, name: str, value: object, rule: str, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule} but is {value!r}: {remedy}.")


@dataclass(frozen=True)
class ImplicitFilterConfig:
    """Implicit long filter h(t) = window(t) * (offset + MLP(features(t))), Poli et al. 2023, section 3.3.

    Attributes:
        kind: tells the members of `FilterConfig` apart; this one is meant where a study file names none.
        features: positional features of the MLP: time, and the real and imaginary parts of
            (features - 1) / 2 complex exponentials. Odd, at least 3.
        width: hidden width of the MLP.
        depth: hidden layers after the first; every hidden layer is followed by a sine.
        sine_frequency: factor inside the sines, 1 to 14. High values make rough filters and, since it acts in
            each layer, steep gradients: 1 is the reference code's default, 14 the
            paper's; at 4, Adam with rates up to 3e-3 is stable.
        train_frequency: whether the factor, one per hidden unit, is trained.
        window: "log_spaced": exp(-t / tau) with tau log-spaced over the channels from half a token to the
            longest sequence, each window summing to 1. "linear": the reference code's, decay rates linearly
            spaced, not normalised: with `offset` 1 it passes sums over long stretches, so prefer 0 there.
        positive: h(t) = exp(-t / tau + MLP(features(log(1 + t)))), above zero as an attention's weights are, with tau
            trained; with heads and init "transfer" it starts at the attention's mean weight by lag. Of the MLP the
            last layer alone is trained, for an exponential of a deep sine network diverges; `window`, `offset` and
            the other train_ options have no part in it.
        offset: 1 starts the filter at its window (the MLP's last layer starts small); 0 is the paper's.
        train_features: whether the positional features are trained too.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID_UNKNOWN

    kind: Literal["implicit"] = "implicit"
    features: int = 5
    width: int = 32
    depth: int = 2
    sine_frequency: float = 4.0
    train_frequency: bool = True
    window: Literal["log_spaced", "linear"] = "log_spaced"
    positive: bool = False
    offset: float = 1.0
    train_features: bool = False

    def __post_init__(self) -> None:
        _require(self.kind == "implicit", "kind", self.kind, "'implicit'", "use the configuration of that filter")
        odd = self.features >= 3 and self.features % 2 == 1
        _require(odd, "features", self.features, "odd and at least 3", "time and sine pairs, such as 5")
        _require(self.width >= 1, "width", self.width, "at least 1", "32 is a good start")
        _require(self.depth >= 0, "depth", self.depth, "at least 0", "2 is a good start")
        frequency = self.sine_frequency
        _require(1.0 <= frequency <= 14.0, "sine_frequency", frequency, "in 1 to 14", "4 is a good start")
        known = self.window in ("log_spaced", "linear")
        _require(known, "window", self.window, "'log_spaced' or 'linear'", "use one of the two")
        _require(math.isfinite(self.offset), "offset", self.offset, "finite", "use 1 (window at start) or 0")


@dataclass(frozen=True)
class ModalFilterConfig:
    """Sum of decaying exponentials, h(t) = Re sum_s residue_s exp(log_pole_s t): a state of `modes` numbers a channel
    decodes it exactly, however long the context (Massaroli et al. 2023, section 3).

    Attributes:
        kind: tells the members of `FilterConfig` apart.
        modes: exponentials of a filter, complex ones unless `positive`. At the start their decay times are log-spaced
            from half a token to the longest sequence.
        positive: real exponentials of positive weight, so that h is above zero and falls with the lag; with heads and
            init "transfer" it starts as near to the attention's mean weight by lag as such a filter can be.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID_UNKNOWN

    kind: Literal["modal"] = "modal"
    modes: int = 8
    positive: bool = False

    def __post_init__(self) -> None:
        _require(self.kind == "modal", "kind", self.kind, "'modal'", "use the configuration of that filter")
        _require(self.modes >= 1, "modes", self.modes, "at least 1", "8 is a good start")


@dataclass(frozen=True)
class FirFilterConfig:
    """Short filter: a trained weight for each of the first lags, zero beyond.

    Attributes:
        kind: tells the members of `FilterConfig` apart.
        taps: lags from 0 that have a weight, at most the longest sequence.
        positive: weights are exponentials of what is trained; with heads and init "transfer" they start at the
            attention's mean weight by lag.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID_UNKNOWN

    kind: Literal["fir"] = "fir"
    taps: int = 16
    positive: bool = False

    def __post_init__(self) -> None:
        _require(self.kind == "fir", "kind", self.kind, "'fir'", "use the configuration of that filter")
        _require(self.taps >= 1, "taps", self.taps, "at least 1", "16 is a good start")


NearNorm = Literal["none", "rms", "rms_all", "layer", "layer_all"]
FilterConfig = ImplicitFilterConfig | ModalFilterConfig | FirFilterConfig
_FILTER: dict[str, Any] = {"discriminator": "kind"}  # for pydantic: validate as the member that `kind` names


def _check_window(window: int, sinks: int, near_norm: str) -> None:
    _require(window >= 1, "window", window, "at least 1", "32 is a good start")
    _require(sinks >= 0, "sinks", sinks, "at least 0", "4 is a good start")
    norms = get_args(NearNorm)
    _require(near_norm in norms, "near_norm", near_norm, f"one of {', '.join(norms)}", "leave it to the swap")


def _check_groups(groups: int | None, heads: int | None) -> None:
    if groups is not None:
        fits = groups >= 1 and (heads or groups) % groups == 0
        _require(fits, "groups", groups, f"a divisor of the {heads} heads", "leave it to the swap")


@dataclass(frozen=True)
class HyenaConfig:
    """Hyena, channel-wise (Poli et al. 2023) or multi-head (Massaroli et al. 2023, section 4).

    Attributes:
        kind: tells the members of `OperatorConfig` apart.
        order: N of the channel-wise recurrence: N + 1 projections and N - 1 long convolutions.
        heads: None for the channel-wise operator; a number for the multi-head one, which has order 2 only.
        feature_map: how query and key of a head weigh a value: "identity" by q . k; "power" by
            (1 + q . k / degree)^degree, which nears the attention's exp(q . k); "hedgehog" by f(q) . f(k) with f(x) =
            softmax of [M x, -M x] and a trained M (Zhang et al. 2024). The last two are never negative.
        degree: of "power": 2, 4 or 8. With degree 2, a modal filter and a `key_dim` of at most 16 the features of the
            power are written out, so that long texts are mixed chunk by chunk and decoded from a constant state.
        key_dim: width of query and key of a head; None for the width of its values.
        normalise: divide by the sum of the weights, as softmax does. Wants a filter that is `positive` and a feature
            map that is never negative.
        key_gate: weigh every position by exp(w . x + c) too, per head: what all queries look at.
        window: positions, the present among them, that are weighed by softmax with a query and key of their own,
            rotated by position, as attention does; all others as the options above say, all divided by one sum. None
            for none. With init "transfer" these queries and keys are the attention's. Wants `normalise`.
        sinks: first positions of a text that are weighed so from wherever they are seen.
        near_norm: what those queries and keys go through, of each head or (`_all`) of all heads as one: "rms" divides
            by the root mean square, "layer" takes the mean away first. A swap sets it to what the attention does.
        groups: heads of near keys and of values, each shared by as many heads; None for a key and value of every head.
            Where it is None a swap sets it to what the attention has, which then needs no more rows. Wants `window`.
        tied: far positions are weighed by the near queries and keys too, before these are turned and less a trained
            centre of the keys, instead of by rows of their own: as many rows as an attention has. Wants `window`,
            feature_map "power", and neither `key_dim` nor `key_gate`.
        short_taps: length of the depthwise causal convolution after the projections.
        init: "transfer" starts from the attention that is replaced, "random" does not.
        filter: the long filters, one per channel and convolution, or one per head.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID_UNKNOWN

    kind: Literal["hyena"] = "hyena"
    order: int = 2
    heads: int | None = None
    feature_map: Literal["identity", "power", "hedgehog"] = "identity"
    degree: int = 4
    key_dim: int | None = None
    normalise: bool = False
    key_gate: bool = False
    window: int | None = field(default=None, metadata=_NEW)
    sinks: int = field(default=0, metadata=_NEW)
    near_norm: NearNorm = field(default="none", metadata=_NEW)
    groups: int | None = field(default=None, metadata=_NEW)
    tied: bool = field(default=False, metadata=_NEW)
    short_taps: int = 3
    init: Literal["transfer", "random"] = "transfer"
    filter: FilterConfig = field(default_factory=ImplicitFilterConfig, metadata=_FILTER)

    def __post_init__(self) -> None:
        _require(self.kind == "hyena", "kind", self.kind, "'hyena'", "use the configuration of that operator")
        _require(self.order >= 2, "order", self.order, "at least 2", "2 gates one long convolution")
        _require(self.short_taps >= 1, "short_taps", self.short_taps, "at least 1", "3 is usual")
        known = self.init in ("transfer", "random")
        _require(known, "init", self.init, "'transfer' or 'random'", "use one of the two")
        maps = ("identity", "power", "hedgehog")
        _require(self.feature_map in maps, "feature_map", self.feature_map, f"one of {', '.join(maps)}", "use one")
        _require(self.degree in (2, 4, 8), "degree", self.degree, "2, 4 or 8", "4 is a good start")
        if self.key_dim is not None:
            _require(self.key_dim >= 1, "key_dim", self.key_dim, "None or at least 1", "8 is a good start")
        if self.heads is not None:
            _require(self.heads >= 1, "heads", self.heads, "None or at least 1", "None means channel-wise")
            _require(self.order == 2, "order", self.order, "2 where heads is set", "or leave heads out")
        else:
            for name in ("feature_map", "key_dim", "normalise", "key_gate", "window"):
                default, value = HyenaConfig.__dataclass_fields__[name].default, getattr(self, name)
                _require(value == default, name, value, f"{default!r} without heads", "set heads")
        if self.normalise:
            signed = self.feature_map == "identity" or not self.filter.positive
            _require(
                not signed,
                "normalise",
                True,
                "false where weights may be negative",
                "use feature_map: power or hedgehog and filter: {positive: true}",
            )
        self._check_near()

    def _check_near(self) -> None:
        if self.window is None:
            _require(self.sinks == 0, "sinks", self.sinks, "0 without a window", "set window, such as 32")
            _require(self.near_norm == "none", "near_norm", self.near_norm, "'none' without a window", "leave it out")
            _require(not self.tied, "tied", self.tied, "false without a window", "set window, such as 32")
            _require(self.groups is None, "groups", self.groups, "None without a window", "set window, such as 32")
            return
        _check_window(self.window, self.sinks, self.near_norm)
        _check_groups(self.groups, self.heads)
        remedy = "use normalise: true, feature_map: power or hedgehog and filter: {positive: true}"
        _require(self.normalise, "window", self.window, "none where weights are not divided by their sum", remedy)
        if isinstance(self.filter, FirFilterConfig):
            fits = self.filter.taps > self.window
            _require(fits, "window", self.window, f"below the filter's {self.filter.taps} taps", "use kind: window")
        if self.tied:
            wide = self.key_dim is None and not self.key_gate
            rule, remedy = "false where far keys are of another width or gated", "leave out key_dim and key_gate"
            _require(wide, "tied", True, rule, remedy)
            power = self.feature_map == "power"
            _require(power, "tied", True, "false but for powers of products", "use feature_map: power")

    @property
    def needs_statistics(self) -> bool:
        """Whether `initialise` asks for what the attention does on real text, see `AttentionWeights`."""
        return self.heads is not None and self.init == "transfer" and (self.filter.positive or self.fits_products)

    @property
    def power(self) -> int | None:
        """The degree that products are raised to, None for none."""
        return self.degree if self.feature_map == "power" else None

    @property
    def squares(self) -> bool:
        """Whether features of the power are written out."""
        modal = isinstance(self.filter, ModalFilterConfig)
        return self.power == 2 and modal and self.key_dim is not None and self.key_dim <= WIDEST_SQUARED

    @property
    def fits_products(self) -> bool:
        """Whether queries and keys are fitted to the attention's products instead of copied."""
        return not self.tied and (self.feature_map == "power" or self.key_dim is not None or self.key_gate)


@dataclass(frozen=True)
class WindowConfig:
    """The control to a `window` in Hyena: the attention's own softmax over near positions and sinks, and nothing far.

    Attributes:
        kind: tells the members of `OperatorConfig` apart.
        window, sinks, near_norm, groups, short_taps, init: see `HyenaConfig`.
        heads: None for as many as the attention has, which a swap sets.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID_UNKNOWN

    kind: Literal["window"] = "window"
    window: int = 64
    sinks: int = 4
    heads: int | None = None
    near_norm: NearNorm = "none"
    groups: int | None = field(default=None, metadata=_NEW)
    short_taps: int = 1
    init: Literal["transfer", "random"] = "transfer"

    def __post_init__(self) -> None:
        _require(self.kind == "window", "kind", self.kind, "'window'", "use the configuration of that operator")
        _check_window(self.window, self.sinks, self.near_norm)
        if self.heads is not None:
            _require(self.heads >= 1, "heads", self.heads, "None or at least 1", "None means as the attention")
        _check_groups(self.groups, self.heads)
        _require(self.short_taps >= 1, "short_taps", self.short_taps, "at least 1", "1 is attention's")
        known = self.init in ("transfer", "random")
        _require(known, "init", self.init, "'transfer' or 'random'", "use one of the two")

    @property
    def needs_statistics(self) -> bool:
        """As `HyenaConfig.needs_statistics`: for the attention's rotation is seen in what it does."""
        return self.init == "transfer"


@dataclass(frozen=True)
class SkipConfig:
    """The control: an operator without parameters with zero output, so only the residual stream passes."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID_UNKNOWN

    kind: Literal["skip"] = "skip"

    def __post_init__(self) -> None:
        _require(self.kind == "skip", "kind", self.kind, "'skip'", "use the configuration of that operator")


OperatorConfig = HyenaConfig | WindowConfig | SkipConfig
