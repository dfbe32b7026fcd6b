from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from edgeprune.device.card import device
from edgeprune.device.cost import CostModel, interval_factors
from edgeprune.device.fit import (
    COLUMNS,
    KINDS,
    Prior,
    Sample,
    conformal,
    constants_of,
    design,
    features,
    fit,
    fit_profile,
    folds_of,
    rates,
    refine,
    shape_of,
)
from edgeprune.device.kernels import KernelsAt
from edgeprune.errors import DeviceError

SHAPE = {name: 10.0 if name.endswith("_us") else 0.2 for name in COLUMNS}
FACTS = {"runtime": "onnxruntime", "threads": 1, "precision": "fp32", "clock_mhz": 1000.0, "description": "made up"}
WORDS = {"source": "made up", "method": "made up", "held_out": "made up"}


def network(random: np.random.Generator, kinds: Sequence[str] = ("conv3x3", "conv1x1", "elementwise", "pool")) -> KernelsAt:
    sizes = random.lognormal(11, 1.5, size=(7, 1, len(kinds)))
    sizes[0] *= [30.0 * ("conv" in kind) for kind in kinds]
    channels, groups = np.full((1, len(kinds)), 32.0), np.zeros((1, len(kinds)))
    return KernelsAt(tuple(kinds), tuple(kinds), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], channels, groups)


def samples(count: int, noise: float = 0.03, *, seed: int = 0) -> list[Sample]:
    random = np.random.default_rng(seed)
    truth = shape_of(Prior(SHAPE, 0.0)) * random.uniform(0.5, 2, len(COLUMNS))
    made = [network(random) for _ in range(count)]
    return [
        Sample(f"n{i}", f"f{i // 2}", float(features(at, 1e5) @ truth / 1e6 * np.exp(noise * random.standard_normal())), at)
        for i, at in enumerate(made)
    ]


def test_the_fit_recovers_constants_and_leaves_unseen_columns_at_the_shape() -> None:
    random = np.random.default_rng(0)
    shape = shape_of(Prior(SHAPE, 0.0))
    seen = np.array([not any(kind in column for kind in ("depthwise", "grouped", "linear")) for column in COLUMNS])
    x = random.lognormal(sigma=1.5, size=(300, len(COLUMNS))) / shape * seen
    truth = shape * random.uniform(1, 3, len(COLUMNS))
    got = fit(x, x @ truth, shape, 1e-9)
    np.testing.assert_allclose(got[seen], truth[seen], rtol=1e-3)
    speed = 1 / np.median(x @ shape / (x @ truth))
    np.testing.assert_allclose(got[~seen], speed * shape[~seen], rtol=1e-6)


def test_features_times_constants_are_what_the_cost_model_predicts() -> None:
    profile = device("rpi4").constants
    at = network(np.random.default_rng(1), KINDS)
    total = float(CostModel(device("rpi4")).total_ms(at)[0])
    assert features(at, profile.cache_bytes) @ constants_of(profile) / 1e6 == pytest.approx(total)


def test_constants_survive_the_way_into_a_card_and_back() -> None:
    constants = shape_of(Prior(SHAPE, 0.0)) * np.arange(1, len(COLUMNS) + 1)
    made = device("rpi4").constants.model_copy(update={"kernels": rates(constants, {}), "network_us": float(constants[-1])})
    np.testing.assert_allclose(constants_of(made), constants, rtol=1e-3)


def test_families_stay_together() -> None:
    made = samples(40)
    folds = folds_of(made)
    assert set(folds) == set(range(5))
    assert all(len({f for s, f in zip(made, folds, strict=True) if s.family == family}) == 1 for family in {s.family for s in made})


def test_a_profile_knows_its_error_on_networks_it_has_not_seen() -> None:
    made = fit_profile(samples(120), Prior(SHAPE, 1e-4, 1e5), FACTS, WORDS)
    assert made.profile.fit.within_10 > 90
    assert made.profile.fit.mape == pytest.approx(2.5, abs=1.5)
    assert 80 <= made.profile.fit.coverage <= 100
    assert made.profile.kernels["conv3x3"].seen_share > 0
    assert made.profile.kernels["depthwise"].seen_share == 0
    fresh = samples(120)[0].at
    low, high = interval_factors(made.profile, fresh)
    assert (low[0], high[0]) == pytest.approx((made.profile.fit.low_factor, made.profile.fit.high_factor), rel=0.01)


def test_the_interval_holds_nine_of_ten_whatever_family_they_come_from() -> None:
    random, held = np.random.default_rng(0), []
    for _ in range(200):
        low, high = conformal(random.lognormal(sigma=0.1, size=110), [str(i) for i in range(110)])
        fresh = random.lognormal(sigma=0.1, size=200)
        held.append(np.mean((fresh >= low) & (fresh <= high)))
    assert 0.88 < np.mean(held) < 0.93
    crowd = np.concatenate([np.full(900, 1.0), np.linspace(0.5, 2, 19)])
    families = ["crowd"] * 900 + [str(i) for i in range(19)]
    assert conformal(crowd, families)[1] > 1.9


def test_anchors_adapt_a_profile_of_another_board() -> None:
    made = samples(60)
    profile = fit_profile(made, Prior(SHAPE, 1e-4, 1e5), FACTS, WORDS).profile
    elsewhere = [Sample(s.network, s.family, 3 * s.latency_ms, s.at) for s in samples(30, seed=0)]
    adapted, before, after = refine(profile, elsewhere[:3])
    assert np.abs(before).min() > 0.5
    assert np.abs(after).max() < 0.2
    x, y = design(elsewhere[3:], profile.cache_bytes)
    assert np.abs(x @ constants_of(adapted) / y - 1).mean() < 0.1
    assert "3 networks" in adapted.fit.method
    with pytest.raises(DeviceError, match="at least 3"):
        refine(profile, elsewhere[:2])


def test_a_prior_with_a_wrong_name_is_refused() -> None:
    with pytest.raises(DeviceError, match="mac_ns conv9x9"):
        shape_of(Prior({"mac_ns conv9x9": 1.0}, 0.1))
