from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeprune.device.kernels import kernels
from edgeprune.errors import SlimError
from edgeprune.graph import ChannelGraph
from edgeprune.graph.exported import Exported
from edgeprune.graph.slim import borrowed, mask, prove, slim
from edgeprune.graph.symbolic import Symbolic
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.networks import NETWORKS, build, gap, images, outputs, random_plan, settle, traced

TOLERANCE = 1e-10


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_slim_network_computes_what_the_masked_one_computes(name: str, seed: int) -> None:
    model, graph = traced(name)
    # At most half of each group: a plan that leaves one dead channel would compare constants.
    plan = half_random(graph, seed)
    small, twin = slim(model, graph, plan), mask(model, graph, plan)
    own = type(small) is type(model) or (graph.written is not None and isinstance(small, Symbolic))
    assert isinstance(small, Exported) if graph.exported else own
    assert gap(twin, small, images(name, 3, seed=5), images(name, 3, seed=6)) <= TOLERANCE
    for dense, thin in zip(outputs(model, images(name, 2)), outputs(small, images(name, 2)), strict=True):
        assert dense.shape == thin.shape
    assert prove(model, graph, plan, small, images(name)).max_relative_error <= TOLERANCE


def half_random(graph: ChannelGraph, seed: int) -> Plan:
    rng = np.random.default_rng(seed)
    keep = {}
    for group in graph.groups:
        n = int(rng.integers((group.channels + 1) // 2, group.channels + 1))
        keep[group.name] = tuple(sorted(rng.choice(group.channels, n, replace=False).tolist()))
    return Plan(keep)


@pytest.mark.parametrize("name", ["residual", "bottleneck", "mobile", "dense", "shuffle", "option_a", "squeeze_excite", "attention"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_plan_is_computed_exactly(name: str, data: st.DataObject) -> None:
    model, graph = traced(name)
    keep = {}
    for g in graph.groups:
        channels = st.sets(st.integers(0, g.channels - 1), min_size=0 if g.name in graph.branches else 1)
        keep[g.name] = tuple(sorted(data.draw(channels, label=g.name)))
    plan = Plan(keep)
    assert prove(model, graph, plan, slim(model, graph, plan), images(name)).max_relative_error <= TOLERANCE


@pytest.mark.parametrize("name", ["plain", "residual", "dense", "shuffle", "grouped", "flatten", "transposed"])
def test_a_wrong_slim_network_is_caught(name: str) -> None:
    """The negative control: the same widths, other channels in one group."""
    model = build(name)
    graph = trace(model, images(name))
    keep = {g.name: tuple(range(g.channels // 2)) for g in graph.groups if g.channels > 1}
    first = next(iter(keep))
    shifted = {**keep, first: tuple(c + 1 for c in keep[first])}
    wrong = slim(model, graph, Plan(shifted))
    with pytest.raises(SlimError, match="differ by"):
        prove(model, graph, Plan(keep), wrong, images(name))


def test_one_wrong_parameter_is_caught() -> None:
    model = build("residual")
    graph = trace(model, images("residual"))
    plan = random_plan(graph, 3)
    small = slim(model, graph, plan)
    with torch.no_grad():
        norm = next(m for m in small.modules() if isinstance(m, nn.BatchNorm2d))
        assert norm.running_mean is not None
        norm.running_mean[0] += 1e-4
    with pytest.raises(SlimError, match="differ by"):
        prove(model, graph, plan, small, images("residual"))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_dense_plan_changes_nothing(name: str) -> None:
    model = build(name)
    graph = trace(model, images(name))
    same = slim(model, graph, Plan.uniform(graph, keep=1.0))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[key])
    for a, b in zip(outputs(model, images(name)), outputs(same, images(name)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_slim_and_mask_leave_the_model_alone(name: str) -> None:
    model = build(name).train()
    graph = trace(model, images(name))
    before, modes, state = snapshot(model), [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    plan = random_plan(graph, 4)
    small = slim(model, graph, plan)
    mask(model, graph, plan)
    prove(model, graph, plan, small, images(name))
    assert snapshot(model) == before
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert all(m.training for m in small.modules()), "the slim network is in the mode that the dense one is in"
    shared = {t.data_ptr() for t in model.state_dict().values() if t.numel()} & {t.data_ptr() for t in small.state_dict().values()}
    assert not shared, "the slim network must own its memory"


def snapshot(model: nn.Module) -> list[Any]:
    """Attribute names, hooks and the identity of all tensors."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    return [[sorted(vars(m)) for m in model.modules()], hooks, [id(t) for t in (*model.parameters(), *model.buffers())]]


def test_layers_remember_their_new_sizes() -> None:
    model = build("squeeze_excite")
    graph = trace(model, images("squeeze_excite"))
    small = slim(model, graph, Plan.uniform(graph, 0.5))
    convs = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.groups) for c in convs] == [
        (3, 4, 1),
        (4, 8, 1),
        (8, 8, 8),
        (8, 2, 1),
        (2, 8, 1),
        (8, 4, 1),
    ]
    assert all(c.weight.shape[:2] == (c.out_channels, c.in_channels // c.groups) for c in convs)
    assert {m.num_features for m in small.modules() if isinstance(m, nn.BatchNorm2d)} == {4, 8}
    small_signal = slim(m1 := build("conv1d"), g1 := trace(m1, images("conv1d")), Plan.uniform(g1, 0.5))
    assert next(m.num_parameters for m in small_signal.modules() if isinstance(m, nn.PReLU)) == 4


def test_shared_weights_stay_shared() -> None:
    model = build("twice")
    graph = trace(model, images("twice"))
    small = slim(model, graph, Plan.uniform(graph, 0.5))
    body: Any = small.body
    assert body.left.weight is body.right.weight
    assert body.left.weight.shape == (3, 4, 1, 1)


def test_frozen_parameters_stay_frozen_and_others_train() -> None:
    model = build("plain")
    first = next(model.parameters()).requires_grad_(False)
    graph = trace(model, images("plain"))
    small = slim(model, graph, Plan.uniform(graph, 0.5))
    flags = [p.requires_grad for p in small.parameters()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not flags[0] and first.grad is None
    small.train()(*images("plain", 4)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in small.parameters())


def test_option_a_removing_a_dead_channel_changes_nothing() -> None:
    """Zero-padded shortcuts shift channels: channel i of the stem meets channel i + 4 behind the shortcut."""
    model = build("option_a")
    body: Any = model.body
    with torch.no_grad():
        for norm, channel in ((body.stem[1], 3), (body.b[1], 3 + body.extra)):
            norm.weight[channel], norm.bias[channel] = 0, 0
    graph = trace(model, images("option_a"))
    stem = next(g for g in graph.groups if g.name == "body.stem.0")
    plan = Plan({stem.name: tuple(c for c in range(8) if c != 3)})
    small: Any = slim(model, graph, plan)
    assert small.body.b[0].weight.shape[0] == 15
    x = images("option_a", 4)
    assert torch.allclose(outputs(small, x)[0], outputs(model, x)[0], rtol=0, atol=1e-14)
    live: Any = slim(model, graph, Plan({stem.name: tuple(c for c in range(8) if c != 2)}))
    assert not torch.allclose(outputs(live, x)[0], outputs(model, x)[0], rtol=0, atol=1e-6)


def test_foreign_and_impossible_plans_are_refused() -> None:
    model = build("plain")
    graph = trace(model, images("plain"))
    name = graph.groups[0].name
    with pytest.raises(SlimError, match="nowhere"):
        slim(model, graph, Plan({"nowhere": (0,)}))
    assert name not in graph.branches
    for bad in ((), (-1, 0), (0, 8)):
        with pytest.raises(SlimError, match="at least one must stay"):
            slim(model, graph, Plan({name: bad}))


def test_a_channel_that_is_named_twice_stays_once() -> None:
    model, graph = traced("plain")
    twice: Any = slim(model, graph, Plan({graph.groups[0].name: (5, 1) * 4}))
    assert twice.body[0][0].weight.shape[0] == 2


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.lines = (n for n in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    model = Uncopyable()
    graph = trace(model, torch.randn(1, 3, 4, 4))
    with pytest.raises(SlimError, match="cannot be copied"):
        slim(model, graph, Plan.uniform(graph, 0.5))


def test_outputs_that_hardly_move_are_judged_by_their_size() -> None:
    """With integer inputs both samples of the proof are the same, so the output does not move at all."""
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(40, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = torch.randint(0, 10, (2, 5))
    graph = trace(model, x)
    for seed in range(6):
        plan = random_plan(graph, seed)
        assert prove(model, graph, plan, slim(model, graph, plan), x).max_relative_error <= TOLERANCE
    half = Plan.uniform(graph, 0.5)
    wrong = slim(model, graph, Plan({"2": tuple(c + 1 for c in half.keep["2"])}))
    with pytest.raises(SlimError, match="differ by"):
        prove(model, graph, half, wrong, x)


class Normalising(nn.Module):
    """Writes into its input, as some preprocessing does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x.sub_(0.5).mul_(3)))
        return out


def test_inputs_are_not_written_to() -> None:
    model = Normalising().double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    before = x.clone()
    graph = trace(model, x)
    plan = Plan.uniform(graph, 0.5)
    assert prove(model, graph, plan, slim(model, graph, plan), x).max_relative_error <= TOLERANCE
    assert torch.equal(x, before)


PEERS = ["resnet18", "mobilenet_v2", "efficientnet_b0", "googlenet", "shufflenet_v2_x1_0", "densenet121"]
TIMM = ["ghostnet_100", "mixnet_s", "res2net50_26w_4s"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*PEERS, *TIMM])
def test_public_networks_are_slimmed_exactly(name: str, torchvision: Any) -> None:
    if name in TIMM:
        model = pytest.importorskip("timm").create_model(name)
    else:
        model = getattr(torchvision.models, name)(weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    x, y, batch = (torch.randn(n, 3, 64, 64, dtype=torch.float64) for n in (1, 1, 4))
    settle(model.double(), batch)
    graph = trace(model, x)
    plan = half_random(graph, 0)
    small = slim(model, graph, plan)
    assert gap(mask(model, graph, plan), small, (x,), (y,)) <= TOLERANCE
    thin = trace(small, x)
    widths = np.array([len(plan.keep[g.name]) for g in graph.groups])
    assert (kernels(graph).macs(widths)[0], kernels(graph).params(widths)[0]) == (thin.macs, thin.params)
    assert thin.macs < graph.macs


@pytest.mark.parametrize("name", ["residual", "option_a", "sum_and_slice", "attention"])
def test_a_network_without_branches_is_pruned_again(name: str) -> None:
    """And the branches of a network that was thinned before may still go."""
    model, graph = traced(name)
    half, empty = Plan.uniform(graph, 0.5), Plan(dict.fromkeys(graph.branches, ()))
    for first, then in ((empty, None), (half, empty)):
        small = slim(model, graph, first)
        later = trace(small, images(name))
        plan = Plan.uniform(later, 0.5) if then is None else then
        smaller = slim(small, later, plan)
        assert prove(small, later, plan, smaller, images(name)).max_relative_error <= TOLERANCE
        assert trace(smaller, images(name)).macs < later.macs < graph.macs


@pytest.mark.parametrize("name", ["residual", "grouped", "option_a"])
def test_a_borrowed_network_is_the_slim_one_with_views_of_the_dense_weights(name: str) -> None:
    model, graph = traced(name)
    first = Plan({g.name: tuple(range((g.channels + 1) // 2)) for g in graph.groups})
    small, lent = slim(model, graph, first), borrowed(model, graph, first)
    assert type(lent).__name__ == type(small).__name__
    for own, theirs in zip(outputs(small, images(name, 2)), outputs(lent, images(name, 2)), strict=True):
        assert torch.equal(own, theirs)
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    views = [p.untyped_storage().data_ptr() in memory for p in lent.parameters()]
    assert any(views) and not any(p.untyped_storage().data_ptr() in memory for p in small.parameters())
    assert lent.get_parameter("fc.bias") is model.get_parameter("fc.bias"), "what stays whole is not even copied"
