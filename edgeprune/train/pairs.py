"""Two layers at once: the first of two convs is fitted to what should come out behind the second.

The layer-by-layer fit gives the first conv's remaining channels back what they held. But only the second conv reads them, so they may
hold whatever serves it better. With the ReLU between the two open where it is open now, the result is linear in the first conv's weights:
their least squares problem is solved by conjugate gradients, which need convolutions and no matrices (a Gauss-Newton step, cut off after
ITERATIONS). Of the images every fourth is set aside; the step is taken as far as it helps them, or not at all.
benchmarks/unseen.py says what it brings on images that nothing was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from edgeprune.graph import ChannelGraph, Op
from edgeprune.train.targets import Target, result_of

ITERATIONS = 10
DAMPING = 1e-3
STEPS = (1.0, 0.5, 0.25)
ASIDE = 4  # one image in so many judges the step
ROWS = 98_304  # positions of the second conv's maps, over all images
LEAST_IMAGES = 16
LEAST_EQUATIONS = 4  # for each weight of the first conv
MOST_BYTES = 256 << 20  # of what should come out
MOST_MACS = 1e12  # of all steps of a network together: about a minute of one core


@dataclass(frozen=True, eq=False)
class Pair:
    """`second` alone reads what `first` makes, through its batch norm, if it has one, and a ReLU.

    `end` is the last of `second`, its norm and the residual sum behind them. The step looks at whole maps of the first `images` images.
    """

    first: Op
    first_norm: Op | None
    second: Target
    end: Op
    images: int


def pairs_of(graph: ChannelGraph, targets: Mapping[int, Target], images: int) -> dict[int, Pair]:
    """The pairs worth a step, by the second layer's call, where there are so many images."""
    found = [pair for target in targets.values() if (pair := _pair(graph, target, images))]
    macs = sum(_macs(graph, pair) * pair.images for pair in found)
    held = sum(4 * math.prod(graph.activations[pair.end.output].shape[1:]) * pair.images for pair in found)
    scarce = min(1.0, MOST_MACS / max(1.0, macs), MOST_BYTES / max(1, held))
    fewer = [replace(pair, images=int(pair.images * scarce)) for pair in found]
    return {pair.second.op.call: pair for pair in fewer if pair.images >= LEAST_IMAGES and _determined(graph, pair)}


def _pair(graph: ChannelGraph, target: Target, images: int) -> Pair | None:
    made = {op.output: op for op in graph.ops}
    relu = made.get(target.op.inputs[0])
    if target.constant or not _plain(graph, target.op) or relu is None or relu.name != "relu":
        return None
    before = made.get(relu.inputs[0])
    norm = before if before is not None and before.kind == "norm" and graph.keeps_statistics(before) else None
    first = made.get(norm.inputs[0]) if norm else before
    if first is None or not _plain(graph, first):
        return None
    between = [first.output, relu.output] + ([norm.output] if norm else [])
    if any(sum(number in op.inputs for op in graph.ops) != 1 or number in graph.output_activations for number in between):
        return None
    end = result_of(graph, target.op)
    if end.kind == "add" and target.beside is None:  # the other operand is made later
        return None
    return Pair(first, norm, target, end, min(images, ROWS // math.prod(graph.activations[target.op.output].shape[2:])))


def _plain(graph: ChannelGraph, op: Op) -> bool:
    """A conv without groups that runs once and is not transposed."""
    once = sum(other.weight == op.weight for other in graph.ops) == 1
    return op.kind == "conv" and op.groups == 1 and once and graph.activations[op.output].shape[1] == graph.shapes[op.weight or ""][0]


def _macs(graph: ChannelGraph, pair: Pair) -> float:
    """Of all iterations, for each image: the two convs and the same number back."""
    each = sum(op.positions * math.prod(graph.shapes[op.weight or ""]) for op in (pair.first, pair.second.op))
    return float(2 * ITERATIONS * each)


def _determined(graph: ChannelGraph, pair: Pair) -> bool:
    outputs = math.prod(graph.activations[pair.second.op.output].shape[1:])
    return pair.images * outputs >= LEAST_EQUATIONS * math.prod(graph.shapes[pair.first.weight or ""])


@dataclass(frozen=True, eq=False)
class Conv:
    """A conv with the norm behind it folded in: weight (outputs, inputs, *kernel), shift (outputs,), and torch's stride and so on."""

    weight: Tensor
    shift: Tensor
    arguments: tuple[Any, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """(images, inputs, *size) to (images, outputs, *size)."""
        made: Tensor = torch.ops.aten.convolution(x, self.weight, self.shift, *self.arguments)
        return made

    def moved(self, by: Self, share: float = 1.0) -> Conv:
        """The conv with a share of another one's weights and shift added."""
        return Conv(self.weight + share * by.weight, self.shift + share * by.shift, self.arguments)

    def __matmul__(self, other: Self) -> float:
        return float((self.weight * other.weight).sum() + (self.shift * other.shift).sum())


def step(first: Conv, second: Conv, read: Tensor, wanted: Tensor, beside: Tensor | None, *, rectified: bool) -> Conv | None:
    """The first conv such that second(relu(first(read))) + beside comes closer to `wanted` on images set aside; None: no step helps.

    read (images, inputs, *size); wanted and beside (images, outputs, *size). `rectified`: a ReLU follows, so what is below zero is as
    good as any other value below zero.
    """
    errors = _Errors(second, wanted, beside, rectified)
    aside = torch.arange(len(read)) % ASIDE == ASIDE - 1
    change = errors.part(~aside).solved(first, read[~aside])
    judge = errors.part(aside)
    present = judge.total(first, read[aside])
    tried = (first.moved(change, share) for share in STEPS)
    return next((conv for conv in tried if judge.total(conv, read[aside]) < present), None)


@dataclass(frozen=True, eq=False)
class _Errors:
    second: Conv
    wanted: Tensor
    beside: Tensor | None
    rectified: bool

    def part(self, images: Tensor) -> _Errors:
        """Those of some of the images."""
        return replace(self, wanted=self.wanted[images], beside=None if self.beside is None else self.beside[images])

    def total(self, first: Conv, read: Tensor) -> float:
        """The squared error of the network with this conv."""
        return float(self._of(first(read).clamp(min=0))[0].square().sum())

    def _of(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What is lacking, and where that matters."""
        made = self.second(hidden)
        if self.beside is not None:
            made = made + self.beside
        if not self.rectified:
            return self.wanted - made, torch.ones_like(made)
        lacking = torch.where(self.wanted > 0, self.wanted - made, (-made).clamp(max=0))
        return lacking, ((made > 0) | (self.wanted > 0)).to(made.dtype)

    def solved(self, first: Conv, read: Tensor) -> Conv:
        """The change of the first conv that leaves the least error if no ReLU opens or closes; damped."""
        hidden = first(read).clamp(min=0)
        is_open = (hidden > 0).to(hidden.dtype)
        lacking, matters = self._of(hidden)
        still = replace(self.second, shift=torch.zeros_like(self.second.shift))

        def forth(change: Conv) -> Tensor:
            return still(change(read) * is_open) * matters

        def back(error: Tensor) -> Conv:
            gradient = torch.ops.aten.convolution_backward
            came, _, _ = gradient(error * matters, hidden, still.weight, None, *still.arguments, [True, False, False])
            sizes = [len(first.weight)]
            _, weight, shift = gradient(came * is_open, read, first.weight, sizes, *first.arguments, [False, True, True])
            return Conv(weight, shift, first.arguments)

        left = direction = back(lacking)
        change = Conv(torch.zeros_like(left.weight), torch.zeros_like(left.shift), first.arguments)
        size, damping = left @ left, None
        for _ in range(ITERATIONS):
            if size == 0:
                break
            seen = forth(direction)
            if damping is None:
                damping = DAMPING * float(seen.square().sum()) / size
            curved = back(seen).moved(direction, damping)
            length = size / (direction @ curved)
            change, left = change.moved(direction, length), left.moved(curved, -length)
            size, before = left @ left, size
            direction = left.moved(direction, size / before)
        return change
