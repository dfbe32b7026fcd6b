from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edgeprune.criteria.probe import Probe, channel_maps
from edgeprune.errors import DataError
from edgeprune.graph import ChannelGroup, Tap
from tests.networks import NETWORKS, build, images, traced


def observed(name: str, n: int) -> tuple[int, dict[tuple[str, int], list[Tensor]]]:
    model, graph = traced(name)
    found: dict[tuple[str, int], list[Tensor]] = {}

    def keep(group: ChannelGroup, tap: int, maps: Tensor) -> None:
        found.setdefault((group.name, tap), []).append(maps.clone())

    x = images(name, n)
    return Probe(model, graph, [(x, torch.zeros(n))]).observe_maps(keep), found


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
        assert maps[0].shape[0] % 3 == 0  # a linear on tokens runs on images * tokens rows


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
    modes: list[bool] = []
    Probe(model, graph, [images("plain", 4)[0]]).observe_maps(lambda *_: modes.append(model.training))
    assert modes and not any(modes) and model.training
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_data_may_be_an_iterator_and_batches_may_differ() -> None:
    model, graph = traced("plain")
    assert Probe(model, graph, iter([images("plain", 3)[0], images("plain", 1)[0]])).observe_maps(lambda *_: None) == 4
    with pytest.raises(DataError, match="empty"):
        Probe(model, graph, iter([])).observe_maps(lambda *_: None)


def test_flattened_channels_arrive_as_rows() -> None:
    tap = Tap(0, 1, torch.arange(6).view(3, 2).numpy())
    maps = channel_maps(torch.arange(12.0).view(2, 6), tap)
    assert maps.tolist() == [[[[0, 1]], [[2, 3]], [[4, 5]]], [[[6, 7]], [[8, 9]], [[10, 11]]]]
    tokens = channel_maps(torch.arange(24.0).view(2, 4, 3), Tap(0, 2, torch.arange(3).view(3, 1).numpy()))
    assert tokens.shape == (2, 3, 1, 4)
    assert tokens[0, 1, 0].tolist() == [1, 4, 7, 10]
