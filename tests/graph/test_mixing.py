from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from edgeprune.graph.slim import mask, slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 4, 1)
    ).eval()


def test_the_graph_says_which_operation_mixes_which_channels() -> None:
    graph = trace(network(), X)
    assert [(m.op, m.ordinal, m.output_axes) for m in graph.mixing] == [("native_group_norm", 0, (1,)), ("native_group_norm", 1, (1,))]
    assert [(r.argument, r.axis) for r in graph.mixing[0].reads] == [(0, 1), (1, 0), (2, 0)]
    for number, mixing in enumerate(graph.mixing):
        for read in mixing.reads:
            assert set(read.groups.tolist()) == {number}
            assert read.channels.tolist() == list(range(8))


def test_the_twin_keeps_its_class_and_works_for_any_batch_and_again() -> None:
    model = network()
    graph = trace(model, X)
    plan = Plan.uniform(graph, keep=0.5)
    twin, small = mask(model, graph, plan), slim(model, graph, plan)
    assert type(twin) is type(model)
    for _ in range(2):
        assert torch.allclose(twin(X), small(X), atol=1e-5)
        assert torch.allclose(copy.deepcopy(twin)(X[:1]), small(X[:1]), atol=1e-5)
    twin(X).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_zeros_alone_would_not_be_the_slim_network() -> None:
    model = network()
    graph = trace(model, X)
    plan = Plan.uniform(graph, keep=0.5)
    twin = mask(model, graph, plan)
    plain = network()
    plain.load_state_dict(twin.state_dict())
    assert not torch.allclose(plain(X), twin(X), atol=1e-3)


def test_a_forward_that_fails_leaves_no_mode_behind() -> None:
    model = network()
    graph = trace(model, X)
    twin = mask(model, graph, Plan.uniform(graph, keep=0.5))
    before: list[TorchDispatchMode] = _get_current_dispatch_mode_stack()
    with pytest.raises(RuntimeError, match="channels"):
        twin(torch.randn(1, 5, 6, 6))
    assert _get_current_dispatch_mode_stack() == before
    assert twin(X).shape == (2, 4, 6, 6)
