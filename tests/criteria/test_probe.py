from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.criteria import score
from edgeprune.criteria.probe import Probe, Statistic, View, channel_maps
from edgeprune.errors import DataError, UsageError
from edgeprune.graph import Tap
from edgeprune.graph.trace import trace
from edgeprune.plan import Scores
from tests.networks import NETWORKS, build, images, traced


class Keeper(Statistic):
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], list[Tensor]] = {}
        self.modes: list[bool] = []
        self.labels: list[Tensor | None] = []
        self.model: nn.Module | None = None

    def update(self, view: View) -> None:
        self.found.setdefault(view.key, []).append(view.maps.clone())
        self.labels.append(view.labels)
        self.modes.append(bool(self.model and self.model.training))

    def scores(self, images: int) -> Scores:
        return Scores("kept", {}, {"images": images})


def observed(name: str, n: int) -> tuple[int, dict[tuple[str, int], list[Tensor]]]:
    model, graph = traced(name)
    keeper = Keeper()
    (scores,) = Probe(model, graph, [(images(name, n), torch.zeros(n))]).gather(keeper)
    return scores.facts["images"], keeper.found


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tap_is_seen_once_a_batch_with_all_channels(name: str) -> None:
    graph = traced(name)[1]
    n, found = observed(name, 3)
    assert n == 3
    assert set(found) == {(g.name, i) for g in graph.groups for i in range(len(graph.taps[g.name]))}
    channels = {g.name: g.channels for g in graph.groups}
    for (group, _), maps in found.items():
        assert len(maps) == 1
        assert maps[0].shape[1] == channels[group] and maps[0].ndim == 4
        assert maps[0].shape[0] == 3  # a linear on tokens runs on images * tokens rows: they are columns of the image's map


@pytest.mark.parametrize("name", NETWORKS)
def test_slices_are_the_rows_that_make_each_channel(name: str) -> None:
    model, graph = traced(name)
    probe = Probe(model, graph)
    for group in graph.groups:
        parts = probe.slices(group)
        assert len(parts) == group.producing
        for part, member in zip(parts, group.members, strict=False):
            assert part.shape[0] == group.channels and not part.requires_grad
            weight = dict(model.named_parameters())[member.parameter]
            assert part.numel() == weight.numel() * member.indices.size // weight.shape[member.axis]


def test_the_maps_are_the_real_ones() -> None:
    model, _ = traced("plain")
    _, found = observed("plain", 2)
    body: Any = model.body
    with torch.no_grad():
        expected = body[2](body[1](body[0](images("plain", 2)[0])))
    assert torch.equal(found["body.2.0", 0][0], expected)


def test_the_model_runs_in_eval_mode_and_is_left_as_it_was() -> None:
    model = build("plain").train()
    graph = traced("plain")[1]
    before = {k: t.clone() for k, t in model.state_dict().items()}
    keeper = Keeper()
    keeper.model = model
    Probe(model, graph, [images("plain", 4)[0]]).gather(keeper)
    assert keeper.modes and not any(keeper.modes) and model.training
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_data_may_be_an_iterator_and_batches_may_differ() -> None:
    model, graph = traced("plain")
    batches = iter([images("plain", 3)[0], images("plain", 1)[0]])
    assert Probe(model, graph, batches).gather(Keeper())[0].facts["images"] == 4
    with pytest.raises(DataError, match="empty"):
        Probe(model, graph, iter([])).gather(Keeper())


def test_several_statistics_share_one_run() -> None:
    model, graph = traced("plain")
    first, second, runs = Keeper(), Keeper(), []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        Probe(model, graph, [(images("plain", 2)[0], torch.tensor([0, 1]))]).gather(first, second)
    finally:
        handle.remove()
    assert len(runs) == 1 and first.found.keys() == second.found.keys()
    assert all(label is not None and label.tolist() == [0, 1] for label in first.labels)


class Ends(Keeper):
    """Keeps the order of maps and ends of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.outputs: list[Tensor] = []

    def update(self, view: View) -> None:
        self.order.append(view.group.name)
        assert view.aligned

    def finish_batch(self, outputs: Any) -> None:
        self.order.append("end")
        self.outputs.append(outputs)


def test_the_end_of_each_batch_is_said_with_the_outputs() -> None:
    model, graph = traced("plain")
    x, ends = images("plain", 5)[0], Ends()
    Probe(model, graph, [x[:3], x[3:]]).gather(ends)
    assert ends.order.count("end") == 2 and ends.order[-1] == "end"
    assert ends.order[: len(ends.order) // 2] == ends.order[len(ends.order) // 2 :]
    with torch.no_grad():
        assert torch.equal(torch.cat(ends.outputs), torch.cat([model(x[:3]), model(x[3:])]))


def test_maps_that_are_not_finite_are_refused() -> None:
    model, graph = traced("plain")
    with pytest.raises(DataError, match="NaN or Inf"):
        Probe(model, graph, [torch.full_like(images("plain", 2)[0], float("nan"))]).gather(Keeper())


class Slopes(Statistic):
    """Sums gradients."""

    gradients = True
    maps = False

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}

    def backward(self, gradients: Mapping[str, Tensor], images: int) -> None:
        for name, gradient in gradients.items():
            self.total[name] = self.total.get(name, 0) + gradient * images

    def scores(self, images: int) -> Scores:
        return Scores("slopes", {}, {"images": images})


def test_gradients_are_those_of_the_loss_and_leave_none_behind() -> None:
    model, graph = traced("plain")
    x, y = images("plain", 4)[0], torch.tensor([0, 1, 2, 1])
    slopes = Slopes()
    Probe(model, graph, [(x[:3], y[:3]), (x[3:], y[3:])]).gather(slopes)
    loss = torch.nn.functional.cross_entropy(model.eval()(x), y, reduction="sum")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    wanted = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    for name, gradient in zip(names, wanted, strict=True):
        assert torch.allclose(slopes.total[name], gradient, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(DataError, match="labels"):
        Probe(model, graph, [x]).gather(Slopes())


def test_reduction_over_the_layers_of_a_group() -> None:
    model, graph = traced("plain")
    rows = [np.array([1.0, 3.0]), np.array([10.0, 50.0])]
    results = {r: Probe(model, graph, reduce=r).reduced(rows).tolist() for r in ("mean", "sum", "max", "first", "backward")}
    assert results == {"mean": [5.5, 26.5], "sum": [11, 53], "max": [10, 50], "first": [1, 3], "backward": [10, 50]}
    assert Probe(model, graph).reduced(rows, balance=True).tolist() == [(0.5 + 1 / 3) / 2, (1.5 + 5 / 3) / 2]
    with pytest.raises(UsageError, match="reduce must be one of"):
        Probe(model, graph, reduce="median")


def test_flattened_channels_arrive_as_rows() -> None:
    tap = Tap(0, 1, torch.arange(6).view(3, 2).numpy())
    maps = channel_maps(torch.arange(12.0).view(2, 6), tap)
    assert maps.tolist() == [[[[0, 1]], [[2, 3]], [[4, 5]]], [[[6, 7]], [[8, 9]], [[10, 11]]]]
    tokens = channel_maps(torch.arange(24.0).view(2, 4, 3), Tap(0, 2, torch.arange(3).view(3, 1).numpy()))
    assert tokens.shape == (2, 3, 1, 4)
    assert tokens[0, 1, 0].tolist() == [1, 4, 7, 10]


@pytest.mark.parametrize("which", ["network", "images"])
def test_the_layout_in_memory_changes_nothing(which: str) -> None:
    """To flatten channels_last maps takes an operation more: whatever is behind would be taken for something else."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 5)]
    model, x, labels = nn.Sequential(*layers).eval(), torch.randn(16, 3, 8, 8), torch.arange(16) % 5
    graph = trace(model, x[:1])
    expected = [score(graph, model, criterion, data=[(x, labels)]).values for criterion in ("reconstruction", "di")]
    if which == "network":
        fast: Any = model.to
        fast(memory_format=torch.channels_last)
        assert trace(model, x[:1]).ops == graph.ops
    else:
        x = x.contiguous(memory_format=torch.channels_last)
    found = [score(graph, model, criterion, data=[(x, labels)]).values for criterion in ("reconstruction", "di")]
    for a, b in zip(expected, found, strict=True):
        assert all(np.allclose(a[name], b[name]) for name in a)
    assert which == "images" or layers[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
