"""Branches that leave the network's code, however it adds them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import SlimError
from edgeprune.graph.cut import lacking, offered
from edgeprune.graph.exported import Exported
from edgeprune.graph.slim import mask, prove, slim
from edgeprune.graph.symbolic import Symbolic
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.networks import CLASSES, Head, conv_bn, gap, images, outputs, settle, traced

BRANCHED = ["residual", "bottleneck", "grouped", "option_a", "mobile", "sum_and_slice", "attention"]
TOLERANCE = 1e-10


def vanished(graph: Any) -> Plan:
    return Plan(dict.fromkeys(graph.branches, ()))


@pytest.mark.parametrize("name", BRANCHED)
def test_without_its_branches_a_network_computes_what_the_mask_says(name: str) -> None:
    model, graph = traced(name)
    plan = vanished(graph)
    small = slim(model, graph, plan)
    assert prove(model, graph, plan, small, images(name)).max_relative_error <= TOLERANCE
    assert isinstance(small, Exported) if graph.exported else type(small) is type(model)
    thin = trace(small, images(name, 2))
    assert not thin.branches and not any(0 in shape for shape in thin.shapes.values())
    stopped = {number for branch in graph.branches.values() for number in branch.ops}
    running = [op.name for number, op in enumerate(graph.ops) if number not in stopped]
    assert [op.name for op in thin.ops] == running, "what ran for a branch alone does not run"


class Block(nn.Module):
    """A residual block that puts its branch and its shortcut together in a way of its own."""

    def __init__(self, put: Callable[[Block, Tensor], Tensor], bias: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(0.2)
        self.put = put

    def branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.put(self, x)


def in_place(block: Block, x: Tensor) -> Tensor:
    out = block.branch(x)
    out += x
    return F.relu(out, inplace=True)


def onto_the_shortcut(block: Block, x: Tensor) -> Tensor:
    x = x.clone()
    x += block.branch(x)
    return x


def dropped(block: Block, x: Tensor) -> Tensor:
    return torch.add(x, block.drop(block.branch(x)))


def by_method(block: Block, x: Tensor) -> Tensor:
    return block.branch(x).add_(x)


def doubled(block: Block, x: Tensor) -> Tensor:
    return torch.add(x, block.branch(x), alpha=2)


def branching(block: Block, x: Tensor) -> Tensor:
    return x + block.branch(x) if bool((x.sum() > -1e9).item()) else x


def training_differs(block: Block, x: Tensor) -> Tensor:
    return x + block.branch(x) if not block.training else 2 * x + block.branch(x)


def network(put: Callable[[Block, Tensor], Tensor], **options: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Head(nn.Sequential(conv_bn(3, 8), Block(put, **options)), 8).double()
        settle(model, *images("residual", 16))
    return model


@pytest.mark.parametrize("put", [in_place, onto_the_shortcut, dropped, by_method])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"bias": True, "norm": False}, {"norm": False}], ids=str)
def test_any_way_to_add_is_understood(put: Callable[[Block, Tensor], Tensor], options: dict[str, bool]) -> None:
    model, x = network(put, **options), images("residual", 2)
    graph = trace(model, x)
    plan = vanished(graph)
    assert list(plan.keep) == ["body.1.conv1"]
    small: Any = slim(model, graph, plan)
    assert gap(mask(model, graph, plan), small, x, images("residual", 2, seed=7)) <= TOLERANCE
    constant = [name for name in small.state_dict() if name.startswith("body.1")]
    norm = [f"body.1.bn2.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")] if options.get("norm", True) else []
    assert set(constant) == {*norm, *(["body.1.conv2.bias"] if options.get("bias") else [])}, "all that makes the constant, under its names"
    assert torch.equal(x[0], images("residual", 2)[0]), "nothing is written into what the block is given"


def test_the_network_is_the_user_s_own_around_the_block() -> None:
    model, x = network(in_place), images("residual", 2)
    graph = trace(model, x)
    small: Any = slim(model, graph, vanished(graph))
    assert type(small) is Head and isinstance(small.get_submodule("body.1"), Symbolic)
    assert type(small.get_submodule("body.0.0")) is nn.Conv2d
    again = pickle.loads(pickle.dumps(small))
    for twin in (again, copy.deepcopy(small)):
        assert torch.equal(outputs(twin, x)[0], outputs(small, x)[0])
        assert lacking(twin) == lacking(small) != []
    model.train()
    assert all(m.training for m in slim(model, graph, vanished(graph)).modules())


def test_what_is_left_of_a_branch_learns() -> None:
    model, x = network(in_place, bias=True), images("residual", 8)
    graph = trace(model, x)
    small = slim(model, graph, vanished(graph)).train()
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    step = torch.optim.SGD(small.parameters(), lr=0.1)
    F.cross_entropy(small(*x), torch.arange(8) % CLASSES).backward()
    step.step()
    assert all(not torch.equal(p, before[name]) for name, p in small.named_parameters() if name.startswith("body.1"))
    statistics = small.get_buffer("body.1.bn2.running_mean")
    assert torch.equal(statistics, model.get_buffer("body.1.bn2.running_mean")), "no statistics of zeros"


@pytest.mark.parametrize(("put", "reason"), [(branching, "its code"), (training_differs, "something else while it trains")])
def test_code_that_cannot_be_written_down_keeps_its_branch(put: Callable[[Block, Tensor], Tensor], reason: str) -> None:
    model, x = network(put), images("residual")
    graph = trace(model, x)
    assert list(graph.branches) == ["body.1.conv1"]
    with pytest.raises(SlimError, match=r"cannot leave the network's code.*--min-channels 1"):
        slim(model, graph, vanished(graph))
    fewer = offered(model, graph)
    assert not fewer.branches and list(fewer.stuck) == ["body.1.conv1"]
    with pytest.raises(SlimError, match="at least one must stay"):
        slim(model, fewer, vanished(graph))
    assert offered(*traced("residual")) is traced("residual")[1]


def test_a_sum_that_scales_is_left_alone() -> None:
    model, x = network(doubled), images("residual")
    graph = trace(model, x)
    with pytest.raises(SlimError, match="cannot leave"):
        slim(model, graph, vanished(graph))


@pytest.mark.parametrize("name", BRANCHED)
def test_a_wrong_constant_is_caught(name: str) -> None:
    model, graph = traced(name)
    plan = vanished(graph)
    small = slim(model, graph, plan)
    (end, *_) = next(iter(graph.branches.values())).ends
    with torch.no_grad():
        dict([*small.named_parameters(), *small.named_buffers()])[end.held[-1] if end.bias else f"{end.norm}running_mean"].add_(1e-3)
    with pytest.raises(SlimError, match="differ by"):
        prove(model, graph, plan, small, images(name))
