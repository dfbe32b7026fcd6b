"""What every criterion must do, on every tiny network; one that joins the registry is tested by being there."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune import criteria
from edgeprune.errors import DataError, UsageError
from edgeprune.graph.trace import trace
from edgeprune.registry import entries, find
from tests.networks import NETWORKS, build, images, traced

CRITERIA = [e.name for e in entries("criteria")]
FOLLOW_LOSS = [e.name for e in entries("criteria") if "loss" in e.constants["NEEDS"]]
DENSE_OUTPUTS = "transposed"  # a map per image: there is no classifier's loss to follow
PAIRS = [(c, n) for c in CRITERIA for n in NETWORKS if not (c in FOLLOW_LOSS and n == DENSE_OUTPUTS)]

QUICK: dict[str, dict[str, Any]] = {"filter_ensemble": {"masks": 24}}


def batches(name: str) -> list[Any]:
    return [(x if len(x := images(name, 4, seed=s)) > 1 else x[0], torch.arange(4)) for s in (1, 2)]


@pytest.mark.parametrize(("criterion", "name"), PAIRS)
def test_scores_are_finite_float64_deterministic_and_leave_the_model_alone(criterion: str, name: str) -> None:
    model = build(name)
    graph = traced(name)[1]
    model.train()
    before = copy.deepcopy(model.state_dict())
    first, second = (criteria.score(graph, model, criterion, data=batches(name), **QUICK.get(criterion, {})) for _ in range(2))
    assert first.criterion == criterion
    assert set(first.values) == {g.name for g in graph.groups}
    for group in graph.groups:
        values = first.values[group.name]
        assert values.shape == (group.channels,) and values.dtype == np.float64 and np.isfinite(values).all()
        assert (values == second.values[group.name]).all()
        few = criterion == "hrank"  # whole ranks of tiny maps tie
        few |= group.channels <= {"fpgm": 2, "screening": 3}.get(criterion, 0)  # two distances are one; two orders of three may cancel
        assert len(set(values.tolist())) > 1 or few, "scores that rank nothing"
    assert model.training
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# Reordering channels that a shuffle interleaves would change which are interleaved with which; random looks at none of them.
@pytest.mark.parametrize(("criterion", "name"), [(c, n) for c, n in PAIRS if n != "shuffle" and c != "random"])
def test_scores_move_with_the_channels(criterion: str, name: str) -> None:
    """Reordering the channels of every group, in everything that touches them, reorders the scores and changes nothing else."""
    model, graph = traced(name)
    before = criteria.score(graph, model, criterion, data=batches(name), **QUICK.get(criterion, {})).values
    moved, orders = build(name), {}
    tensors = dict([*moved.named_parameters(), *moved.named_buffers()])
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for group in graph.groups:
            orders[group.name] = rng.permutation(group.channels)
            for member in group.members:
                source, target = (torch.from_numpy(i.reshape(-1).copy()) for i in (member.indices[orders[group.name]], member.indices))
                tensor = tensors[member.parameter]
                tensor.index_copy_(member.axis, target, tensor.index_select(member.axis, source))
    after = criteria.score(graph, moved, criterion, data=batches(name), **QUICK.get(criterion, {})).values
    for group in graph.groups:
        np.testing.assert_allclose(after[group.name], before[group.name][orders[group.name]], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nan_weights_and_batches_of_one(criterion: str) -> None:
    graph = traced("plain")[1]
    labelled = {"labels", "loss"} & set(find("criteria", criterion, "criterion").NEEDS)
    for batch in ((images("plain", 1)[0], torch.tensor([2])), images("plain", 1)[0]):
        try:
            one = criteria.score(graph, build("plain"), criterion, data=[batch], **QUICK.get(criterion, {}))
        except DataError as error:
            assert labelled and any(w in str(error) for w in ("labels", "classes"))
        else:
            assert all(np.isfinite(v).all() for v in one.values.values())
    broken = build("plain")
    with torch.no_grad():
        next(broken.parameters())[2] = float("nan")
    with pytest.raises(DataError, match="NaN or Inf"):
        criteria.score(graph, broken, criterion, data=[(images("plain", 2)[0], torch.arange(2))], **QUICK.get(criterion, {}))


@pytest.mark.parametrize("criterion", FOLLOW_LOSS)
def test_the_loss_is_a_classifiers(criterion: str) -> None:
    model, graph = traced(DENSE_OUTPUTS)
    with pytest.raises(DataError, match="classifier"):
        criteria.score(graph, model, criterion, data=batches(DENSE_OUTPUTS))


def test_unknown_names_and_options_are_usage_errors() -> None:
    model, graph = traced("plain")
    with pytest.raises(UsageError, match=r"'nuclear_nrom'\. Did you mean nuclear_norm"):
        criteria.score(graph, model, "nuclear_nrom")
    with pytest.raises(UsageError, match="has no option gamma, ratio; it has: none"):
        criteria.score(graph, model, "l1", ratio=1, gamma=2)


def test_a_network_with_nothing_to_score() -> None:
    model = torch.nn.Linear(3, 2)
    graph = trace(model, torch.randn(1, 3))
    assert criteria.score(graph, model, "l1").values == {}
