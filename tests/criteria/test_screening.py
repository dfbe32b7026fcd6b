from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from edgeprune import criteria
from edgeprune.criteria.screening import ClassMoments
from edgeprune.errors import DataError, UsageError
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.networks import build, images, traced

RNG = np.random.default_rng(0)


def moments(z: Any, y: Any, *splits: int) -> ClassMoments:
    found = ClassMoments()
    for part in np.split(np.arange(len(y)), splits):
        if len(part):
            found.add(torch.as_tensor(z[part]), torch.as_tensor(y[part]))
    return found


def sample(n: int = 60, m: int = 5, k: int = 4, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(k), np.arange(k), rng.integers(0, k, n - 2 * k)])
    return rng.normal(size=(n, m)) + rng.normal(size=(k, m))[y] * rng.uniform(0, 1, m), y


def f_oneway(z: Any, y: Any) -> Any:
    return stats.f_oneway(*(z[y == k] for k in np.unique(y))).statistic


@settings(max_examples=30, deadline=None, derandomize=True)
@given(k=st.integers(2, 6), seed=st.integers(0, 99), offset=st.sampled_from([0.0, -3.0, 1e4]))
def test_f_is_the_one_way_anova_of_scipy(k: int, seed: int, offset: float) -> None:
    z, y = sample(k=k, seed=seed)
    np.testing.assert_allclose(moments(z + offset, y).f_statistic(), f_oneway(z, y), rtol=1e-8)


def test_two_classes_are_the_square_of_student_t() -> None:
    z, y = sample(k=2)
    t = stats.ttest_ind(z[y == 0], z[y == 1]).statistic
    np.testing.assert_allclose(moments(z, y).f_statistic(), t**2, rtol=1e-9)


def test_scale_and_shift_do_not_matter() -> None:
    z, y = sample()
    np.testing.assert_allclose(moments(-7.5 * z + 100, y).f_statistic(), moments(z, y).f_statistic(), rtol=1e-8)


def test_shuffled_labels_have_the_mean_of_the_null_distribution() -> None:
    z, y = sample(n=80, m=400, k=4)
    rng = np.random.default_rng(1)
    f = np.concatenate([moments(z, rng.permutation(y)).f_statistic() for _ in range(5)])
    assert f.mean() == pytest.approx((80 - 4) / (80 - 4 - 2), rel=0.08)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 60), max_size=5))
def test_any_split_into_batches_gives_the_same(cuts: list[int]) -> None:
    z, y = sample()
    y = np.sort(y)  # some batches see some classes only
    np.testing.assert_allclose(moments(z, y, *sorted(cuts)).f_statistic(), moments(z, y).f_statistic(), rtol=1e-10)


def test_it_bridges_to_the_share_of_variance() -> None:
    z, y = sample()
    eta = moments(z, y).eta_squared()
    np.testing.assert_allclose(moments(z, y).f_statistic(), (60 - 4) / (4 - 1) * eta / (1 - eta), rtol=1e-10)


def test_features_without_spread() -> None:
    z, y = sample(m=4)
    z[:, 1] = 0.1  # constant
    z[:, 2] = y * 0.3 + 5  # the classes differ, nothing within them
    z[:, 3] = 0
    f = moments(z, y, 13, 31).f_statistic()
    assert f[1] == f[3] == 0 and f[2] == f[0] > 0
    assert moments(z[:, 2:], y).f_statistic().tolist() == [1, 0]
    assert moments(z, y).eta_squared()[1:].tolist() == [0, 1, 0]


def test_classes_of_one_image_are_left_out() -> None:
    z, y = sample()
    z1, y1 = np.vstack([z, z[:1] + 50]), np.append(y, 9)
    np.testing.assert_allclose(moments(z1, y1).f_statistic(), moments(z, y).f_statistic(), rtol=1e-9)
    for few in (np.arange(60), np.zeros(60, dtype=int)):
        with pytest.raises(DataError, match="at least 2 images of each of at least 2 classes"):
            moments(z, few).f_statistic()


def test_labels_that_are_none_are_refused() -> None:
    z = torch.zeros(3, 2)
    for bad in (torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.tensor([0, -1, 2]), torch.zeros(3, 4, dtype=torch.int64)):
        with pytest.raises(DataError, match="one class number"):
            ClassMoments().add(z, bad)


class Maps(nn.Module):
    """conv -> ReLU -> conv."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, 4, 1)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.features(x)).mean((2, 3))
        return out


def data(n: int = 40, classes: int = 4) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, 6, 6, generator=noise, dtype=torch.float64), torch.arange(n) % classes


def scored(model: nn.Module, batches: Any, **options: Any) -> Any:
    graph = trace(model, data(1)[0])
    return criteria.score(graph, model, "screening", data=batches, **options).values["a"]


def ranks(v: Any) -> Any:
    return stats.rankdata(v) / len(v)


@pytest.mark.parametrize("feature", ["mean", "abs", "max"])
@pytest.mark.parametrize("combine", ["rank", "log", "max", "product"])
def test_the_score_mixes_f_and_magnitude(combine: str, feature: str) -> None:
    model = Maps().double()
    x, y = data()
    with torch.no_grad():
        maps = model.features(x)
        pooled = {"mean": maps.mean((2, 3)), "abs": maps.abs().mean((2, 3)), "max": maps.amax((2, 3))}[feature]
    f = f_oneway(pooled.numpy(), y.numpy())
    w = model.a.weight.detach().abs().sum((1, 2, 3)).numpy()
    scales: dict[str, Callable[[Any], Any]] = {
        "rank": ranks,
        "log": lambda v: (np.log1p(v) - np.log1p(v).min()) / np.ptp(np.log1p(v)),
        "max": lambda v: v / v.max(),
    }
    scale = scales.get(combine)
    expected = f**0.3 * w**0.7 if scale is None else 0.3 * scale(f) + 0.7 * scale(w)
    np.testing.assert_allclose(scored(model, [(x, y)], alpha=0.3, combine=combine, feature=feature), expected, rtol=1e-7)


@pytest.mark.parametrize("name", ["plain", "residual", "dense"])
def test_alpha_zero_is_magnitude_pruning(name: str) -> None:
    model, graph = traced(name)
    batches = [(images(name, 12)[0], torch.arange(12) % 3)]
    ours, l1 = criteria.score(graph, model, "screening", data=batches, alpha=0), criteria.score(graph, model, "l1")
    assert Plan.uniform(graph, 0.5, ours) == Plan.uniform(graph, 0.5, l1)
    for group in graph.groups:
        assert (np.argsort(ours.values[group.name]) == np.argsort(l1.values[group.name])).all()


def test_alpha_one_does_not_see_the_weights_scale() -> None:
    """F alone: scaling a filter and undoing it in the next layer changes nothing."""
    model = Maps().double()
    x, y = data()
    before, mixed = scored(model, [(x, y)], alpha=1), scored(model, [(x, y)], alpha=0.5)
    with torch.no_grad():
        assert model.a.bias is not None
        model.a.weight[2] *= 50
        model.a.bias[2] *= 50
    np.testing.assert_array_equal(scored(model, [(x, y)], alpha=1), before)
    assert scored(model, [(x, y)], alpha=0.5)[2] != mixed[2]


@pytest.mark.parametrize(("combine", "alpha"), [("max", 0.5), ("log", 0.5), ("product", 0.5), ("rank", 1)])
def test_the_planted_channel_is_kept_at_90_percent(combine: str, alpha: float) -> None:
    model = Maps(width=20).double()
    x, y = data(200)
    x[:, 0] += 2.0 * (y[:, None, None] - 1.5)
    with torch.no_grad():
        model.a.weight[:, 0] = 0
        model.a.weight[7, 0] = 0.2  # the only filter that looks at the telling plane
        model.a.weight[7, 1:] = 0
    graph = trace(model, x[:1])
    kept = Plan.uniform(graph, 0.1, criteria.score(graph, model, "screening", data=[(x, y)], alpha=alpha, combine=combine)).keep["a"]
    assert len(kept) == 2 and 7 in kept


def test_dead_channels_come_last_and_data_must_be_labelled() -> None:
    model = Maps().double()
    with torch.no_grad():
        assert model.a.bias is not None
        model.a.weight[3], model.a.bias[3] = 0, -1
    x, y = data()
    assert scored(model, [(x, y)]).argmin() == 3
    for bad, message in (([x], "needs labels"), ([(x, y), x], "needs labels"), ([(x[:1], y[:1])], "too few"), ([(x, y * 0)], "too few")):
        with pytest.raises(DataError, match=message):
            scored(model, bad)


def test_a_dead_layer_falls_back_to_magnitude() -> None:
    model = Maps().double()
    with torch.no_grad():
        assert model.a.bias is not None
        model.a.bias.fill_(-100)
    x, y = data()
    np.testing.assert_allclose(scored(model, [(x, y)]), 0.5 * 0.55 + 0.5 * ranks(model.a.weight.detach().abs().sum((1, 2, 3)).numpy()))


def test_options_are_checked() -> None:
    model, graph = build("plain"), traced("plain")[1]
    for options in ({"alpha": 1.5}, {"alpha": float("nan")}, {"combine": "mean"}, {"feature": "median"}):
        with pytest.raises(UsageError, match="must"):
            criteria.score(graph, model, "screening", data=[(images("plain", 4)[0], torch.arange(4) % 2)], **options)
