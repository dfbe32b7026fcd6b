"""Bits for every output channel: more where rounding would cost more discriminant information, at a given mean.

The loss of a plan is the sum over channels of influence * energy * e(b), e(b) the squared error of the channel's weights on its grid of
b bits (of the order of range^2 4^-b). From the coarsest grids on, the step with the largest gain per bit of storage is taken until
the budget is used; gains shrink with every step, so this is optimal but for the last few bits. The mean is over all weights of all
layers: a layer as a whole may get more than another one.
Source: Hou and Kung, arXiv 2005.13796 (2020), for the idea; with e(b) = range^2 4^-b the optimum is b_c = mean + log2(influence range^2
/ geometric mean) / 2, here rounded to the grids there are. Stored as int8: it is the compressed file that gets smaller, nothing
computes faster.
"""

from __future__ import annotations

import heapq
import lzma
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeprune.errors import UsageError
from edgeprune.quantize.bits import CHANNEL_BITS
from edgeprune.quantize.grid import grid_errors
from edgeprune.quantize.influence import Influence
from edgeprune.quantize.network import Layer, Network

CODEC = "xz (LZMA, Python's lzma at its default preset)"


class _Step(NamedTuple):
    """From the present grid of a channel to a finer one; ordered by gain per bit, the largest first."""

    price: float
    layer: str
    channel: int
    level: int
    bits: int


def channel_bits(
    proto: onnx.ModelProto, influence: Mapping[str, Influence], mean_bits: float, *, within_layers: bool = False
) -> dict[str, tuple[int, ...]]:
    """Bits of each output channel of each layer in `influence`, each of CHANNEL_BITS, at most `mean_bits` per weight.

    `within_layers`: the mean holds in every layer by itself. Raises UsageError for a mean below the coarsest grid.
    """
    if not CHANNEL_BITS[0] <= mean_bits <= CHANNEL_BITS[-1]:
        raise UsageError(f"the mean bits of a weight must be from {CHANNEL_BITS[0]} to {CHANNEL_BITS[-1]}, got {mean_bits!r}.")
    layers = {name: layer for name, layer in Network(proto).layers.items() if name in influence}
    losses = {name: _losses(layer, influence[name]) for name, layer in layers.items()}
    weights = {name: layer.weight[0].size for name, layer in layers.items()}
    parts = [[name] for name in layers] if within_layers else [list(layers)]
    levels = {name: level for part in parts for name, level in _allocated(part, losses, weights, mean_bits).items()}
    return {name: tuple(CHANNEL_BITS[k] for k in level) for name, level in levels.items()}


def transfer_bytes(content: bytes) -> int:
    """The size of a file as it is sent, compressed with CODEC."""
    return len(lzma.compress(content))


def _losses(layer: Layer, influence: Influence) -> NDArray[np.float64]:
    """(channels, grids): what each grid of each channel costs."""
    return grid_errors(layer.weight, CHANNEL_BITS) * (influence.channels * influence.energy)[:, None]


def _allocated(
    names: list[str], losses: Mapping[str, NDArray[np.float64]], weights: Mapping[str, int], mean_bits: float
) -> dict[str, NDArray[np.int64]]:
    levels = {name: np.zeros(len(losses[name]), np.int64) for name in names}
    left = sum(weights[name] * len(losses[name]) for name in names) * (mean_bits - CHANNEL_BITS[0])
    heap = [step for name in names for c in range(len(losses[name])) if (step := _best(name, c, 0, losses, weights))]
    heapq.heapify(heap)
    while heap:
        step = heapq.heappop(heap)
        if step.bits <= left:
            left -= step.bits
            levels[step.layer][step.channel] = step.level
            if after := _best(step.layer, step.channel, step.level, losses, weights):
                heapq.heappush(heap, after)
    return levels


def _best(name: str, channel: int, level: int, losses: Mapping[str, NDArray[np.float64]], weights: Mapping[str, int]) -> _Step | None:
    """The finer grid with the most gain per bit; None from the finest on."""
    row = losses[name][channel]
    steps = []
    for finer in range(level + 1, len(CHANNEL_BITS)):
        bits = weights[name] * (CHANNEL_BITS[finer] - CHANNEL_BITS[level])
        steps.append(_Step((row[finer] - row[level]) / bits, name, channel, finer, bits))
    return min(steps) if steps else None
