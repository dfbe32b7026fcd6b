"""What single operations do to channels: a conv makes 8, the operation follows, a last conv reads the result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.graph.kinds import KINDS
from edgeprune.graph.rules import RULES, Call, give_up
from edgeprune.graph.slim import prove, slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.networks import random_plan

Operation = Callable[[Tensor], Tensor]


class Between(nn.Module):
    def __init__(self, operation: Operation, out: int) -> None:
        super().__init__()
        self.operation = operation
        self.make, self.read = nn.Conv2d(3, 8, 3), nn.Conv2d(out, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(self.operation(self.make(x)))
        return out


def channels_left(operation: Operation) -> int:
    """Removable channels of the conv in front; slim is proved on the way."""
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        width = operation(torch.randn(1, 8, 6, 6, dtype=torch.float64)).shape[1]
    model = Between(operation, width).double().eval()
    graph = trace(model, x)
    for seed in range(3):
        plan = random_plan(graph, seed)
        assert prove(model, graph, plan, slim(model, graph, plan), x).max_relative_error < 1e-10
    return sum(g.channels for g in graph.groups)


KEEP_ALL: dict[str, Operation] = {
    **{f.__name__: f for f in (F.relu, F.relu6, F.hardswish, F.hardsigmoid, F.silu, F.gelu, F.elu, F.mish, F.softplus, torch.tanh)},
    "leaky_relu": lambda h: F.leaky_relu(h, 0.1),
    "arithmetic": lambda h: (2 * h + 1) / 3 - h**2 + h.abs().sqrt().clamp(max=2),
    "comparison": lambda h: torch.where(h > 0, h, -h).masked_fill(h < -1, 0.0),
    "max_pool": lambda h: F.max_pool2d(h, 3, 2, 1),
    "avg_pool": lambda h: F.avg_pool2d(h, 2),
    "adaptive_pool": lambda h: F.adaptive_avg_pool2d(h, 1) + F.adaptive_max_pool2d(h, 1),
    "mean": lambda h: h.mean((2, 3), keepdim=True),
    "amax": lambda h: h.amax((2, 3), keepdim=True),
    "variance": lambda h: h.var((2, 3), keepdim=True),
    "nearest": lambda h: F.interpolate(h, scale_factor=2),
    "bilinear": lambda h: F.interpolate(h, size=(9, 9), mode="bilinear"),
    "reflect": lambda h: F.pad(h, (1, 2, 1, 0), mode="reflect"),
    "zeros": lambda h: F.pad(h, (1, 2, 1, 0)),
    "crop": lambda h: h[:, :, 1:-1, ::2],
    "roll": lambda h: h.roll((1, 2), (2, 3)),
    "flip": lambda h: h.flip(2).transpose(2, 3),
    "permute": lambda h: h.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "tokens": lambda h: h.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (6, 6)),
    "softmax over space": lambda h: h * h.flatten(2).softmax(-1).view_as(h),
    "unbind and stack in space": lambda h: torch.stack(h.unbind(2), 2),
    "cat in space": lambda h: torch.cat([h, h.flip(2)], 2),
    "cat of channels": lambda h: torch.cat([h, torch.relu(h)], 1),
    "expand": lambda h: h.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4) + h[:, :, :4, :4],
    "repeat in space": lambda h: h.repeat(1, 1, 2, 2),
    "unsqueeze": lambda h: h.unsqueeze(2).squeeze(2),
    "in place": lambda h: h.mul_(2).add_(h).relu_(),
    "dropout": lambda h: F.dropout(h, 0.5, training=False),
    "batch norm without parameters": lambda h: F.batch_norm(h, None, None, training=True),
    "flipped channels": lambda h: h.flip(1),
    "flipped channels and a mean": lambda h: h.flip(1).mean((2, 3), keepdim=True),
    "repeat in space and a mean": lambda h: h.repeat(1, 1, 2, 2).mean((2, 3), keepdim=True),
    "roll and a mean": lambda h: h.roll((1, 2), (2, 3)).mean((2, 3), keepdim=True),
    "Fourier transform over space": lambda h: torch.fft.irfft2(torch.fft.rfft2(h) * 2, s=h.shape[-2:]),
    "products along space": lambda h: h.cumprod(2),
}
KEEP_ALL |= {
    "grid sample": lambda h: F.grid_sample(h, torch.linspace(-1, 1, 32, dtype=h.dtype).view(1, 4, 4, 2), align_corners=False),
    "unfold": lambda h: F.unfold(h, 1).unflatten(2, (6, 6)),
    "gather in space": lambda h: h.flatten(2)[:, :, torch.tensor([3, 1, 2, 0])].unflatten(2, (2, 2)),
    "sort in space": lambda h: h.sort(2)[0] + h.topk(1, 3)[0],
    "tokens mixed": lambda h: F.linear(h.flatten(2), torch.ones(36, 36, dtype=h.dtype) / 36).unflatten(2, (6, 6)),
    "values of attention": lambda h: (torch.eye(36, dtype=h.dtype) @ h.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 6)),
    "pieces of windows": lambda h: h.reshape(h.shape[1] * 2, 3, 2, 3).transpose(1, 2).reshape(1, h.shape[1], 6, 6),
    "mean of everything expanded": lambda h: h * h.mean(1, keepdim=True).expand_as(h),
}
TIES: dict[str, tuple[Operation, int]] = {
    "halves added": (lambda h: sum(h.chunk(2, 1), torch.zeros(())), 4),
    "shuffle by a view": (lambda h: h.view(1, 2, h.shape[1] // 2, 6, 6).transpose(1, 2).reshape(1, h.shape[1], 6, 6), 4),
    "gated linear unit": (lambda h: F.glu(h, 1), 4),
    "channel_shuffle": (lambda h: F.channel_shuffle(h, 2), 4),
    "pixel_shuffle": (lambda h: F.pixel_shuffle(h, 2), 2),
    "a channel meets its mirror": (lambda h: h + h.flip(1), 4),
    "stack of halves": (lambda h: torch.stack(h.chunk(2, 1), 2).flatten(1, 2), 4),
}
NUMBERS: dict[str, Operation] = {
    "slice": lambda h: h[:, 2:],
    "slice from the end": lambda h: h[:, -5:-1],
    "narrow": lambda h: h.narrow(1, 3, 4),
    "two channels": lambda h: torch.cat([h[:, 5:7], h], 1),
    "unequal parts": lambda h: h.split([3, 5], 1)[1],
    "parts and a rest": lambda h: torch.cat(h.split(3, 1)[::-1], 1),
    "chunks and a rest": lambda h: torch.cat(h.chunk(3, 1)[::-1], 1),
    "fill": lambda h: h + torch.ones(8, 1, 1, dtype=h.dtype),
    "new fill": lambda h: h * h.new_full((h.shape[0], 8, 6, 6), 2.0),
    "view": lambda h: h.view(-1, 8, 36)[..., None],
    "reshape with a list": lambda h: h.reshape([h.shape[0], 8, 6, 6]).flip(2),
    "batch in front": lambda h: h.reshape(h.shape[0] * 8, 1, 6, 6).mul(2).view(h.shape[0], 8, 6, 6),
    "depthwise": lambda h: F.conv2d(h, torch.ones(8, 1, 3, 3, dtype=h.dtype), groups=8),
}
FROZEN: dict[str, tuple[Operation, str]] = {
    "every other channel": (lambda h: h[:, ::2], "cuts or pads"),
    "softmax": (lambda h: h.softmax(1), "softmax over the channels"),
    "cumsum": (lambda h: h.cumsum(1), "cumsum over the channels"),
    "Fourier transform over channels": (lambda h: torch.fft.fft(h, dim=1).real, "over the channels"),
    "sort": (lambda h: h.sort(1)[0], "sort over the channels"),
    "gram matrix": (lambda h: (h.flatten(2) @ h.flatten(2).transpose(1, 2))[..., None], "product of two different channel axes"),
    "outer product": (lambda h: h[:, :, None, 0, :1] * h[:, None, :, 0, :1], "product of two different channel axes"),
    "constant": (lambda h: h + torch.arange(8, dtype=h.dtype)[:, None, None], "constant made in the forward pass"),
    "literal view": (lambda h: h.view(1, 8, 36)[..., None], "holds their number as a fixed number"),
    "literal expand": (lambda h: h.mean(1, keepdim=True).expand(1, 8, 6, 6) * h, "holds their number as a fixed number"),
}


@pytest.mark.parametrize("name", KEEP_ALL)
def test_channel_by_channel_operations_keep_all_channels_removable(name: str) -> None:
    assert channels_left(KEEP_ALL[name]) == 8


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_in_the_code_leave_channels_removable(name: str) -> None:
    assert channels_left(NUMBERS[name]) == 8


@pytest.mark.parametrize("name", TIES)
def test_channels_that_meet_are_removed_together(name: str) -> None:
    operation, expected = TIES[name]
    assert channels_left(operation) == expected


@pytest.mark.parametrize("name", FROZEN)
def test_what_depends_on_the_set_of_channels_freezes_them(name: str) -> None:
    operation, reason = FROZEN[name]
    assert channels_left(operation) == 0
    width = operation(torch.randn(1, 8, 6, 6)).shape[1]
    assert reason in trace(Between(operation, width).eval(), torch.randn(1, 3, 8, 8)).frozen["make.weight[0]"]


def test_a_rule_that_fails_freezes_instead_of_crashing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Call) -> None:
        raise RuntimeError

    monkeypatch.setitem(RULES, "relu", broken)
    graph = trace(Between(F.relu, 8).eval(), torch.randn(1, 3, 8, 8))
    assert graph.groups == ()
    assert graph.frozen["make.weight[0]"] == "the operation relu is used in a way no rule covers (RuntimeError)"


def test_every_kind_names_operations_that_have_rules_or_are_costed_only() -> None:
    without = {name for name in KINDS if name not in RULES}
    assert not without
    assert give_up.__doc__


def test_an_empty_plan_is_the_dense_network() -> None:
    model = Between(F.relu, 8).eval()
    x = torch.randn(1, 3, 8, 8)
    graph = trace(model, x)
    assert torch.equal(slim(model, graph, Plan({}))(x), model(x))
