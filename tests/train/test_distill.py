"""What is learned from the dense network, against the formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgeprune as ep
from edgeprune.graph.slim import slim
from edgeprune.train import Recipe
from edgeprune.train.augment import Batch
from edgeprune.train.distill import Teacher, features_to_learn, hard_loss, watched
from edgeprune.train.evaluate import settled
from edgeprune.train.finetune import finetune
from tests.colours import SIDE, ColourNet, colour_data, colour_net, same
from tests.networks import images, traced

X = torch.randn(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def test_logits_are_the_softened_divergence() -> None:
    dense, logits = colour_net(dropout=0.5), torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    dense.train()
    soft, features = Teacher(dense, CPU, {}).losses(logits, {}, X, 3.0)
    with torch.no_grad():
        p, q = (colour_net()(X).double() / 3).softmax(1), (logits.double() / 3).log_softmax(1)
    assert float(soft) == pytest.approx(9 * float((p * (p.log() - q)).sum(1).mean()), rel=1e-5)
    assert float(features) == 0
    assert dense.training


def test_features_are_those_of_the_channels_that_stayed() -> None:
    """Against the dense network's own maps, picked by hand: what layers read outside the residual branch."""
    dense = colour_net()
    graph = ep.trace(dense, X[:1])
    plan = ep.Plan({"a": (0, 2, 5, 7), "c": (1, 3, 30)})
    wanted = features_to_learn(graph, plan)
    assert wanted == {"b": (0, 2, 5, 7), "c": (0, 2, 5, 7), "head": (1, 3, 30)}
    small = settled(slim(dense, graph, plan))
    with torch.no_grad(), watched(small, wanted) as seen:
        logits = small(X)
    with torch.no_grad():
        relu, pooled = torch.relu, torch.relu(dense.c_norm(dense.c(b := block(dense, X)))).mean((2, 3))
        maps = {"b": relu(dense.a_norm(dense.a(X)))[:, [0, 2, 5, 7]], "c": b[:, [0, 2, 5, 7]], "head": pooled[:, [1, 3, 30]]}
    expected = [((seen[name] - t) ** 2).mean() / (t**2).mean() for name, t in maps.items()]
    _, features = Teacher(dense, CPU, wanted).losses(logits, seen, X, 4.0)
    assert float(features) == pytest.approx(float(sum(expected)) / 3, rel=1e-4)
    assert float(features) > 0.01


def block(dense: ColourNet, x: Tensor) -> Tensor:
    """What comes out of the residual block."""
    x = torch.relu(dense.a_norm(dense.a(x)))
    return torch.relu(x + dense.b_norm(dense.b(x)))


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("residual", ["body.1.a.0", "body.2.a.0", "fc"]),  # not what is inside the branches
        ("transposed", ["down.0", "out"]),
        ("attention", []),  # it had to be exported
        ("mlp", ["3", "6"]),
    ],
)
def test_features_are_learned_where_everything_passes(name: str, points: list[str]) -> None:
    dense, graph = traced(name)
    plan = ep.Plan.uniform(graph, 0.5)
    wanted = features_to_learn(graph, plan)
    assert list(wanted) == points
    with torch.no_grad(), watched(small := slim(dense, graph, plan), wanted) as seen:
        small(*images(name, 3))
    assert {n: t.shape[1] for n, t in seen.items()} == {n: len(kept) for n, kept in wanted.items()}


def test_few_of_many_points_are_taken_evenly_spread() -> None:
    dense = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(28)))
    wanted = list(features_to_learn(graph := ep.trace(dense, torch.zeros(1, 3, 4, 4)), ep.Plan.uniform(graph, 1.0)))
    assert wanted == [str(n) for n in range(3, 28, 3)]


def test_features_of_a_branch_that_vanished_are_not_asked_for() -> None:
    dense, graph = traced("residual")
    wanted = features_to_learn(graph, ep.Plan({"body.2.a.0": ()}))
    assert set(wanted) == {"body.1.a.0", "fc"}
    small = slim(dense, graph, ep.Plan({"body.2.a.0": ()}))
    with torch.no_grad(), watched(small, wanted) as seen:
        small(*images("residual"))
    assert seen.keys() == wanted.keys()


def test_a_feature_weight_brings_the_maps_closer() -> None:
    data, dense = colour_data(), colour_net()
    graph = ep.trace(dense, X[:1])
    plan = ep.Plan({"a": tuple(range(8)), "c": tuple(range(16))})
    small, wanted = settled(slim(dense, graph, plan)), features_to_learn(graph, plan)

    def gap(weight: float) -> float:
        recipe = Recipe(epochs=3, lr=0.02, batch_size=16, feature_weight=weight, choose="last")
        trained, _ = finetune(small, dense, data.train, None, recipe, features=wanted)
        with torch.no_grad(), watched(trained, wanted) as seen:
            return float(Teacher(dense, CPU, wanted).losses(trained(X), seen, X, 4.0)[1])

    assert gap(3.0) < 0.8 * gap(0.0)


def test_no_hooks_stay_and_the_teacher_is_left_alone() -> None:
    dense = colour_net()
    before = copy.deepcopy(dense.state_dict())
    teacher = Teacher(dense, CPU, {"head": range(32)})
    teacher.answer(X)
    assert same(dense.state_dict(), before)
    assert not dense.head._forward_pre_hooks


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixed_images_count_for_both_labels(smoothing: float) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    y, partner, share = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 0, 0, 2]), torch.tensor([0.7, 0.7, 0.7, 1.0])
    targets = share[:, None] * F.one_hot(y, 3) + (1 - share[:, None]) * F.one_hot(partner, 3)
    targets = (1 - smoothing) * targets + smoothing / 3
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    found = hard_loss(logits, Batch(torch.zeros(4), y, partner, share, 4), Recipe(label_smoothing=smoothing))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
