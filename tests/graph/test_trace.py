from __future__ import annotations

import copy
import gc
import importlib
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.device.kernels import kernels
from edgeprune.errors import TraceError
from edgeprune.graph import ChannelGraph
from edgeprune.graph.slim import prove, slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.networks import NETWORKS, Head, Shuffle, build, conv_bn, images, random_plan, traced


def same_graph(a: ChannelGraph, b: ChannelGraph) -> bool:
    members = [[(m.parameter, m.axis, m.indices.tolist()) for g in graph.groups for m in g.members] for graph in (a, b)]
    return members[0] == members[1] and (a.ops, a.activations, a.frozen, a.shapes) == (b.ops, b.activations, b.frozen, b.shapes)


@pytest.mark.parametrize("name", NETWORKS)
def test_tracing_is_deterministic_and_takes_one_sample_of_a_batch(name: str) -> None:
    model, graph = traced(name)
    assert same_graph(graph, trace(build(name), images(name)))
    assert same_graph(graph, trace(model, images(name, 4)))
    assert all(a.shape[0] == 1 for a in (graph.activations[i] for i in graph.input_activations))


@pytest.mark.parametrize("name", NETWORKS)
def test_tracing_leaves_the_model_alone(name: str) -> None:
    model = build(name)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    x = images(name)
    before = [t.clone() for t in x]
    flags, random, pace = [p.requires_grad for p in model.parameters()], torch.get_rng_state(), gc.get_threshold()
    trace(model, x)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert gc.get_threshold() == pace
    assert [m.training for m in model.modules()] == modes
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == tensors
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))
    assert all(p.grad is None for p in model.parameters())


EXPECTED: dict[str, dict[str, int]] = {
    "plain": {"body.0.0": 8, "body.2.0": 12, "body.3.0": 6},
    "residual": {"body.0.0": 8, "body.1.a.0": 8, "body.2.a.0": 8},
    "option_a": {"body.stem.0": 8, "body.a.0": 16, "body.b.0": 8},
    "mobile": {"body.0.0": 8, "body.1.a.0": 16, "body.2.a.0": 12},
    "squeeze_excite": {"body.0.0": 8, "body.1.a.0": 16, "body.1.se.down": 4},
    "dense": {"body.0.0": 6, "body.1.conv": 4, "body.2.conv": 4, "body.4.0": 7},
    "shuffle": {"body.0.0": 2, "body.1.branch.0.0": 4, "body.2.branch.0.0": 4, "body.3.0": 6},
    "grouped": {"body.0.0": 8, "body.1.down.0": 10, "body.1.a.0": 4, "body.1.b.0": 4},
    "twice": {"body.stem": 8, "body.left": 6},
    "transposed": {"stem.0": 6, "down.0": 8, "up": 5},
    "grouped_transposed": {"body.0.0": 4, "body.2.0": 3, "body.3.0": 5},
    "literal_flatten": {"conv1": 6, "conv2": 9, "fc1": 12},
    "flatten": {"conv1": 6, "conv2": 9, "fc1": 12},
    "conv1d": {"a": 8, "b": 6},
    "mlp": {"0": 10, "3": 7},
    "two_in_two_out": {"image.0": 8, "mid": 6},
    "sum_and_slice": {"body.a.0": 5, "body.a.0#2": 3, "body.left": 6, "body.free.0": 7},
    "attention": {"patch": 8, "up": 32},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_are_the_known_ones(name: str) -> None:
    assert {g.name: g.channels for g in traced(name)[1].groups} == EXPECTED[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_removable_position_belongs_to_one_channel(name: str) -> None:
    graph = traced(name)[1]
    seen: set[tuple[str, int, int]] = set()
    for group in graph.groups:
        assert group.channels > 1 and group.producing >= 1
        for member in group.members:
            assert member.indices.shape[0] == group.channels
            assert member.indices.max() < graph.shapes[member.parameter][member.axis]
            positions = {(member.parameter, member.axis, int(i)) for i in member.indices.reshape(-1)}
            assert len(positions) == member.indices.size and not positions & seen
            seen |= positions


def test_flattening_gives_a_channel_all_its_columns() -> None:
    graph = traced("flatten")[1]
    group = next(g for g in graph.groups if g.name == "conv2")
    columns = next(m for m in group.members if m.parameter == "fc1.weight")
    assert columns.axis == 1
    assert columns.indices.tolist() == np.arange(9 * 16).reshape(9, 16).tolist()


def test_what_stays_is_named_with_a_reason() -> None:
    assert traced("plain")[1].frozen == {"fc.weight[0]": "output of the network"}
    assert traced("literal_flatten")[1].frozen == {"fc2.weight[0]": "output of the network"}
    attention = traced("attention")[1].frozen
    assert attention == {"qkv.weight[0]": "attention heads stay whole", "fc.weight[0]": "output of the network"}
    for name in NETWORKS:
        graph = traced(name)[1]
        for axis, reason in graph.frozen.items():
            parameter, _, number = axis.removesuffix("]").partition("[")
            assert int(number) < len(graph.shapes[parameter])
            assert len(reason) > 10 and "\n" not in reason


# Legal networks of odd kinds: what no rule understands stays, with a reason, and nothing crashes.


class Net(nn.Module):
    """conv a (3 -> 8) and conv b (8 -> 4) with something in between."""

    middle = 8

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(self.middle, 4, 1)

    def between(self, h: Tensor) -> Tensor:
        return F.relu(h)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.between(self.a(x)))


class Noisy(Net):
    def between(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5, training=True)


def test_tracing_draws_no_random_numbers_from_the_program() -> None:
    model, before = Noisy(), torch.get_rng_state()
    assert [g.channels for g in trace(model, X).groups] == [8]
    assert torch.equal(torch.get_rng_state(), before)


class DictInput(Net):
    def forward(self, x: dict[str, Tensor]) -> Any:  # type: ignore[override]
        return super().forward(x["image"])


@dataclass
class Answer:
    logits: Tensor
    features: Tensor


class DataclassOutput(Net):
    def forward(self, x: Tensor) -> Answer:
        h = self.between(self.a(x))
        return Answer(self.b(h), h.mean())


class Buffers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(8) + 0.5)
        self.shift = nn.Parameter(torch.rand(8, 1, 1))

    def between(self, h: Tensor) -> Tensor:
        scale = self.get_buffer("scale")
        return h * scale[None, :, None, None] + self.shift


class WritesThroughViews(Net):
    def between(self, h: Tensor) -> Tensor:
        h[:, :, 1:3].add_(1.0)
        h[:, :, 0] = 0
        return h.mul_(2).relu_()


class WritesIntoChannels(Net):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(8, 4, 1)

    def between(self, h: Tensor) -> Tensor:
        k = self.c(h)
        h = h.clone()
        h[:, :4] += k
        return h


class ScalarParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor(2.0))

    def between(self, h: Tensor) -> Tensor:
        return h * self.t / self.t.item()


class Branches(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + 1 if bool(h.abs().sum() > 0) else h


class BooleanIndex(Net):
    def between(self, h: Tensor) -> Tensor:
        return h[h.flatten(1).amax(1) > -1e9]


class LiteralSplit(Net):
    middle = 4

    def between(self, h: Tensor) -> Tensor:
        parts: tuple[Tensor, ...] = h.split(4, 1)
        return parts[0] * parts[1]


class Chunk(LiteralSplit):
    def between(self, h: Tensor) -> Tensor:
        left, right = h.chunk(2, 1)
        return left * right


class Assertion(Net):
    def between(self, h: Tensor) -> Tensor:
        assert h.shape[1] == 8
        return h


class Gated(Net):
    middle = 4

    def between(self, h: Tensor) -> Tensor:
        return F.glu(h, 1)


class ChannelAttention(Net):
    """ECA: a 1-d conv that runs along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(1, 1, 3, padding=1)

    def between(self, h: Tensor) -> Tensor:
        weight: Tensor = torch.sigmoid(self.along(h.mean((2, 3))[:, None]))
        return h * weight.transpose(1, 2)[..., None]


class SpatialAttention(Net):
    def between(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(h.mean(1, keepdim=True))


class Recurrent(Net):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.rnn, self.fc = kind(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.rnn(self.a(x).flatten(2).transpose(1, 2))[0][:, -1])


def test_a_recurrent_layer_reads_fewer_channels_and_keeps_its_width() -> None:
    torch.manual_seed(0)
    model, x = Recurrent(nn.LSTM).eval(), torch.randn(1, 3, 6, 6)  # float32: one operation for the layer
    graph = trace(model, x)
    assert {graph.frozen[f"rnn.weight_{part}_l0[0]"] for part in ("ih", "hh")} == {"the width of a recurrent layer stays"}
    assert [m[:2] for m in graph.groups[0].members if m.parameter.startswith("rnn.")] == [("rnn.weight_ih_l0", 1)]
    plan = Plan({g.name: (0, 3) for g in graph.groups})
    assert prove(model, graph, plan, slim(model, graph, plan), x).max_relative_error < 1e-10


class SelfAttention(Net):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def between(self, h: Tensor) -> Tensor:
        tokens = h.flatten(2).transpose(1, 2)
        out: Tensor = self.layer(tokens, tokens, tokens)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(tokens)
        return out.transpose(1, 2).reshape(h.shape)


class Mixed(Net):
    """FFT, top-k and normalisation over channels."""

    def between(self, h: Tensor) -> Tensor:
        h = F.normalize(torch.fft.irfft2(torch.fft.rfft2(h), s=h.shape[-2:]), dim=1)
        largest: Tensor = h.flatten(2).topk(3, dim=2)[0]
        return largest[..., None]


class WeightStandard(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias)


def parametrized() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    return nn.Sequential(normed, nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)), nn.ReLU(), nn.Conv2d(8, 4, 1))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
ODD: dict[str, tuple[nn.Module, Any, int]] = {  # network, inputs, removable channels
    "dict input": (DictInput(), ({"image": X},), 8),
    "dataclass output": (DataclassOutput(), X, 8),
    "buffers and parameters as scales": (Buffers(), X, 8),
    "writes through spatial views": (WritesThroughViews(), X, 8),
    "writes into channels": (WritesIntoChannels(), X, 8),
    "scalar parameter and item()": (ScalarParameter(), X, 8),
    "branches on data": (Branches(), X, 8),
    "boolean index": (BooleanIndex(), X, 0),
    "split by a literal": (LiteralSplit(), X, 4),
    "split by a share": (Chunk(), X, 4),
    "assertion on the width": (Assertion(), X, 8),
    "glu": (Gated(), X, 4),
    "channel attention": (ChannelAttention(), X, 8),
    "spatial attention": (SpatialAttention(), X, 8),
    "lstm": (Recurrent(nn.LSTM), X, 8),
    "gru": (Recurrent(nn.GRU), X, 8),
    "multi-head attention": (SelfAttention(nn.MultiheadAttention(8, 2, batch_first=True)), X, 16),
    "transformer layer": (SelfAttention(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), X, 24),
    "fft, top-k, normalize": (Mixed(), X, 8),
    "standardised weights": (nn.Sequential(WeightStandard(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), X, 8),
    "parametrized weights": (parametrized(), X, 0),
    "group and instance norm": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1), nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 4, 1)),
        X,
        10,
    ),
    "one channel in": (nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)), X[:, :1], 8),
    "one channel between": (nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 6, 1), nn.Conv2d(6, 4, 1)), X, 6),
    "embedding": (nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.arange(8).view(2, 4), 14),
    "graph module": (torch.fx.symbolic_trace(build("residual", dtype=torch.float32)), images("residual", 2, dtype=torch.float32), 24),
    "channels last": (
        Head(nn.Sequential(conv_bn(3, 8), Shuffle(8)), 8).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        X.to(memory_format=torch.channels_last),
        8,
    ),
    "double precision": (Net().double(), X.double(), 8),
    "brain floats": (Net().bfloat16(), X.bfloat16(), 8),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_but_legal_networks_are_traced_and_slimmed(kind: str) -> None:
    model, x, removable = ODD[kind]
    model.eval()
    graph = trace(model, x)
    assert sum(g.channels for g in graph.groups) == removable
    if removable == 0:
        assert graph.frozen
    for seed in range(3):
        plan = random_plan(graph, seed)
        small = slim(model, graph, plan)
        assert prove(model, graph, plan, small, x).max_relative_error < 1e-9
        widths = np.array([len(plan.keep[g.name]) for g in graph.groups])
        thin = trace(small, x)
        # A kernel that slides along the channels has fewer positions where channels go; the cost models count the dense ones.
        macs = pytest.approx(thin.macs, rel=1e-2) if kind == "channel attention" else thin.macs
        assert (kernels(graph).macs(widths)[0], kernels(graph).params(widths)[0]) == (macs, thin.params)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # copying an exported program
@pytest.mark.parametrize(("name", "removable"), [("residual", 24), ("flatten", 27), ("shuffle", 16)])
def test_exported_programs_are_traced(name: str, removable: int) -> None:
    """Export writes sizes as numbers, also in a view that splits channels, as in shuffle."""
    module = torch.export.export(build(name), images(name)).module()
    graph = trace(module, images(name))
    assert sum(g.channels for g in graph.groups) == removable
    plan = random_plan(graph, 1)
    assert prove(module, graph, plan, slim(module, graph, plan), images(name)).max_relative_error < 1e-10


class UnexportableSplit(LiteralSplit):
    """The same, and a branch on data, which cannot be exported."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() < 1e9 else x


def test_written_sizes_cost_only_what_they_touch() -> None:
    """In a deep network with one literal in the middle that cannot be exported, everything else stays removable."""
    plain = [nn.Sequential(nn.Conv2d(4 if i else 3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)) for i in range(4)]
    layers: Any = [*plain[:2], UnexportableSplit(), *plain[2:]]
    layers[2].a = nn.Conv2d(4, 8, 1)
    graph = trace(nn.Sequential(*layers), X)
    assert [g.name for g in graph.groups] == ["0.0", "0.2", "1.0", "1.2", "2.b", "3.0", "3.2", "4.0"]
    assert graph.frozen["2.a.weight[0]"].startswith("the network's code holds their number as a fixed number and cannot be exported (")


DEVICES: list[str] = []


class Wide(nn.Module):
    """So many parameters for so few operations that it is rehearsed without values first."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(4, 900), nn.Linear(900, 900), between
        self.c, self.d = nn.Linear(900, 900), nn.Linear(900, 4)

    def forward(self, x: Tensor) -> Tensor:
        DEVICES.append(x.device.type)
        h: Tensor = self.a(x)
        if self.kind == "literal":
            h = h.view(-1, 9, 100).flatten(1)
        if self.kind == "values":
            h = h + 1 if bool(h.sum() > 0) else h - 1
        out: Tensor = self.d(self.c(self.b(h)))
        return out


@pytest.mark.parametrize(
    ("between", "runs"), [("nothing", ["cpu", "meta"]), ("literal", ["cpu", "meta", "cpu"]), ("values", ["cpu", "meta", "cpu"])]
)
def test_large_networks_are_rehearsed_without_values_where_they_can_be(between: str, runs: list[str]) -> None:
    importlib.import_module("torch._dynamo")  # not worth importing for a network of this size
    DEVICES.clear()
    assert [g.name for g in trace(Wide(between), torch.ones(1, 4)).groups] == ["a", "b", "c"]
    assert runs == DEVICES[:3]


class LongVector(nn.Module):
    """Channels lie inside a vector of two million numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).permute(0, 2, 3, 1).reshape(-1).relu()
        out: Tensor = self.b(h.view(1, *x.shape[2:], -1).permute(0, 3, 1, 2))
        return out.mean((2, 3))


def test_sizes_of_large_tensors_follow_the_channels() -> None:
    graph = trace(LongVector(), torch.zeros(1, 1, 512, 512))
    (vector,) = {graph.activations[op.output] for op in graph.ops if graph.activations[op.output].shape == (8 * 512 * 512,)}
    assert vector.fixed == 0
    assert vector.per_channel == ((0, 512 * 512.0),)


def test_what_cannot_run_is_a_trace_error() -> None:
    with pytest.raises(TraceError, match=r"shape \(1, 7, 8, 8\).*channels"):
        trace(build("plain"), torch.randn(2, 7, 8, 8, dtype=torch.float64))
    with pytest.raises(TraceError, match="AssertionError"):
        trace(Refusing(), X)
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.trace(nn.Conv2d(3, 4, 1), X)
    with pytest.raises(TraceError, match="TorchScript"):
        trace(scripted, X)


class Refusing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


def test_a_network_without_parameters_or_groups() -> None:
    graph = trace(nn.Flatten(), X)
    assert (graph.groups, graph.macs, graph.params) == ((), 0, 0)
    assert trace(nn.Linear(3, 2), torch.randn(1, 3)).frozen == {"weight[0]": "output of the network"}


def test_work_grows_linearly_with_depth() -> None:
    """Counted in function calls, which a busy machine does not change."""

    def calls(depth: int) -> int:
        body = nn.Sequential(*(conv_bn(8, 8, 1) for _ in range(depth)))
        model, x = nn.Sequential(nn.Conv2d(3, 8, 1), body, nn.Conv2d(8, 4, 1)).eval(), torch.randn(1, 3, 4, 4)
        counted = 0

        def count(*_: Any) -> None:
            nonlocal counted
            counted += 1

        sys.setprofile(count)
        try:
            trace(model, x)
        finally:
            sys.setprofile(None)
        return counted

    calls(1)
    assert calls(80) < 4.5 * calls(20)


class Written(nn.Module):
    """Tensors filled with a number and then written piece by piece: an image put into a larger one, channels into their places."""

    def __init__(self, *, channels: bool) -> None:
        super().__init__()
        self.channels = channels
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.channels:
            h = torch.zeros(x.shape[0], 8, x.shape[2], x.shape[3], dtype=x.dtype)
            h[:, :4], h[:, 4:] = self.a(x), self.b(x)
        else:
            larger = x.new_full((x.shape[0], 3, x.shape[2] + 2, x.shape[3] + 2), 0.0)
            larger[:, :, : x.shape[2], : x.shape[3]].copy_(x)
            h = torch.cat([self.a(larger), self.b(larger)], 1)
        out: Tensor = self.d(torch.relu(self.c(torch.relu(h))).mean((2, 3)))
        return out


class Gathered(nn.Module):
    """Rows of two branches put into a tensor of zeros by their numbers, as detectors put together regions of several maps."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.a(x)), torch.relu(self.b(x))
        n, first, second = x.shape[0], torch.arange(0, x.shape[0]), torch.arange(x.shape[0], 2 * x.shape[0])
        h = a.new_zeros(2 * n, a.shape[1], *a.shape[2:])
        if self.way == "index_put":
            h[first], h[second] = a, b
        elif self.way == "index_copy":
            h.index_copy_(0, first, a).index_add_(0, second, b)
        elif self.way == "scatter":
            for rows, values in ((first, a), (second, b)):
                h.scatter_(0, rows.view(-1, 1, 1, 1).expand_as(values), values)
        else:
            h[:n], h[n:] = a, b
        rows: Tensor = self.d(torch.relu(self.c(h)).mean((2, 3)))
        return rows[:n] + rows[n:]


@pytest.mark.parametrize("way", ["index_put", "index_copy", "scatter", "slices"])
def test_channels_that_are_written_row_by_row_are_channels(way: str) -> None:
    torch.manual_seed(0)
    model, x = Gathered(way).double().eval(), torch.randn(1, 3, 6, 6, dtype=torch.float64)
    graph = trace(model, x)
    assert {g.name: g.channels for g in graph.groups} == {"a": 8, "c": 6}
    assert {"a.weight", "b.weight", "c.weight"} <= {m.parameter for m in graph.groups[0].members}, "both branches and their reader"
    plan = Plan({"a": (1, 2, 6), "c": (0, 5)})
    assert prove(model, graph, plan, slim(model, graph, plan), x).max_relative_error < 1e-10


@pytest.mark.parametrize("channels", [True, False])
def test_channels_that_are_written_piece_by_piece_are_channels_and_data_is_data(channels: bool) -> None:
    torch.manual_seed(0)
    model, x = Written(channels=channels).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = trace(model, x)
    assert {g.name: g.channels for g in graph.groups} == {"a": 4, "b": 4, "c": 6}
    assert {op.weight for op in graph.ops if op.weight} == {f"{n}.weight" for n in "abcd"}
    plan = Plan.uniform(graph, 0.5)
    assert prove(model, graph, plan, slim(model, graph, plan), x).max_relative_error < 1e-10
