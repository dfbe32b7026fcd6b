from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune import criteria
from edgeprune.criteria.di import Moments, drops, information, losses_in_order, maps_drops, maps_gradient
from edgeprune.criteria.screening import ClassMoments
from edgeprune.errors import DataError, UsageError
from edgeprune.graph.trace import trace
from tests.networks import images, traced

N, M, K = 60, 8, 4


def sample(n: int = N, m: int = M, k: int = K, seed: int = 0) -> tuple[Any, Any]:
    """Features with some class signal and labels of which every class has some."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(k), np.arange(k), rng.integers(0, k, n - 2 * k)])
    return rng.normal(size=(n, m)) @ rng.normal(size=(m, m)) + rng.normal(size=(k, m))[y], y


def onehot(y: Any, *, unit: bool = False) -> Any:
    table = np.eye(y.max() + 1)[y]
    return table / np.sqrt(table.sum(axis=0)) if unit else table


def di(x: Any, y: Any, rho: float) -> float:
    """Directly from the definition."""
    xb, yb = x - x.mean(axis=0), y - y.mean(axis=0)
    s = xb.T @ xb + rho * np.eye(x.shape[1])
    return float(np.trace(np.linalg.inv(s) @ xb.T @ y @ y.T @ xb)) if yb.any() else 0.0


def dual(x: Any, y: Any, rho: float) -> float:
    xb, yb = x - x.mean(axis=0), y - y.mean(axis=0)
    return float((yb**2).sum() - rho * np.trace(yb @ yb.T @ np.linalg.inv(xb @ xb.T + rho * np.eye(len(x)))))


def centred(x: Any, y: Any, splits: tuple[int, ...] = (), *, unit: bool = False) -> tuple[Tensor, Tensor, float]:
    """What the package keeps of it; y are labels."""
    found = Moments()
    for part in np.split(np.arange(len(y)), splits):
        if len(part):
            found.add(torch.from_numpy(x[part]), torch.from_numpy(onehot(y[part])))
    return found.centred(unit=unit)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("rho", [1e-3, 0.1, 30.0])
def test_primal_dual_and_ridge_are_one(rho: float, unit: bool) -> None:
    x, labels = sample()
    y = onehot(labels, unit=unit)
    scatter, cross, energy = centred(x, labels, unit=unit)
    found = information(scatter, cross, rho)
    xb, yb = x - x.mean(axis=0), y - y.mean(axis=0)
    w = np.linalg.solve(xb.T @ xb + rho * np.eye(M), xb.T @ yb)
    ridge = (yb**2).sum() - ((yb - xb @ w) ** 2).sum() - rho * (w**2).sum()
    assert energy == pytest.approx((yb**2).sum(), rel=1e-12)
    assert found == pytest.approx(di(x, y, rho), rel=1e-10)
    assert found == pytest.approx(dual(x, y, rho), rel=1e-7)
    assert found == pytest.approx(ridge, rel=1e-9)
    assert 0 <= found <= energy and (not unit or found <= K - 1)


def test_class_scatter_of_both_label_scalings() -> None:
    x, labels = sample()
    n_k = np.bincount(labels)
    d = np.stack([x[labels == k].mean(axis=0) for k in range(K)]) - x.mean(axis=0)
    for unit, weight in ((False, n_k**2), (True, n_k)):
        cross = centred(x, labels, unit=unit)[1].numpy()
        np.testing.assert_allclose(cross @ cross.T, np.einsum("k,ki,kj->ij", weight, d, d), rtol=1e-9, atol=1e-9)


def test_more_features_never_tell_less() -> None:
    x, labels = sample()
    scatter, cross, _ = centred(x, labels)
    rng = np.random.default_rng(5)
    for _ in range(10):
        order = rng.permutation(M)
        nested = [information(scatter[np.ix_(s, s)], cross[s], 0.5) for s in (order[:k] for k in range(1, M + 1))]
        assert (np.diff(nested) >= -1e-10).all()


def test_dropping_one_is_brute_force() -> None:
    x, labels = sample()
    y = onehot(labels)
    found = drops(*centred(x, labels)[:2], 0.7).numpy()
    np.testing.assert_allclose(found, [di(x, y, 0.7) - di(np.delete(x, c, axis=1), y, 0.7) for c in range(M)], rtol=1e-8)


def test_greedy_removes_the_least_loss_first() -> None:
    x, labels = sample()
    y, left, order, lost = onehot(labels), list(range(M)), [], np.zeros(M)
    for _ in range(M):
        after = [di(x[:, [i for i in left if i != c]], y, 0.7) if len(left) > 1 else 0.0 for c in left]
        c = left[int(np.argmax(after))]
        lost[c] = di(x, y, 0.7) - max(after)
        left.remove(c)
        order.append(c)
    found = losses_in_order(*centred(x, labels)[:2], 0.7).numpy()
    np.testing.assert_allclose(found, lost, rtol=1e-8)
    assert np.argsort(found).tolist() == order
    assert found.max() == pytest.approx(di(x, y, 0.7), rel=1e-8)


def test_duplicates_are_not_both_thrown_away() -> None:
    x, labels = sample()
    x[:, 0] += 3 * labels  # the telling feature, twice
    x[:, 1] = x[:, 0]
    scatter, cross, _ = centred(x, labels)
    alone, ordered = drops(scatter, cross, 1e-3).numpy(), losses_in_order(scatter, cross, 1e-3).numpy()
    assert set(np.argsort(alone)[:2]) == {0, 1}  # leaving one out costs nothing, so a cut by rank deletes both
    assert len({0, 1} & set(np.argsort(ordered)[: M // 2].tolist())) == 1
    both = information(scatter, cross, 1e-3) - information(scatter[2:, 2:], cross[2:], 1e-3)
    assert both > 100 * alone[:2].sum()


@pytest.mark.parametrize("cuts", [(1,), (7, 8, 33), tuple(range(1, N))])
def test_any_split_gives_the_same(cuts: tuple[int, ...]) -> None:
    x, labels = sample()
    order = np.argsort(labels, kind="stable")  # the first batches see some classes only
    x, labels = x[order] + 100, labels[order]
    for one, other in zip(centred(x, labels, cuts), centred(x, labels), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-10, atol=1e-9)


def test_what_di_does_not_see() -> None:
    x, labels = sample()
    base = information(*centred(x, labels)[:2], 0.5)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(M, M)))[0]
    order = np.random.default_rng(3).permutation(N)
    for same in (centred(x + 40, labels), centred(x @ rotation, labels), centred(x[order], labels[order]), centred(x, (labels + 1) % K)):
        assert information(*same[:2], 0.5) == pytest.approx(base, rel=1e-9)


def test_shuffled_labels_leave_the_noise_floor() -> None:
    n, m = 400, 6
    x, labels = sample(n, m)
    rng = np.random.default_rng(7)
    noise = [information(*centred(x, rng.permutation(labels), unit=True)[:2], 1e-9) for _ in range(40)]
    assert np.mean(noise) == pytest.approx(m * (K - 1) / (n - 1), rel=0.15)
    assert information(*centred(x, labels, unit=True)[:2], 1e-9) > 5 * np.mean(noise)


def test_one_feature_is_the_f_statistic() -> None:
    x, labels = sample(m=1)
    scatter, cross, _ = centred(x, labels, unit=True)
    share = information(scatter, cross, 1e-12)
    moments = ClassMoments()
    moments.add(torch.from_numpy(x), torch.from_numpy(labels))
    assert share == pytest.approx(moments.eta_squared()[0], rel=1e-9)
    assert (N - K) / (K - 1) * share / (1 - share) == pytest.approx(moments.f_statistic()[0], rel=1e-8)


def batch(c: int = 5, side: tuple[int, int] = (2, 3), b: int = 12) -> tuple[Tensor, Tensor]:
    """Maps and centred targets of one batch."""
    noise = torch.Generator().manual_seed(4)
    y = torch.from_numpy(onehot(np.arange(b) % 3))
    return torch.randn(b, c, *side, generator=noise, dtype=torch.float64), y - y.mean(dim=0)


@pytest.mark.parametrize("side", [(2, 3), (4, 5)])
def test_the_gradient_on_maps_is_that_of_autograd_and_of_differences(side: tuple[int, int]) -> None:
    maps, y = batch(side=side)
    found, rho = maps_gradient(maps, y, 0.1).numpy(), 0.1

    def value(mask: Tensor) -> Tensor:
        x = (maps * mask[:, None, None]).flatten(1)
        x = x - x.mean(dim=0)
        k = x @ x.T + rho * torch.eye(len(x), dtype=x.dtype)
        explained: Tensor = (y**2).sum() - rho * (y * torch.linalg.solve(k, y)).sum()
        return explained

    mask = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(mask), mask)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-7)
    step = 1e-5 * torch.eye(5, dtype=torch.float64)
    differences = [float((value(1 + s) - value(1 - s)) / 2e-5) for s in step]
    np.testing.assert_allclose(found, differences, rtol=1e-4)
    assert (found >= 0).all()


@pytest.mark.parametrize("side", [(2, 3), (4, 5)])
def test_dropping_a_block_is_brute_force(side: tuple[int, int]) -> None:
    maps, y = batch(side=side)
    flat = [np.delete(maps.numpy(), c, axis=1).reshape(12, -1) for c in range(5)]
    whole = dual(maps.flatten(1).numpy(), y.numpy(), 0.1)
    found = maps_drops(maps, y, 0.1).numpy()
    np.testing.assert_allclose(found, [whole - dual(x, y.numpy(), 0.1) for x in flat], rtol=1e-7)
    assert (found >= maps_gradient(maps, y, 0.1).numpy() / 2 - 1e-12).all()


class Net(nn.Module):
    """conv -> ReLU -> conv -> mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 7, 3), nn.Conv2d(7, 4, 1)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.features(x)).mean((2, 3))
        return out


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Net().double()
    with torch.no_grad():
        model.a.weight[2] = 0
        model.a.bias[2] = -1  # type: ignore[index]
    return model


def data(n: int = 40) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(3)
    y = torch.arange(n) % K
    return torch.randn(n, 3, 6, 6, generator=noise, dtype=torch.float64) + 0.3 * y[:, None, None, None], y


def scored(model: nn.Module, batches: Any, **options: Any) -> Any:
    return criteria.score(trace(model, data(1)[0]), model, "di", data=batches, **options).values["a"]


@pytest.mark.parametrize("labels", ["onehot", "unit"])
@pytest.mark.parametrize("targets", ["labels", "outputs"])
def test_pooled_scores_are_the_drops_of_the_mean_maps(net: Any, labels: str, targets: str) -> None:
    x, classes = data()
    with torch.no_grad():
        pooled, outputs = net.features(x).mean((2, 3)).numpy(), net(x).numpy()
    y = onehot(classes.numpy(), unit=labels == "unit")
    if targets == "outputs":
        y = outputs / np.linalg.norm(outputs, axis=0) if labels == "unit" else outputs
    live = np.delete(pooled, 2, axis=1)
    rho = 1e-2 * pooled.var(axis=0).mean() * len(x)
    expected = [di(live, y, rho) - di(np.delete(live, c, axis=1), y, rho) for c in range(6)]
    for batches in ([(x, classes)], [(x[:3], classes[:3]), (x[3:], classes[3:])]):
        found = scored(net, batches, labels=labels, targets=targets, rho=1e-2)
        assert found[2] == 0
        np.testing.assert_allclose(np.delete(found, 2), expected, rtol=1e-6)


@pytest.mark.parametrize("labels", ["onehot", "unit"])
@pytest.mark.parametrize("targets", ["labels", "outputs"])
@pytest.mark.parametrize("order", ["gradient", "drop"])
def test_maps_scores_are_the_mean_over_batches(net: Any, labels: str, targets: str, order: str) -> None:
    x, classes = data()
    expected = []
    for part in (slice(0, 16), slice(16, 40)):
        with torch.no_grad():
            maps, outputs = net.features(x[part]), net(x[part])
        y = torch.from_numpy(onehot(classes[part].numpy())) if targets == "labels" else outputs
        y = y / y.norm(dim=0) if labels == "unit" else y
        expected.append((maps_gradient if order == "gradient" else maps_drops)(maps, y - y.mean(dim=0), 0.1).numpy())
    batches = [(x[:16], classes[:16]), (x[16:], classes[16:]), (x[:1], classes[:1])]  # one image tells nothing
    found = scored(net, batches, mode="maps", labels=labels, targets=targets, order=order)
    np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-7, atol=1e-12)
    assert found[2] == 0 and (np.delete(found, 2) > 0).all()


def test_orders_of_the_pooled_mode(net: Any) -> None:
    x, y = data()
    drop, greedy, gradient = (scored(net, [(x, y)], order=o) for o in ("drop", "greedy", "gradient"))
    assert (drop >= gradient / 2 - 1e-12).all() and greedy.argmin() == drop.argmin() == 2
    order = np.argsort(greedy)
    assert greedy[order[1]] == pytest.approx(drop[order[1]], rel=1e-6)  # the first live one to go loses what it loses alone
    assert (np.diff(greedy[order]) >= 0).all()


def test_outputs_need_no_labels_and_see_none(net: Any) -> None:
    x, y = data()
    for mode in ("pooled", "maps"):
        same = [scored(net, b, mode=mode, targets="outputs") for b in ([x], [(x, y)], [(x, y.flip(0))])]
        assert (same[0] == same[1]).all() and (same[0] == same[2]).all()


def test_maps_are_kept_against_work_in_place() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            maps = self.features(x)
            out: Tensor = self.b(maps).mean((2, 3))
            maps.zero_()
            return out

    plain, model = Net().double(), InPlace().double()
    model.load_state_dict(plain.state_dict())
    x = data()[0]
    wanted = scored(plain, [x], mode="maps", targets="outputs")
    np.testing.assert_allclose(scored(model, [x], mode="maps", targets="outputs"), wanted, rtol=1e-9)


def test_dead_and_constant_features(net: Any) -> None:
    x, y = data()
    with torch.no_grad():
        net.a.weight[4] = 0
        net.a.bias[4] = 0.3  # the same on every image
    for mode in ("pooled", "maps"):
        found = scored(net, [(x, y)], mode=mode)
        assert found[2] == 0 and found[4] < 1e-20 and (np.delete(found, [2, 4]) > 0).all()
    with torch.no_grad():
        net.a.weight.zero_()
    for mode, order in (("pooled", "drop"), ("pooled", "greedy"), ("pooled", "gradient"), ("maps", "gradient"), ("maps", "drop")):
        assert (scored(net, [(x, y)], mode=mode, order=order) < 1e-20).all()


def test_bad_labels_and_too_few_images(net: Any) -> None:
    x, y = data()
    for mode in ("pooled", "maps"):
        for bad, message in (
            ([x], "needs labels"),
            ([(x, y), x], "needs labels"),
            ([(x[:1], y[:1])], "classes"),
            ([(x, y * 0)], "classes"),
            ([(x, y.double())], "one class number"),
        ):
            with pytest.raises(DataError, match=message):
                scored(net, bad, mode=mode)
    with pytest.raises(DataError, match="outputs differ"):
        scored(net, [x[:1]], mode="maps", targets="outputs")


def test_classes_of_one_image_have_no_column(net: Any) -> None:
    x, y = data(9)  # class 0 has three images, the others two
    y[-1] = 7
    with torch.no_grad():
        pooled = net.features(x).mean((2, 3)).numpy()
    live, columns = np.delete(pooled, 2, axis=1), onehot(y.numpy())[:, :K]
    rho = pooled.var(axis=0).mean() * 9
    expected = [di(live, columns, rho) - di(np.delete(live, c, axis=1), columns, rho) for c in range(6)]
    np.testing.assert_allclose(np.delete(scored(net, [(x, y)]), 2), expected, rtol=1e-5)


def test_options_are_checked() -> None:
    model, graph = traced("plain")
    batches = [(images("plain", 4)[0], torch.arange(4) % 2)]
    for options in ({"mode": "x"}, {"order": "x"}, {"labels": "x"}, {"targets": "x"}, {"rho": -1.0}, {"rho": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(options))):
            criteria.score(graph, model, "di", data=batches, **options)
    with pytest.raises(UsageError, match="greedy needs mode pooled"):
        criteria.score(graph, model, "di", data=batches, mode="maps", order="greedy")
