"""Tiny networks, one for every way in which channels are tied together, and what tests need to compare two of them.

All run in milliseconds. `build(name)` gives a network in float64 and eval mode whose batch norms are calibrated on a batch and then
perturbed: an untrained network's signal otherwise vanishes and hides errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.graph import ChannelGraph
from edgeprune.graph.running import tensors_in
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan

CLASSES = 5


def conv_bn(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1, *, act: bool = True) -> nn.Sequential:
    """Conv without bias, batch norm, and a ReLU unless `act` is false."""
    layers = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


class Head(nn.Module):
    """Body, global mean, classifier."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x).mean((2, 3)))
        return out


class Residual(nn.Module):
    """Two convs around an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = conv_bn(width, width)
        self.b = conv_bn(width, width, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(self.a(x)))


class Bottleneck(nn.Module):
    """1x1, strided (grouped) 3x3, 1x1 beside a projection."""

    def __init__(self, i: int, mid: int, o: int, groups: int = 1) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(i, mid, 1), conv_bn(mid, mid, 3, 2, groups), conv_bn(mid, o, 1, act=False)
        self.down = conv_bn(i, o, 1, 2, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.down(x) + self.c(self.b(self.a(x))))


class OptionA(nn.Module):
    """Shortcut without parameters: every second pixel, channels padded with zeros on both sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.extra = width // 2
        self.stem = conv_bn(3, width)
        self.a = conv_bn(width, 2 * width, stride=2)
        self.b = conv_bn(2 * width, 2 * width, act=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra)) + self.b(self.a(x)))


class SqueezeExcite(nn.Module):
    """Channel attention through two linears (as 1x1 convs)."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """MobileNet block, with squeeze-excite if asked."""

    def __init__(self, width: int, expand: int, attend: bool = False) -> None:
        super().__init__()
        self.a, self.b = conv_bn(width, expand, 1), conv_bn(expand, expand, 3, 1, expand)
        self.se = SqueezeExcite(expand, 4) if attend else nn.Identity()
        self.c = conv_bn(expand, width, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.c(self.se(self.b(self.a(x))))
        return out


class Dense(nn.Module):
    """DenseNet layer: what came before, and some more channels; norm before conv."""

    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(i), nn.Conv2d(i, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Inception(nn.Module):
    """Three branches of different widths, one of them pooled."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn(i, 6, 1), nn.Sequential(conv_bn(i, 4, 1), conv_bn(4, 7))
        self.c = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(i, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x)], dim=1)


class Shuffle(nn.Module):
    """ShuffleNetV2 unit: half of the channels pass, half are convolved, then the halves are interleaved by a view."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(conv_bn(half, half, 1), conv_bn(half, half, 3, 1, half, act=False), conv_bn(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        x = torch.cat((a, self.branch(b)), 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Twice(nn.Module):
    """One conv module used twice, and one weight shared by two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        return F.relu(self.left(x)) + torch.tanh(self.right(x))


class Upsampler(nn.Module):
    """Encoder, transposed conv back, skip by concatenation: a tiny U-Net with a dense output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv_bn(3, 6), conv_bn(6, 8, stride=2)
        self.up, self.norm = nn.ConvTranspose2d(8, 5, 2, 2), nn.BatchNorm2d(5)
        self.out = nn.Conv2d(11, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.out(torch.cat([x, F.relu(self.norm(self.up(self.down(x))))], 1))
        return out


class LiteralFlatten(nn.Module):
    """The classic view(-1, C * H * W) in front of two linears, the numbers written out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 9, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(9 * 4 * 4, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x)).view(-1, 9 * 4 * 4)
        out: Tensor = self.fc2(F.relu(self.fc1(x)))
        return out


class Flatten(LiteralFlatten):
    """The same network with flatten(1): every channel of conv2 owns 16 columns of fc1."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        out: Tensor = self.fc2(F.relu(self.fc1(F.relu(self.conv2(x)).flatten(1))))
        return out


class Attention(nn.Module):
    """Patches, one pre-norm attention block with an MLP, LayerNorm."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        out: Tensor = self.fc(x.mean(1))
        return out


class TwoInTwoOut(nn.Module):
    """An image and a vector in; a dict of logits and a map out."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = conv_bn(3, 8), nn.Linear(4, 8)
        self.map, self.mid, self.fc = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 6, 3), nn.Linear(6, CLASSES)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        x = self.image(image) * torch.sigmoid(self.vector(vector))[:, :, None, None]
        return {"logits": self.fc(F.relu(self.mid(x)).mean((2, 3))), "map": self.map(x)}


class SumAndSlice(nn.Module):
    """Two streams added, then a cut through the channels at a number written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.free = conv_bn(3, 8), conv_bn(3, 8), conv_bn(3, 7)
        self.left, self.right, self.last = nn.Conv2d(5, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(7, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.a(x) + self.b(x)
        return F.relu(self.left(s[:, :5]) + self.right(s[:, 5:]) + self.last(self.free(x)))


class Conv1d(nn.Module):
    """Signals: conv, PReLU with one slope per channel, strided conv, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv1d(2, 8, 5, padding=2), nn.PReLU(8), nn.Conv1d(8, 6, 3, 2)
        self.norm, self.fc = nn.BatchNorm1d(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(F.adaptive_avg_pool1d(F.elu(self.norm(self.b(self.act(self.a(x))))), 1).flatten(1))
        return out


def mlp() -> nn.Module:
    """Two hidden layers with batch norm."""
    return nn.Sequential(
        nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 7), nn.Hardswish(), nn.Dropout(0.5), nn.Linear(7, CLASSES)
    )


@dataclass(frozen=True)
class Network:
    """How to build one, and the shape of each input without the batch."""

    make: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...] = ((3, 8, 8),)


def _plain() -> nn.Module:
    return Head(nn.Sequential(conv_bn(3, 8), nn.MaxPool2d(2), conv_bn(8, 12), conv_bn(12, 6)), 6)


def _grouped_transposed() -> nn.Module:
    return Head(nn.Sequential(conv_bn(3, 8), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), conv_bn(8, 6, groups=2), conv_bn(6, 5)), 5)


NETWORKS: dict[str, Network] = {
    "plain": Network(_plain),
    "residual": Network(lambda: Head(nn.Sequential(conv_bn(3, 8), Residual(8), Residual(8)), 8)),
    "bottleneck": Network(lambda: Head(nn.Sequential(conv_bn(3, 8), Bottleneck(8, 6, 12), Bottleneck(12, 6, 12)), 12)),
    "option_a": Network(lambda: Head(OptionA(8), 16)),
    "mobile": Network(lambda: Head(nn.Sequential(conv_bn(3, 8), InvertedResidual(8, 16), InvertedResidual(8, 12)), 8)),
    "squeeze_excite": Network(lambda: Head(nn.Sequential(conv_bn(3, 8), InvertedResidual(8, 16, attend=True)), 8)),
    "dense": Network(lambda: Head(nn.Sequential(conv_bn(3, 6), Dense(6, 4), Dense(10, 4), nn.BatchNorm2d(14), conv_bn(14, 7, 1)), 7)),
    "inception": Network(lambda: Head(nn.Sequential(conv_bn(3, 6), Inception(6), Inception(18)), 18)),
    "shuffle": Network(lambda: Head(nn.Sequential(conv_bn(3, 8), Shuffle(8), Shuffle(8), conv_bn(8, 6, 1)), 6)),
    "grouped": Network(lambda: Head(nn.Sequential(conv_bn(3, 8), Bottleneck(8, 12, 10, groups=3)), 10)),
    "twice": Network(lambda: Head(Twice(), 6)),
    "transposed": Network(Upsampler),
    "grouped_transposed": Network(_grouped_transposed),
    "literal_flatten": Network(LiteralFlatten),
    "flatten": Network(Flatten),
    "conv1d": Network(Conv1d, ((2, 16),)),
    "mlp": Network(mlp, ((6,),)),
    "two_in_two_out": Network(TwoInTwoOut, ((3, 8, 8), (4,))),
    "sum_and_slice": Network(lambda: Head(SumAndSlice(), 6)),
    "attention": Network(Attention),
}


def images(name: str, n: int = 1, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """The forward's positional arguments, `n` samples of noise."""
    noise = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, *shape, generator=noise, dtype=torch.float64).to(dtype) for shape in NETWORKS[name].inputs)


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network with settled batch norms, in eval mode. Equal seeds give equal networks; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[name].make()
        settle(model.double(), *images(name, 16, seed=seed + 100))
    return model.to(dtype)


@cache
def traced(name: str) -> tuple[nn.Module, ChannelGraph]:
    """The network and its graph, made once for tests that change neither."""
    model = build(name)
    return model, trace(model, images(name))


def settle(model: nn.Module, *inputs: Tensor) -> None:
    """Calibrate batch norms on a batch, then perturb their affine parameters and statistics; leaves the model in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(*inputs)
        for norm in norms:
            norm.momentum = 0.1
            for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.running_var, 0.7, 1.3)):
                assert tensor is not None
                tensor.mul_(torch.empty_like(tensor).uniform_(low, high))
            norm.bias.add_(0.2 * torch.randn_like(norm.bias))
    model.eval()


def random_plan(graph: ChannelGraph, seed: int = 0) -> Plan:
    """A random number of random channels of every group, at least one each."""
    rng = np.random.default_rng(seed)
    return Plan({g.name: _choice(rng, g.channels, int(rng.integers(1, g.channels + 1))) for g in graph.groups})


def _choice(rng: np.random.Generator, n: int, k: int) -> tuple[int, ...]:
    return tuple(sorted(int(c) for c in rng.choice(n, size=k, replace=False)))


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Every tensor that the network returns, in eval mode, without gradients."""
    with torch.no_grad():
        return list(tensors_in(model.eval()(*inputs)))


def gap(one: nn.Module, other: nn.Module, a: tuple[Any, ...], b: tuple[Any, ...]) -> float:
    """Largest difference of two networks' outputs over inputs a and b, as a share of how far `one`'s output moves from a to b."""
    of_one, of_other = [outputs(one, x) for x in (a, b)], [outputs(other, x) for x in (a, b)]
    moved = max(float((p - q).abs().max()) for p, q in zip(*of_one, strict=True))
    apart = max(float((p - q).abs().max()) for p, q in _pairs(of_one, of_other))
    assert moved > 0, "the network answers the same whatever it sees: nothing can be compared"
    return apart / moved


def _pairs(left: list[list[Tensor]], right: list[list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for mine, theirs in zip(left, right, strict=True):
        for p, q in zip(mine, theirs, strict=True):
            assert p.shape == q.shape
            yield p, q
