"""The faithfulness list of linear filter ensembles: a known additive truth, brute force, and networks whose answer is known."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import criteria
from edgeprune.criteria.filter_ensemble import fit_linear, spearman
from edgeprune.errors import DataError, UsageError
from edgeprune.graph.slim import slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan, Scores
from tests.networks import build, images, outputs, traced


def bernoulli(masks: int, d: int, p: float = 0.7, seed: int = 0) -> Any:
    return np.random.default_rng(seed).random((masks, d)) < p


def test_an_additive_truth_is_recovered_within_its_standard_errors() -> None:
    rng = np.random.default_rng(1)
    theta, bits = rng.normal(size=20), bernoulli(2000, 20)
    losses = 3.0 - bits @ theta + 0.5 * rng.normal(size=2000)
    fit = fit_linear(bits, losses)
    assert (np.abs(fit.theta - theta) < 3.5 * fit.standard_errors).all()
    np.testing.assert_allclose(fit.standard_errors, 0.5 / np.sqrt(2000 * 0.21), rtol=0.1)  # sigma / sqrt(T p (1 - p))
    assert fit.r2 > 0.8 and fit.loo_r2 < fit.r2 and fit.reliability > 0.99
    exact = fit_linear(bits, 3.0 - bits @ theta)
    np.testing.assert_allclose(exact.theta, theta, atol=1e-9)
    assert exact.r2 == pytest.approx(1) and exact.ridge == 0


def test_slopes_are_average_marginal_effects_even_of_what_is_not_additive() -> None:
    p, d = 0.7, 6
    bits = np.array(list(itertools.product([False, True], repeat=d)))
    weight = np.where(bits, p, 1 - p).prod(axis=1)
    losses = (bits[:, 0] ^ bits[:, 1]) + 2.0 * (bits[:, 2] & bits[:, 3] & ~bits[:, 4]) - 0.5 * bits[:, 5]
    table = losses.reshape((2,) * d)  # product counts up in binary
    share = weight.reshape((2,) * d)
    marginal = [float(((table.take(0, i) - table.take(1, i)) * share.sum(axis=i)).sum()) for i in range(d)]
    copies = np.rint(weight * 10**d).astype(int)  # 0.7 and 0.3 make whole counts: the full product measure
    np.testing.assert_allclose(fit_linear(np.repeat(bits, copies, axis=0), np.repeat(losses, copies)).theta, marginal, atol=1e-9)


def test_a_constant_moves_nothing_and_the_scale_carries_over() -> None:
    rng = np.random.default_rng(2)
    bits = bernoulli(200, 8)
    losses = rng.random(200) + bits @ rng.normal(size=8)
    fit, moved, scaled = (fit_linear(bits, x) for x in (losses, losses + 7, -3 * losses))
    np.testing.assert_allclose(moved.theta, fit.theta, atol=1e-9)
    np.testing.assert_allclose(scaled.theta, -3 * fit.theta, atol=1e-9)
    np.testing.assert_allclose(scaled.standard_errors, 3 * fit.standard_errors)


def test_standard_errors_shrink_with_the_root_of_the_masks() -> None:
    rng = np.random.default_rng(3)
    bits, noise = bernoulli(4096, 10), rng.normal(size=4096)
    few, many = (fit_linear(bits[:n], bits[:n] @ np.arange(10.0) + noise[:n]).standard_errors.mean() for n in (256, 4096))
    assert few / many == pytest.approx(4, rel=0.1)


def test_the_ridge_is_the_one_that_leaving_masks_out_prefers() -> None:
    rng = np.random.default_rng(4)
    bits = bernoulli(60, 12)
    losses = bits @ rng.normal(size=12) * 0.3 + rng.normal(size=60)
    design, errors = bits - bits.mean(axis=0), {}
    for ridge in (0.0, 0.1, 1.0):  # by hand: refit without each mask, with the same centring matrix and penalty
        full = np.column_stack([np.ones(60), bits.astype(float)])
        penalty = ridge * np.trace(design.T @ design) / 12 * np.diag([0.0] + [1.0] * 12)
        left = []
        for t in range(60):
            rest, known = np.delete(full, t, 0), np.delete(losses, t)
            left.append(losses[t] - full[t] @ np.linalg.solve(rest.T @ rest + penalty, rest.T @ known))
        errors[ridge] = np.mean(np.square(left))
    fit = fit_linear(bits, losses, (0.0, 0.1, 1.0))
    assert fit.ridge == min(errors, key=errors.__getitem__)
    assert fit.loo_r2 == pytest.approx(1 - min(errors.values()) / losses.var(), abs=1e-9)


def test_fits_without_enough_masks_or_variation_are_defined() -> None:
    wide = fit_linear(bernoulli(10, 30), np.random.default_rng(0).random(10))
    assert np.isfinite(wide.theta).all() and np.isfinite(wide.standard_errors).all() and wide.ridge > 0
    flat = fit_linear(bernoulli(20, 3), np.full(20, 2.5))
    assert (flat.theta == 0).all() and flat.reliability == 0
    with pytest.raises(ValueError, match="two masks"):
        fit_linear(bernoulli(1, 3), np.ones(1))
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == -1
    assert spearman(np.ones(3), np.array([3.0, 2, 1])) == 0 and spearman(np.ones(1), np.ones(1)) == 1


class Signal(nn.Module):
    """Channel 2 carries the class, channel 5 is dead, the others hold noise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 3)
        with torch.no_grad():
            self.conv.weight.mul_(0.3)
            self.conv.weight[2] = torch.tensor([1.0, 0, 0])[:, None, None]
            self.norm.weight[5] = self.norm.bias[5] = 0
            self.fc.weight.mul_(0.1)
            self.fc.weight[:, 2] = torch.tensor([-0.5, 0, 0.5])
            self.fc.bias.copy_(torch.tensor([0.5, 0, -1.5]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return out


def signal() -> tuple[Any, Any, list[tuple[Tensor, Tensor]]]:
    y = torch.arange(60) % 3
    x = torch.randn(60, 3, 4, 4, dtype=torch.float64)
    x[:, 0] = 2 * y[:, None, None].double()
    model = Signal().double().eval()
    return model, trace(model, x[:1]), [(x[:25], y[:25]), (x[25:], y[25:])]


def ensemble(model: Any, graph: Any, data: Any, **options: Any) -> Scores:
    return criteria.score(graph, model, "filter_ensemble", data=data, **options)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_dead_filter_is_worth_nothing_and_the_only_signal_most(scope: str) -> None:
    model, graph, data = signal()
    scores = ensemble(model, graph, data, scope=scope, masks=200)
    (theta,), (errors,) = scores.values.values(), scores.facts["standard_errors"].values()
    assert theta.argmax() == 2 and theta[2] > 3 * np.delete(theta, 2).max()
    assert abs(theta[5]) < 3 * errors[5]
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    assert scores.facts["dense_loss"] == pytest.approx(float(F.cross_entropy(outputs(model, (x,))[0], y)), abs=1e-9)


def test_with_masks_that_drop_one_channel_it_is_the_exact_leave_one_out() -> None:
    model, graph, data = signal()
    group = graph.groups[0]
    drops = np.concatenate([np.ones((1, 8), dtype=bool), ~np.eye(8, dtype=bool)])
    loss = []
    for keep in drops:
        small = slim(model, graph, Plan({group.name: tuple(np.flatnonzero(keep).tolist())}))
        loss.append(np.average([float(F.cross_entropy(outputs(small, (x,))[0], y)) for x, y in data], weights=[len(y) for _, y in data]))
    exact = np.array(loss[1:]) - loss[0]
    np.testing.assert_allclose(fit_linear(drops, np.array(loss), (0.0, 1e-12)).theta, exact, atol=1e-6)
    near = ensemble(model, graph, data, p=0.97, masks=1500, stable=2.0).values[group.name]
    assert near.argmax() == exact.argmax()
    np.testing.assert_allclose(near, exact, atol=0.15 * exact.max())


def test_a_channel_that_harms_keeps_its_sign() -> None:
    model, graph, data = signal()
    with torch.no_grad():
        model.conv.weight[3] = model.conv.weight[2]
        model.fc.weight[:, 3] = torch.tensor([0.3, 0, -0.3])
    theta = ensemble(model, graph, data, masks=200).values[graph.groups[0].name]
    assert theta.argmin() == 3 and theta[3] < -0.1


def test_the_seed_decides() -> None:
    model, graph, data = signal()
    one, again, other = (ensemble(model, graph, data, masks=40, seed=s).values[graph.groups[0].name] for s in (0, 0, 1))
    assert (one == again).all() and (one != other).any()


@pytest.mark.slow  # every process imports torch
def test_the_number_of_processes_changes_nothing() -> None:
    model, graph = traced("residual")
    data = [(images("residual", 4, seed=s)[0], torch.arange(4)) for s in (1, 2)]
    one, two = (ensemble(model, graph, data, masks=80, workers=w) for w in (1, 2))
    assert all((values == two.values[name]).all() for name, values in one.values.items())
    assert json.dumps(one.facts) == json.dumps(two.facts)


def test_it_stops_when_the_ranking_is_stable_when_masks_or_when_time_run_out() -> None:
    model, graph, data = signal()
    told: list[tuple[str, int, int]] = []
    stable = ensemble(model, graph, data, stable=0.5, progress=lambda *step: told.append(step)).facts["fits"][0]
    assert stable["stopped"] == "stable" and stable["spearman"] >= 0.5 and stable["masks"] < 512
    assert told and told[-1][1] == stable["masks"] and all(done <= total for _, done, total in told)
    most = ensemble(model, graph, data, stable=2.0, masks=70).facts["fits"][0]
    assert (most["stopped"], most["masks"], most["p"]) == ("masks", 70, 0.7)
    late = ensemble(model, graph, data, stable=2.0, minutes=1e-9).facts["fits"][0]
    assert (late["stopped"], late["masks"]) == ("minutes", 8)


def test_masks_that_destroy_the_network_raise_the_occupancy() -> None:
    model, graph, data = signal()
    with torch.no_grad():
        model.fc.weight.mul_(30)
        model.fc.bias.mul_(30)
    fit = ensemble(model, graph, data, p=0.1, masks=64).facts["fits"][0]
    assert fit["p"] > 0.5 and fit["clipped"] < 0.6
    assert ensemble(model, graph, data, keep=0.9, masks=16).facts["fits"][0]["p"] == 0.9


def test_what_cannot_be_scored_is_refused() -> None:
    model, graph, data = signal()
    for bad in ({"scope": "group"}, {"p": 1.0}, {"workers": 0}, {"masks": 1}, {"minutes": 0.0}, {"keep": 0.0}, {"stable": 0.0}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            ensemble(model, graph, data, **bad)
    for unlabelled in ([data[0][0]], [(data[0][0], torch.full((25,), -1))]):
        with pytest.raises(DataError, match="labels"):
            ensemble(model, graph, unlabelled)
    with pytest.raises(DataError, match="empty"):
        ensemble(model, graph, [])
    with pytest.raises(DataError, match="classifier"):
        ensemble(model, graph, [(data[0][0], torch.full((25,), 3))])
    dense, dense_graph = traced("transposed")
    with pytest.raises(DataError, match="classifier"):
        ensemble(dense, dense_graph, [(images("transposed", 4)[0], torch.arange(4))])
    nothing = nn.Linear(3, 2)
    assert ensemble(nothing, trace(nothing, torch.randn(1, 3)), [(torch.randn(2, 3), torch.tensor([0, 1]))]).values == {}


def test_flattening_code_that_needs_its_own_memory_layout_still_runs() -> None:
    model = build("literal_flatten")
    graph = traced("literal_flatten")[1]
    data = [(images("literal_flatten", 4)[0], torch.arange(4))]
    assert all(np.isfinite(v).all() for v in ensemble(model, graph, data, masks=16).values.values())
