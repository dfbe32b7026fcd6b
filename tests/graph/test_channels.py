"""The numbers a graph gives, against counts that know nothing of it: forward hooks and the slim networks themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.device.kernels import kernels
from edgeprune.graph import ChannelGraph, ChannelGroup, Member
from edgeprune.graph.exported import Exported
from edgeprune.graph.running import tensors_in
from edgeprune.graph.slim import recall, slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.networks import NETWORKS, images, outputs, random_plan, traced


def counted_macs(model: nn.Module, x: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates by forward hooks on conv and linear modules; by torch's counter in a graph, which has no such modules."""
    if isinstance(model, Exported):
        with FlopCounterMode(display=False) as counter:
            outputs(model, x)
        return int(counter.get_total_flops()) // 2
    total = 0

    def count(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal total
        match module:
            case nn.Linear():
                total += out.numel() * module.in_features
            case nn.ConvTranspose1d() | nn.ConvTranspose2d():
                total += args[0].numel() * module.weight[0].numel()
            case nn.Conv1d() | nn.Conv2d():
                total += out.numel() * module.weight[0].numel()

    handles = [m.register_forward_hook(count) for m in model.modules()]
    outputs(model, x)
    for handle in handles:
        handle.remove()
    return total


def widths_of(graph: ChannelGraph, plan: Plan) -> Any:
    return np.array([len(plan.keep[g.name]) for g in graph.groups], dtype=np.int64)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_macs_and_params_equal_an_independent_count_dense_and_slim(name: str, seed: int) -> None:
    model, graph = traced(name)
    plan = random_plan(graph, seed)
    small = slim(model, graph, plan)
    thin = trace(small, images(name))
    for network, seen in ((model, graph), (small, thin)):
        assert seen.macs == counted_macs(network, images(name))
        assert seen.params == sum(p.numel() for p in network.parameters())
    priced, widths = kernels(graph), widths_of(graph, plan)
    assert priced.macs(widths)[0] == thin.macs
    assert priced.params(widths)[0] == thin.params
    assert priced.macs(graph.dense_widths)[0] == graph.macs
    assert priced.params(graph.dense_widths)[0] == graph.params


class Sizes(TorchDispatchMode):
    """Elements of the first output of every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = next(tensors_in(out), None)
        self.elements.append(0 if first is None else first.numel())
        return out


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_activation_sizes_are_those_of_the_slim_network(name: str, seed: int) -> None:
    model, graph = traced(name)
    plan = random_plan(graph, seed)
    small, x, watch = slim(model, graph, plan), images(name), Sizes()
    if graph.exported is not None:  # the calls are those of the user's own code, the slim network runs the exported one
        graph = trace(recall(graph, model), x)
    widths = widths_of(graph, plan)
    with torch.no_grad(), watch:
        small(*x)
    for op in graph.ops:
        made = graph.activations[op.output]
        assert made.fixed + sum(n * widths[g] for g, n in made.per_channel) == watch.elements[op.call], op


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_point_at_each_other_correctly(name: str) -> None:
    graph = traced(name)[1]
    made = set(graph.input_activations)
    constants = set(range(len(graph.activations))) - {op.output for op in graph.ops}
    for number, op in enumerate(graph.ops):
        assert all(i in made or i in constants for i in op.inputs), "an operation reads what was made before it"
        made.add(op.output)
        assert op.fused < number
        if op.kind in ("conv", "linear") and op.weight:
            assert op.positions > 0 and op.weight in graph.shapes
        if op.fused >= 0:
            assert graph.ops[op.fused].kind in ("conv", "linear")
    assert [op.call for op in graph.ops] == sorted({op.call for op in graph.ops})
    assert graph.output_activations


def test_fusion_follows_what_a_runtime_does() -> None:
    graph = traced("plain")[1]
    conv = next(i for i, op in enumerate(graph.ops) if op.kind == "conv")
    first = [(op.kind, op.fused) for op in graph.ops[conv : conv + 3]]
    assert first == [("conv", -1), ("norm", conv), ("activation", conv)]
    before = traced("dense")[1]  # norm in front of the conv: nothing to fuse with
    names = [op.weight for op in before.ops if op.kind == "norm" and op.fused < 0]
    assert "body.1.norm.weight" in names


def test_work_in_written_views_is_needed() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h[:, :4] += self.b(x)
            out: Tensor = self.c(h)
            return out

    graph = trace(Writes(), torch.randn(1, 3, 5, 5))
    assert graph.macs == 25 * (24 + 12 + 16) == kernels(graph).macs(graph.dense_widths)[0]


def group(span: int) -> ChannelGroup:
    return ChannelGroup("g", 12, (Member("g.weight", 0, np.arange(12 * span).reshape(12, span)),))


@pytest.mark.parametrize(
    ("span", "round_to", "minimum", "expected"),
    [
        (1, 1, 1, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)),
        (1, 8, 1, (8, 12)),
        (1, 16, 1, (12,)),
        (1, 4, 5, (8, 12)),
        (2, 8, 1, (4, 8, 12)),  # two positions of the conv per channel: four channels are eight filters
        (3, 8, 1, (8, 12)),
        (1, 5, 12, (12,)),
        (1, 1, 99, (12,)),
    ],
)
def test_allowed_widths_are_multiples_of_filters(span: int, round_to: int, minimum: int, expected: tuple[int, ...]) -> None:
    assert group(span).widths(round_to, minimum) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_taps_hold_all_channels_of_their_group(name: str) -> None:
    graph = traced(name)[1]
    shapes = {op.call: graph.activations[op.output].shape for op in graph.ops}
    for g in graph.groups:
        assert graph.taps[g.name], g.name
        for tap in graph.taps[g.name]:
            assert tap.indices.shape[0] == g.channels
            assert tap.indices.max() < shapes[tap.call][tap.axis]
            assert len(np.unique(tap.indices)) == tap.indices.size


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_at_any_widths_are_those_of_the_slim_network(name: str) -> None:
    model, graph = traced(name)
    plans = [random_plan(graph, seed) for seed in range(3)]
    plans += [Plan({**plans[0].keep, name: ()}) for name in graph.branches]
    widths = np.array([[len(plan.keep[g.name]) for g in graph.groups] for plan in plans])
    for plan, macs, params in zip(plans, graph.macs_at(widths), graph.params_at(widths), strict=True):
        small = slim(model, graph, plan)
        assert macs == counted_macs(small, images(name))
        assert params == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_share_is_what_goes_with_the_group(name: str) -> None:
    model, graph = traced(name)
    for g, share in zip(graph.groups, graph.shares, strict=True):
        small = slim(model, graph, Plan({g.name: tuple(range(1, g.channels))}))
        assert share.channel_macs == graph.macs - counted_macs(small, images(name)) > 0
        assert share.channel_params == graph.params - sum(p.numel() for p in small.parameters())
        assert share.channel_macs <= share.macs
        if g.name in graph.branches:
            without = slim(model, graph, Plan({g.name: ()}))
            assert share.macs == graph.macs - counted_macs(without, images(name))
            assert share.params == graph.params - sum(p.numel() for p in without.parameters())
        else:
            assert share.macs <= g.channels * share.channel_macs
    thinnest = slim(model, graph, Plan({g.name: (0,) for g in graph.groups}))
    assert graph.prunable[0] == pytest.approx(1 - counted_macs(thinnest, images(name)) / graph.macs)
    assert graph.prunable[1] == pytest.approx(1 - sum(p.numel() for p in thinnest.parameters()) / graph.params)


def test_shares_of_a_chain_by_hand() -> None:
    """Three convs of 8, 12 and 6 channels at 64, 16 and 16 positions, then five classes: a layer between two groups counts twice."""
    graph = traced("plain")[1]
    first, second, third = 64 * 27 * 8, 16 * 72 * 12, 16 * 108 * 6
    assert [s.macs for s in graph.shares] == [first + second, second + third, third + 30]
    assert [s.params for s in graph.shares] == [27 * 8 + 16 + 864, 864 + 24 + 648, 648 + 12 + 30]
    assert graph.macs == first + second + third + 30
