"""Numbers of channels in a network's code: its layers stay, its forward is written down again with other numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import SlimError
from edgeprune.graph.channels import ChannelGraph
from edgeprune.graph.exported import Exported
from edgeprune.graph.portable import load, save
from edgeprune.graph.slim import mask, prove, slim
from edgeprune.graph.symbolic import Symbolic, Unwritable, located, renumber, symbolic
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.networks import random_plan, settle

LAYERS = ("stem", "inside", "narrow", "wide", "head")


class Shortcut(nn.Module):
    """Six channels meet twelve; where they do, and at which numbers, differs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.inside = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.wide = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.head = nn.Linear(12, 4)

    def meet(self, narrow: Tensor, wide: Tensor) -> Tensor:
        """(n, 6, …), (n, 12, …) -> (n, 12, …)."""
        return F.pad(narrow, (0, 0, 0, 0, 2, 4)) + wide

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 4)."""
        x = self.stem(x)
        out: Tensor = self.head(torch.relu(self.meet(x, self.wide(self.inside(x)))).mean((2, 3)))
        return out


class Filled(Shortcut):
    def meet(self, narrow: Tensor, wide: Tensor) -> Tensor:
        return torch.cat([narrow, narrow.new_zeros(narrow.size(0), 6, narrow.size(2), narrow.size(3))], 1) + wide


class Listed(Shortcut):
    def meet(self, narrow: Tensor, wide: Tensor) -> Tensor:
        zeros = torch.zeros((narrow.shape[0], 6, *narrow.shape[2:]), dtype=narrow.dtype)
        return torch.cat((zeros, narrow), dim=1) + wide


class Sliced(Shortcut):
    def meet(self, narrow: Tensor, wide: Tensor) -> Tensor:
        return torch.cat([wide[:, :3], wide[:, 3:9] + narrow, wide[:, 9:]], 1)


class Narrowed(Shortcut):
    def meet(self, narrow: Tensor, wide: Tensor) -> Tensor:
        return torch.cat([wide.narrow(1, 1, 6) * narrow, wide.narrow(1, 0, 1), wide.narrow(1, 7, 5)], 1)


class Split(Shortcut):
    def meet(self, narrow: Tensor, wide: Tensor) -> Tensor:
        a, b, c = wide.split([4, 6, 2], dim=1)
        return torch.cat([a, b + narrow, c], 1)


class Halved(Shortcut):
    def meet(self, narrow: Tensor, wide: Tensor) -> Tensor:
        return torch.cat([part + narrow for part in torch.split(wide, 6, 1)], 1)


class Layer(Shortcut):
    """The number stands in a layer of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = nn.ConstantPad3d((0, 0, 0, 0, 3, 3), 0.0)

    def meet(self, narrow: Tensor, wide: Tensor) -> Tensor:
        padded: Tensor = self.padded(narrow)
        return padded + wide


KINDS: tuple[type[Shortcut], ...] = (Shortcut, Filled, Listed, Sliced, Narrowed, Split, Halved, Layer)
BEYOND_FX = (Listed, Halved)  # torch.fx follows no sizes into torch.zeros, and no loop over the parts of a split


def network(kind: type[nn.Module] = Shortcut, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = kind().double()
    settle(model, inputs(16))
    return model


def inputs(n: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def thin(kind: type[nn.Module], seed: int = 0) -> tuple[nn.Module, ChannelGraph, Plan, nn.Module]:
    model = network(kind)
    graph = trace(model, inputs())
    plan = random_plan(graph, seed)
    return model, graph, plan, slim(model, graph, plan)


@pytest.mark.parametrize("kind", KINDS)
def test_all_channels_can_go_and_the_slim_network_is_exact(kind: type[nn.Module]) -> None:
    model = network(kind)
    graph = trace(model, inputs())
    assert set(graph.frozen.values()) == {"output of the network"}
    assert (graph.exported is None) == (kind not in BEYOND_FX)
    for seed in range(4):
        plan = random_plan(graph, seed)
        small = slim(model, graph, plan)
        assert prove(model, graph, plan, small, inputs()).max_relative_error < 1e-10
        assert torch.allclose(small(inputs(5, 3)), mask(model, graph, plan)(inputs(5, 3)), rtol=1e-9, atol=1e-10)
    half = slim(model, graph, Plan.uniform(graph, 0.5))
    assert isinstance(half, Exported if kind in BEYOND_FX else Symbolic) and half.get_parameter("wide.0.weight").shape[0] == 6
    assert trace(half, inputs()).macs < 0.45 * graph.macs


def test_the_users_class_stays_where_a_plan_leaves_the_numbers_alone() -> None:
    model = network()
    graph = trace(model, inputs())
    (inner,) = (g for g in graph.groups if g.channels == 8)
    (free,) = (g for g in graph.groups if g.members[0].parameter == "wide.0.weight")
    tied = next(g for g in graph.groups if g not in (inner, free))
    for keep, kind in (({inner.name: (0, 1), tied.name: (3, 5)}, Shortcut), ({free.name: (1, 2, 3, 4, 5)}, Symbolic)):
        plan = Plan(keep)
        small = slim(model, graph, plan)
        assert isinstance(small, kind)
        assert prove(model, graph, plan, small, inputs()).max_relative_error < 1e-10


def test_the_wrong_channels_are_refused() -> None:
    """The negative control: as many channels in front and behind together, but not the same ones."""
    model = network()
    graph = trace(model, inputs())
    free = next(g.name for g in graph.groups if g.members[0].parameter == "wide.0.weight")
    with pytest.raises(SlimError, match="differ by"):
        prove(model, graph, Plan({free: (0, 2, 3, 4, 5)}), slim(model, graph, Plan({free: (0, 1, 2, 3, 5)})), inputs())


def test_layers_and_their_names_stay_and_only_training_drops_out() -> None:
    model, _, _, _ = thin(Shortcut)
    model.train()
    graph = trace(model, inputs())
    small: Any = slim(model, graph, Plan.uniform(graph, 0.5))
    assert list(small.state_dict()) == list(model.state_dict()) and type(small.inside) is nn.Sequential
    assert small.training and all(m.training for m in small.modules())
    x = inputs(4)
    assert not torch.equal(small(x), small(x)), "dropout draws"
    small(x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    small.eval()
    assert torch.equal(small(x), small(x)) and torch.equal(copy.deepcopy(small)(x), small(x))


@pytest.mark.parametrize("kind", [Shortcut, Split])
def test_a_slim_network_can_be_pickled(kind: type[nn.Module], tmp_path: Path) -> None:
    """Twice, and it is still known how it was slimmed. Its annotations are postponed: fx alone cannot pickle what it writes then."""
    _, _, plan, small = thin(kind, 1)
    network = small
    for name in ("once.pt", "twice.pt"):
        torch.save(network, tmp_path / name)
        network = torch.load(tmp_path / name, weights_only=False)
    x = inputs(2)
    assert torch.equal(network.eval()(x), small.eval()(x)) and list(network.state_dict()) == list(small.state_dict())
    save(network, tmp_path / "slim.safetensors", plan=plan)
    assert torch.equal(copy.deepcopy(network)(x), small(x))


@pytest.mark.parametrize("kind", [Shortcut, Split])
def test_round_trips_are_exact_also_when_slimmed_twice(kind: type[nn.Module], tmp_path: Path) -> None:
    _, _, plan, small = thin(kind, 1)
    save(small, tmp_path / "once.safetensors", plan=plan)
    again = trace(small, inputs())
    second = random_plan(again, 2)
    smaller = slim(small, again, second)
    assert prove(small, again, second, smaller, inputs()).max_relative_error < 1e-10
    save(smaller, tmp_path / "twice.safetensors", plan=second)
    save(smaller, tmp_path / "whole.pt2", example_inputs=inputs())
    x = inputs(3, 5)
    assert torch.equal(load(tmp_path / "once.safetensors", model=network(kind, 7))(x), small(x))
    for source in (network(kind, 7), smaller):
        assert torch.equal(load(tmp_path / "twice.safetensors", model=source)(x), smaller(x))
    assert torch.equal(load(tmp_path / "whole.pt2")(x), smaller(x))


def test_an_exported_program_is_padded_by_other_amounts_too(tmp_path: Path) -> None:
    save(network(), tmp_path / "dense.pt2", example_inputs=inputs())
    model = load(tmp_path / "dense.pt2")
    graph = trace(model, inputs())
    for seed in range(3):
        plan = random_plan(graph, seed)
        small = slim(model, graph, plan)
        assert isinstance(small, Exported)
        assert prove(model, graph, plan, small, inputs()).max_relative_error < 1e-10
    assert trace(slim(model, graph, Plan.uniform(graph, 0.5)), inputs()).macs < 0.45 * graph.macs


class Draws(Shortcut):
    """What the opened forward does while it trains is in no graph of its eval mode."""

    def meet(self, narrow: Tensor, wide: Tensor) -> Tensor:
        return super().meet(F.dropout(narrow, 0.5, self.training), wide)


class Branches(Shortcut):
    def meet(self, narrow: Tensor, wide: Tensor) -> Tensor:
        return super().meet(narrow, wide) if narrow.shape[1] * 2 < wide.shape[1] + 99 else wide


@pytest.mark.parametrize("kind", [Draws, Branches])
def test_what_torch_fx_does_not_see_is_left_to_the_exporter(kind: type[nn.Module]) -> None:
    model, graph, plan, small = thin(kind, 2)
    assert graph.exported is not None and graph.written is None and isinstance(small, Exported)
    assert prove(model, graph, plan, small, inputs()).max_relative_error < 1e-10


def test_operations_are_found_in_the_code_that_asks_for_them() -> None:
    model = network()
    opened, nodes = located(model, (inputs(),), {"constant_pad_nd 0"})
    assert opened == ("",) and nodes == {"constant_pad_nd 0": "pad"}
    with pytest.raises(Unwritable):
        located(network(Branches), (inputs(),), {"constant_pad_nd 0"})
    graph = trace(model, inputs())
    assert graph.written is not None
    (axis,) = graph.written.axes
    stays = axis.channels < 0
    written: Any = symbolic(model, opened)
    with pytest.raises(Unwritable, match="no other number"):
        renumber(written, [(axis._replace(node="relu"), stays)])
