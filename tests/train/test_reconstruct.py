"""Reconstruction: what linear redundancy allows is recovered exactly, the rest gets better, nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.data import Augment, Split, load_data
from edgeprune.errors import DataError
from edgeprune.graph.cut import silent_constants
from edgeprune.graph.slim import slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from edgeprune.train.reconstruct import Recording, reconstruct
from tests import networks
from tests.colours import colour_data, colour_net
from tests.networks import NETWORKS, build
from tests.networks import images as noise


def train_split() -> Split:
    return colour_data(train=96).train


def batch() -> Tensor:
    return torch.cat([x for x, _ in colour_data(val=30).val.batches(30)])


class Twins(nn.Module):
    """Channel 5 of the first conv is channel 2 again; `norm` and `bias` choose where an intercept can go."""

    def __init__(self, *, norm: bool, bias: bool, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1, bias=bias, groups=groups)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            self.first.weight[5], self.first.bias[5] = self.first.weight[2], self.first.bias[2]  # type: ignore[index]
            if isinstance(self.norm, nn.BatchNorm2d):
                self.norm.load_state_dict(self.norm.state_dict() | {"running_mean": torch.rand(6), "running_var": 0.5 + torch.rand(6)})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.norm(self.second(x))).mean((2, 3)))  # type: ignore[no-any-return]


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(batch())
    return out


@pytest.mark.parametrize(("norm", "bias"), [(True, False), (False, True), (True, True), (False, False)])
def test_a_channel_that_stands_twice_is_recovered_exactly(norm: bool, bias: bool) -> None:
    model = Twins(norm=norm, bias=bias).eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    name = next(g.name for g in graph.groups if g.channels == 8)
    plan = Plan({name: (0, 1, 2, 3, 4, 6, 7)})
    small = slim(model, graph, plan)
    lost = float((outputs(small) - outputs(model)).abs().max())
    fitted = reconstruct(small, model, graph, plan, train_split(), ridges=(1e-9,))
    assert lost > 1e-3
    assert float((outputs(fitted) - outputs(model)).abs().max()) < 1e-4 * lost + 1e-5


def test_outputs_come_closer_and_nothing_else_changes() -> None:
    model = colour_net()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    plan = Plan.uniform(graph, keep=0.5)
    small = slim(model, graph, plan)
    before = [t.clone() for m in (small, model) for t in m.state_dict().values()]
    fitted = reconstruct(small, model, graph, plan, train_split())
    after = [t for m in (small, model) for t in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    gaps = [float((outputs(m) - outputs(model)).pow(2).mean()) for m in (small, fitted)]
    assert gaps[1] < 0.5 * gaps[0]
    assert not fitted.training
    again = reconstruct(small, model, graph, plan, train_split())
    assert all(torch.equal(a, b) for a, b in zip(fitted.state_dict().values(), again.state_dict().values(), strict=True))


def test_labels_are_not_needed() -> None:
    model = colour_net()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    plan = Plan.uniform(graph, keep=0.5)
    small = slim(model, graph, plan)
    with_labels = reconstruct(small, model, graph, plan, train_split())
    without = reconstruct(small, model, graph, plan, colour_data(train=96, labelled=False).train)
    for a, b in zip(with_labels.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_grouped_convs_are_fitted_group_by_group() -> None:
    model = Twins(norm=True, bias=False, groups=2).eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    plan = Plan.uniform(graph, keep=0.5)
    small = slim(model, graph, plan)
    fitted = reconstruct(small, model, graph, plan, train_split())
    gaps = [float((outputs(m) - outputs(model)).pow(2).mean()) for m in (small, fitted)]
    assert gaps[1] < gaps[0]


def test_a_whole_plan_changes_nothing() -> None:
    model = colour_net()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    plan = Plan.uniform(graph, keep=1.0)
    fitted = reconstruct(model, model, graph, plan, train_split())
    assert torch.equal(outputs(fitted), outputs(model))


def test_no_images_is_an_error() -> None:
    model = colour_net()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    plan = Plan.uniform(graph, keep=0.5)
    with pytest.raises(DataError, match="calibration images"):
        reconstruct(slim(model, graph, plan), model, graph, plan, train_split().subset([]))


class Depthwise(nn.Module):
    """The depthwise conv reads channels that lost half of what they were made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 1)
        self.each = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(self.norm(self.each(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_of_depthwise_convs_the_scale_of_each_channel_is_refitted() -> None:
    model = Depthwise().eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    small = slim(model, graph, Plan({"first": (0, 1, 2, 3)}))
    fitted = reconstruct(small, model, graph, Plan({"first": (0, 1, 2, 3)}), train_split(), ridges=(1e-9,))
    factors = fitted.state_dict()["each.weight"] / small.state_dict()["each.weight"]
    assert float((factors - factors.mean((1, 2, 3), keepdim=True)).abs().max()) < 1e-5
    assert float((factors - 1).abs().max()) > 1e-3
    images = torch.cat([x for x, _ in train_split().batches(32)])
    with torch.no_grad():
        wanted = model.each(torch.relu(model.second(torch.relu(model.first(images)))))
        made = fitted.each(torch.relu(fitted.second(torch.relu(fitted.first(images)))))  # type: ignore[operator]
    for channel in range(6):  # no factor and shift bring it closer
        x, y = (t[:, channel].flatten().numpy() for t in (made, wanted))
        if x.std() > 1e-6:  # some are dead behind the ReLU
            assert np.cov(x, y)[0, 1] / x.var(ddof=1) == pytest.approx(1, abs=1e-3)


def test_the_norms_own_epsilon_counts() -> None:
    """A large one (1e-1) where gain and spread decide what a residual sum lacks."""

    def lost_and_left(eps: float) -> tuple[float, float]:
        model = colour_net()
        for norm in (model.a_norm, model.b_norm, model.c_norm):
            norm.eps = eps
            norm.running_var.copy_(0.05 + torch.zeros_like(norm.running_var))  # type: ignore[union-attr, arg-type]
        graph = trace(model, torch.zeros(1, 3, 8, 8))
        plan = Plan.uniform(graph, keep=0.5)
        small = slim(model, graph, plan)
        fitted = reconstruct(small, model, graph, plan, train_split())
        lost, left = (float((outputs(m) - outputs(model)).pow(2).mean()) for m in (small, fitted))
        return lost, left

    lost, left = lost_and_left(0.1)
    assert left < 0.3 * lost


def test_augmented_images_are_other_images() -> None:
    model = colour_net()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    plan = Plan.uniform(graph, keep=0.5)
    small = slim(model, graph, plan)
    plain = reconstruct(small, model, graph, plan, train_split())
    varied = reconstruct(small, model, graph, plan, train_split(), augment=Augment(crop_padding=1, flip=True))
    gaps = [float((outputs(m) - outputs(model)).pow(2).mean()) for m in (small, plain, varied)]
    assert gaps[1] != gaps[2] and gaps[2] < 0.5 * gaps[0]


PICTURES = [name for name, network in NETWORKS.items() if len(network.inputs) == 1 and len(network.inputs[0]) == 3]


@pytest.mark.parametrize("name", PICTURES)
def test_every_network_comes_closer(name: str) -> None:
    model = build(name, dtype=torch.float32)
    graph = trace(model, noise(name, dtype=torch.float32))
    plan = Plan.uniform(graph, keep=0.5)
    small = slim(model, graph, plan)
    (x,) = noise(name, 96, dtype=torch.float32)
    data = load_data(tuple((part.numpy(), np.arange(len(part)) % 2) for part in (x, x[:4])))
    fitted = reconstruct(small, model, graph, plan, data.train, augment=None)
    dense, before, after = (networks.outputs(m, (x,))[0] for m in (model, small, fitted))
    assert float((after - dense).square().mean()) < 0.95 * float((before - dense).square().mean())


class WritesNumbers(Twins):
    """The same computation, with the numbers of channels in the code: the slim network is the exported one."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat(torch.relu(self.first(x)).split([3, 5], 1), 1)
        return self.head(torch.relu(self.norm(self.second(h))).view(-1, 6, 64).mean(2))  # type: ignore[no-any-return]


def test_networks_with_numbers_in_their_code_are_refitted_too() -> None:
    model = WritesNumbers(norm=True, bias=False).eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    assert graph.exported is not None
    name = next(g.name for g in graph.groups if g.channels == 8)
    plan = Plan({name: (0, 1, 2, 3, 4, 6, 7)})
    small = slim(model, graph, plan)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    lost = float((outputs(small) - outputs(model)).abs().max())
    fitted = reconstruct(small, model, graph, plan, train_split(), ridges=(1e-9,))
    assert float((outputs(fitted) - outputs(model)).abs().max()) < 1e-4 * lost + 1e-5


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_one_run_of_the_dense_network_serves_every_plan(name: str) -> None:
    model = build(name, dtype=torch.float32)
    graph = trace(model, noise(name, dtype=torch.float32))
    images = noise(name, 64, dtype=torch.float32)
    every = Recording.of(model, graph, images)
    for keep in (0.4, 0.8):
        plan = Plan.uniform(graph, keep)
        small = slim(model, graph, plan)
        fitted, alone = (r.refitted(small, plan) for r in (every, Recording.of(model, graph, images, plan=plan)))
        assert all(torch.equal(a, b) for a, b in zip(fitted.state_dict().values(), alone.state_dict().values(), strict=True))


def test_pulled_towards_what_the_dense_network_tells_few_rows_do() -> None:
    """However hard the pull: what the moments give already makes up for a channel that stands twice."""
    model = Twins(norm=True, bias=False).eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    plan = Plan({next(g.name for g in graph.groups if g.channels == 8): (0, 1, 2, 3, 4, 6, 7)})
    small = slim(model, graph, plan)
    lost = float((outputs(small) - outputs(model)).abs().max())
    left = []
    for substitutes in (False, True):
        recording = Recording.of(model, graph, (batch(),), substitutes=substitutes)
        fitted = recording.refitted(small, plan, ridges=(100.0,))
        left.append(float((outputs(fitted) - outputs(model)).abs().max()))
    assert left[1] < 0.02 * lost < left[0]


BRANCHED = ["residual", "bottleneck", "grouped", "mobile", "option_a", "sum_and_slice", "attention"]


@pytest.mark.parametrize("name", BRANCHED)
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_networks_without_branches_come_closer(name: str, share: float) -> None:
    model = build(name, dtype=torch.float32)
    graph = trace(model, noise(name, dtype=torch.float32))
    plan = Plan({**Plan.uniform(graph, share).keep, **dict.fromkeys(graph.branches, ())})
    small = slim(model, graph, plan)
    before = {key: tensor.clone() for key, tensor in small.state_dict().items()}
    fitted = Recording.of(model, graph, noise(name, 256, dtype=torch.float32), plan=plan, in_pairs=True).refitted(small, plan)
    fresh = noise(name, 64, seed=5, dtype=torch.float32)
    wanted, cut, mended = (networks.outputs(net, fresh)[0] for net in (model, small, fitted))
    assert float((mended - wanted).square().mean()) < 0.9 * float((cut - wanted).square().mean())
    assert list(fitted.state_dict()) == list(before) and all(torch.equal(t, small.state_dict()[key]) for key, t in before.items())
    again = Recording.of(model, graph, noise(name, 256, dtype=torch.float32), in_pairs=True).refitted(small, plan)
    one, other = networks.outputs(again, fresh)[0], mended
    assert torch.allclose(one, other, atol=1e-3), "a recording for any plan serves this one"
    held = {tensor for branch in graph.branches.values() for end in branch.ends for tensor in end.held}
    assert silent_constants(fitted) == held and not silent_constants(small), "the layers behind make up for the constants"


class Branch(nn.Module):
    """A residual block whose sum is the output: nothing comes behind it that could mend it."""

    def __init__(self, *, norm: bool, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.outer(torch.relu(self.inner(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("norm", "bias"), [(True, False), (False, True), (True, True), (False, False)])
def test_the_constant_is_the_mean_of_what_the_branch_gave(norm: bool, bias: bool) -> None:
    model = Branch(norm=norm, bias=bias).eval()
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3)) + 0.5
    graph = trace(model, x)
    plan = Plan({"inner": ()})
    small = slim(model, graph, plan)
    fitted = Recording.of(model, graph, (x,), plan=plan).refitted(small, plan)
    with torch.no_grad():
        gave, constant, before = model(x) - x, fitted(x) - x, small(x) - x
    assert float((constant - constant.mean((0, 2, 3), keepdim=True)).abs().max()) < 1e-5
    if norm or bias:
        assert torch.allclose(constant.mean((0, 2, 3)), gave.mean((0, 2, 3)), atol=1e-4)
    else:
        assert torch.equal(constant, before) and not before.any(), "nothing can hold it"
