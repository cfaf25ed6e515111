"""Configurations: defaults are valid, every rule has an error that names field, value and remedy."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from operators.config import (
    FirFilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModalFilterConfig,
    SkipConfig,
    WindowConfig,
)

ROOT = Path(__file__).parents[2]
FILTERS = [ImplicitFilterConfig(), ModalFilterConfig(), FirFilterConfig()]


@pytest.mark.parametrize("config", [*FILTERS, HyenaConfig(), HyenaConfig(heads=4), WindowConfig(), SkipConfig()])
def test_configurations_are_frozen_and_forbid_unknown_keys(config: Any) -> None:
    assert config.__pydantic_config__ == {"extra": "forbid"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kind = "other"


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ImplicitFilterConfig, "features", 4),
        (ImplicitFilterConfig, "features", 1),
        (ImplicitFilterConfig, "width", 0),
        (ImplicitFilterConfig, "depth", -1),
        (ImplicitFilterConfig, "sine_frequency", 0.5),
        (ImplicitFilterConfig, "sine_frequency", 15.0),
        (ImplicitFilterConfig, "sine_frequency", float("nan")),
        (ImplicitFilterConfig, "window", "square"),
        (ImplicitFilterConfig, "offset", float("inf")),
        (ImplicitFilterConfig, "kind", "modal"),
        (ModalFilterConfig, "kind", "implicit"),
        (ModalFilterConfig, "modes", 0),
        (FirFilterConfig, "kind", "modal"),
        (FirFilterConfig, "taps", 0),
        (HyenaConfig, "kind", "skip"),
        (HyenaConfig, "order", 1),
        (HyenaConfig, "heads", 0),
        (HyenaConfig, "feature_map", "cube"),
        (HyenaConfig, "degree", 3),
        (HyenaConfig, "key_dim", 0),
        (HyenaConfig, "short_taps", 0),
        (HyenaConfig, "init", "copy"),
        (HyenaConfig, "sinks", 4),
        (HyenaConfig, "near_norm", "rms"),
        (HyenaConfig, "tied", True),
        (WindowConfig, "kind", "hyena"),
        (WindowConfig, "window", 0),
        (WindowConfig, "sinks", -1),
        (WindowConfig, "heads", 0),
        (WindowConfig, "near_norm", "l2"),
        (WindowConfig, "short_taps", 0),
        (WindowConfig, "init", "copy"),
        (SkipConfig, "kind", "hyena"),
    ],
)
def test_violations_name_field_value_and_remedy(kind: type, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be .+ but is .*: .+\.$") as caught:
        kind(**{field: value})
    assert repr(value) in str(caught.value)


def test_heads_need_order_two() -> None:
    with pytest.raises(ValueError, match=r"^order must be 2 where heads is set but is 3: .*heads"):
        HyenaConfig(order=3, heads=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("feature_map", "power"), ("key_dim", 8), ("normalise", True), ("key_gate", True), ("window", 8)],
)
def test_what_heads_have_needs_heads(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .* without heads but is .*: set heads\.$"):
        HyenaConfig(**{name: value})


@pytest.mark.parametrize(
    "signed",
    [
        {"filter": ImplicitFilterConfig(positive=True)},
        {"feature_map": "power"},
        {"feature_map": "hedgehog"},
        {"feature_map": "power", "filter": ModalFilterConfig()},
        {"feature_map": "power", "filter": FirFilterConfig()},
    ],
)
def test_a_sum_of_weights_that_may_cancel_is_not_divided_by(signed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^normalise must be false where weights may be negative but is True: use fe"):
        HyenaConfig(heads=2, normalise=True, **signed)


POSITIVE = ImplicitFilterConfig(positive=True)
DIVIDED: dict[str, Any] = {"heads": 2, "feature_map": "power", "normalise": True, "filter": POSITIVE}


def test_a_window_wants_weights_that_are_divided_by_their_sum() -> None:
    with pytest.raises(
        ValueError, match=r"^window must be none where weights are not divided by their sum but is 8: use n"
    ):
        HyenaConfig(heads=2, window=8)
    with pytest.raises(ValueError, match=r"^window must be at least 1 but is 0: "):
        HyenaConfig(window=0, **DIVIDED)
    with pytest.raises(ValueError, match=r"^sinks must be at least 0 but is -1: "):
        HyenaConfig(window=8, sinks=-1, **DIVIDED)
    short = {**DIVIDED, "filter": FirFilterConfig(taps=8, positive=True)}
    with pytest.raises(ValueError, match=r"^window must be below the filter's 8 taps but is 8: use kind: window\.$"):
        HyenaConfig(window=8, **short)
    for unlike in ({"key_dim": 4}, {"key_gate": True}, {"feature_map": "hedgehog"}):
        remedy = "use feature_map: power" if "feature_map" in unlike else "leave out key_dim and key_gate"
        with pytest.raises(ValueError, match=rf"^tied must be false .* but is True: {remedy}\.$"):
            HyenaConfig(window=8, tied=True, **(DIVIDED | unlike))
    assert HyenaConfig(window=7, **short).needs_statistics and WindowConfig().needs_statistics
    assert not WindowConfig(init="random").needs_statistics


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, False),
        ({"heads": 2}, False),
        ({"heads": 2, "feature_map": "hedgehog"}, False),
        ({"heads": 2, "feature_map": "power"}, True),
        ({"heads": 2, "key_dim": 4}, True),
        ({"heads": 2, "key_gate": True}, True),
        ({"heads": 2, "filter": ImplicitFilterConfig(positive=True)}, True),
        ({"heads": 2, "filter": ModalFilterConfig(positive=True)}, True),
        ({"heads": 2, "filter": FirFilterConfig()}, False),
        ({"heads": 2, "key_gate": True, "init": "random"}, False),
    ],
)
def test_statistics_are_asked_for_where_they_matter(options: dict[str, Any], needed: bool) -> None:
    assert HyenaConfig(**options).needs_statistics is needed


@pytest.mark.parametrize("module", ["operators", "operators.config"])
def test_configurations_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
