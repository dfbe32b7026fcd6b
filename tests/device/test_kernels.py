from __future__ import annotations

import numpy as np
import pytest

from edgeprune.device.kernels import FILE_BYTES, FLOAT_BYTES, KERNEL_FILE_BYTES, kernels
from edgeprune.errors import UsageError
from edgeprune.graph.channels import Activation, ChannelGraph, ChannelGroup, Member, Op
from edgeprune.graph.slim import slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.networks import images, traced


def tiny() -> ChannelGraph:
    """Conv a (3->8, 3x3, 10x10), bn, relu, [dead pool], conv b (8->4, 1x1), silu, flatten, fc (400->5, 100 positions a channel)."""
    rows = np.arange(8)[:, None]
    producers = (Member("a.weight", 0, rows), Member("bn.weight", 0, rows), Member("bn.bias", 0, rows))
    a = ChannelGroup("a", 8, (*producers, Member("b.weight", 1, rows)))
    flat = np.arange(400).reshape(4, 100)
    b = ChannelGroup(
        "b", 4, (Member("b.weight", 0, np.arange(4)[:, None]), Member("b.bias", 0, np.arange(4)[:, None]), Member("fc.weight", 1, flat))
    )
    wide, narrow = Activation((1, 8, 10, 10), 0, ((0, 100),)), Activation((1, 4, 10, 10), 0, ((1, 100),))
    return ChannelGraph(
        groups=(a, b),
        frozen={},
        ops=(
            Op("conv", "convolution", "a.weight", (0,), 1, call=0, kernel=(3, 3), stride=(1, 1), positions=100),
            Op("norm", "batch_norm", "bn.weight", (1,), 2, call=1, fused=0),
            Op("activation", "relu", None, (2,), 3, call=2, fused=0),
            Op("pool", "mean", None, (3,), 4, call=3),
            Op("conv", "convolution", "b.weight", (3,), 5, call=4, kernel=(1, 1), stride=(1, 1), positions=100),
            Op("activation", "silu", None, (5,), 6, call=5, fused=4),
            Op("move", "view", None, (6,), 7, call=6),
            Op("linear", "addmm", "fc.weight", (7,), 8, call=7, positions=1),
        ),
        activations=(
            Activation((1, 3, 10, 10), 300, ()),
            wide,
            wide,
            wide,
            Activation((1, 8), 0, ((0, 1),)),
            narrow,
            narrow,
            Activation((1, 400), 0, ((1, 100),)),
            Activation((1, 5), 5, ()),
        ),
        shapes={
            "a.weight": (8, 3, 3, 3),
            "bn.weight": (8,),
            "bn.bias": (8,),
            "bn.running_mean": (8,),
            "b.weight": (4, 8, 1, 1),
            "b.bias": (4,),
            "fc.weight": (5, 400),
            "fc.bias": (5,),
        },
        trainable=frozenset({"a.weight", "bn.weight", "bn.bias", "b.weight", "b.bias", "fc.weight", "fc.bias"}),
        taps={},
        input_activations=(0,),
        output_activations=(8,),
    )


def test_fusion_views_and_dead_code() -> None:
    made = kernels(tiny())
    assert made.names == ("a", "b", "silu", "fc")
    assert made.kinds == ("conv3x3", "conv1x1", "activation", "linear")


def test_sizes_by_hand() -> None:
    made = kernels(tiny())
    at = made.at(np.array([[8, 4], [6, 3]]))
    assert at.macs.tolist() == [[21600, 3200, 0, 2000], [16200, 1800, 0, 1500]]
    assert at.input_elements.tolist() == [[300, 800, 400, 400], [300, 600, 300, 300]]
    assert at.output_elements.tolist() == [[800, 400, 400, 5], [600, 300, 300, 5]]
    # Nine taps of three channels at each of 100 positions; a 1x1 conv gathers nothing.
    assert at.patch_elements.tolist() == [[2700, 0, 0, 0], [2700, 0, 0, 0]]
    assert at.channels.tolist() == [[8, 4, 4, 5], [6, 3, 3, 5]]
    # conv a carries the folded norm's bias.
    assert at.weight_elements.tolist() == [[216 + 8, 32 + 4, 0, 2005], [162 + 6, 18 + 3, 0, 1505]]
    assert made.macs(np.array([6, 3])).tolist() == [19500]
    assert made.params(np.array([[8, 4], [6, 3]])).tolist() == [216 + 16 + 36 + 2005, 162 + 12 + 21 + 1505]
    container = FILE_BYTES + 4 * KERNEL_FILE_BYTES
    assert made.size_bytes(np.array([8, 4])).tolist() == [4 * (224 + 36 + 2005) + container]


def test_peak_memory_by_hand() -> None:
    weights = 4 * (224 + 36 + 2005)
    made, dense = kernels(tiny()), np.array([8, 4])
    assert made.weight_bytes(dense).tolist() == [weights]
    # conv b: 800 in, 400 out; silu overwrites its input.
    assert made.live_bytes(dense).tolist() == [4 * 1200]
    assert made.peak_memory_bytes(dense).tolist() == [weights + 4 * 1200]
    # conv b's 1200 twice; or silu's input, its sigmoid, and both once more.
    assert made.live_bytes(dense, ["conv1x1"]).tolist() == [4 * 2400]
    assert made.live_bytes(dense, ["activation"]).tolist() == [4 * 1600]
    # Nine taps at each of conv a's 100 positions; a 1x1 conv and a linear layer need none.
    assert made.pointer_bytes == 8 * 900


def test_dense_totals_are_the_graph_s() -> None:
    graph = tiny()
    made = kernels(graph)
    assert made.macs(graph.dense_widths)[0] == graph.macs
    assert made.params(graph.dense_widths)[0] == graph.params


def test_wrong_widths_are_refused() -> None:
    with pytest.raises(UsageError, match="2 groups"):
        kernels(tiny()).at(np.ones((3, 5)))


def test_real_networks_agree_with_their_slim_selves() -> None:
    import torch

    from edgeprune.graph.slim import slim
    from edgeprune.graph.trace import trace
    from edgeprune.plan import Plan

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            n = torch.nn
            self.stem = n.Sequential(n.Conv2d(3, 16, 3, padding=1, bias=False), n.BatchNorm2d(16), n.ReLU())
            self.depth = n.Sequential(n.Conv2d(16, 16, 3, padding=1, groups=16), n.BatchNorm2d(16), n.ReLU6())
            self.point = n.Sequential(n.Conv2d(16, 16, 1, bias=False), n.BatchNorm2d(16))
            self.fc = n.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            y = torch.relu(self.point(self.depth(x)) + x)
            return self.fc(torch.cat([y, x], 1).mean((2, 3)))  # type: ignore[no-any-return]

    model, example = Block().eval(), torch.randn(1, 3, 12, 12)
    graph = trace(model, example)
    made = kernels(graph)
    assert "depthwise" in made.kinds and "norm" not in made.kinds and "cat" in made.kinds
    plan = Plan.uniform(graph, keep=0.5)
    widths = np.array([len(plan.keep[g.name]) for g in graph.groups])
    small = kernels(trace(slim(model, graph, plan), example))
    dense = np.array(small.graph.dense_widths)
    one, other = made.at(widths), small.at(dense)
    assert one.kinds == other.kinds
    for name in ("macs", "input_elements", "output_elements", "weight_elements", "patch_elements", "channels", "groups"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert made.params(widths) == small.params(dense)
    assert made.size_bytes(widths) == small.size_bytes(dense)
    assert made.peak_memory_bytes(widths) == small.peak_memory_bytes(dense)


def test_kinds_that_cost_differently_are_told_apart() -> None:
    import torch

    from edgeprune.graph.trace import trace

    class Many(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = torch.nn.Conv2d(8, 8, 5, padding=2, groups=8)
            self.grouped = torch.nn.Conv2d(8, 16, 3, padding=1, groups=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.large(torch.nn.functional.pad(x, (1, 1, 1, 1)))
            gate = torch.sigmoid(x.mean((2, 3), keepdim=True))
            y: torch.Tensor = self.grouped(torch.relu(x) * gate + torch.relu(x))
            return y

    graph = trace(Many(), torch.zeros(1, 8, 10, 10))
    made = kernels(graph)
    # The first relu runs inside the convolution, and the second one's result is already there.
    assert sorted(made.kinds) == sorted(("pad", "depthwise_large", "global_pool", "activation", "scale", "elementwise", "grouped"))
    grouped = made.kinds.index("grouped")
    at = made.at(np.array(graph.dense_widths))
    assert at.groups[0].tolist() == [4.0 if n == grouped else 0.0 for n in range(len(made.kinds))]
    assert at.patch_elements[0, grouped] == 8 * 12 * 12 * 9


@pytest.mark.parametrize("name", ["residual", "bottleneck", "grouped", "mobile", "option_a", "attention"])
def test_a_branch_that_vanished_is_priced_as_the_network_without_it(name: str) -> None:
    model, graph = traced(name)
    half = Plan.uniform(graph, 0.5).keep
    for keep in ({}, half):
        plan = Plan({**keep, **dict.fromkeys(graph.branches, ())})
        thin = trace(slim(model, graph, plan), images(name))
        priced, real = kernels(graph), kernels(thin)
        widths = plan.widths(graph)
        both = np.stack([graph.dense_widths, widths])
        at, other = priced.at(both), real.at(thin.dense_widths)
        runs = np.broadcast_to(at.calls, at.macs.shape)[1] > 0
        assert [n for n, own in zip(priced.kinds, runs, strict=True) if own] == list(real.kinds)
        for column in ("macs", "input_elements", "output_elements", "weight_elements", "patch_elements", "channels", "groups"):
            assert getattr(at, column)[1][runs].tolist() == pytest.approx(getattr(other, column)[0].tolist())
            assert not getattr(at, column)[1][~runs].any(), "nothing of it is left"
            assert getattr(at, column)[0].tolist() == pytest.approx(getattr(priced.at(graph.dense_widths), column)[0].tolist())
        assert (priced.macs(widths)[0], priced.params(widths)[0]) == (thin.macs, thin.params)
        assert priced.calls(both).tolist() == [len(priced.names), len(real.names)]
        assert priced.live_bytes(widths)[0] >= real.live_bytes(thin.dense_widths)[0]
        constants = sum(FLOAT_BYTES * thin.shapes[end.held[-1]][0] for b in graph.branches.values() for end in b.ends)
        assert priced.size_bytes(widths)[0] == real.size_bytes(thin.dense_widths)[0] + constants
