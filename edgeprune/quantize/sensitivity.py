"""How far the network's outputs move when channels are rounded: the influence of channels, corrected by what is measured.

Discriminant information (influence.py) is what a linear readout of a layer loses. What the layers behind make of the noise it cannot
know: on a ResNet-20 of CIFAR-10, measured over predicted differs by a factor of 27 between convolutions, and by more for the classifier.
So the channels of a layer are ordered by the loss that DI predicts and cut into parts; each part alone is rounded to PROBE_BITS, its mean
outputs kept, and what that does to the network's outputs is a second estimate, alike for all noise inside a part. What counts is the
geometric mean of both: each is wrong in its way. On training images of ResNet-20 and 56, at means of 4 and 5 bits, bits by both kept the
outputs closer than bits by DI alone in all four cases, and than bits by what is measured alone in three (docs/quantization.md).
Cost: layers * PARTS passes over the images. The rule is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeprune.quantize.calibrate import Means, observe, runner
from edgeprune.quantize.grid import grid_errors, on_grid, restored
from edgeprune.quantize.influence import Influence
from edgeprune.quantize.network import Network
from edgeprune.quantize.preparation import mean_output, with_constants

PROBE_BITS = 4
PARTS = 4
_LEAST_CHANNELS = 2  # of a part

Floats = NDArray[np.float64]


def measured(proto: onnx.ModelProto, influence: Mapping[str, Influence], images: Sequence[NDArray[np.float32]]) -> dict[str, Influence]:
    """`influence`, each figure's geometric mean with what the outputs for `images` (n, c, h, w) give.

    Layers without noise keep theirs.
    """
    network, means = Network(proto), Means([layer.input for layer in Network(proto).layers.values()])
    observe(proto, ((part, np.full(len(part), -1)) for part in images), means)
    run = runner(proto)
    expected = [run(part) for part in images]

    def moved(changed: onnx.ModelProto) -> float:
        answer: Callable[[NDArray[np.float32]], Floats] = runner(changed)
        # Of equal outputs it is 0 but for rounding, to either side.
        return max(float(np.mean([divergence(want, answer(part)) for want, part in zip(expected, images, strict=True)])), 0.0)

    found = {}
    for name, layer in network.layers.items():
        count, given = len(layer.weight), influence[name]
        errors = grid_errors(layer.weight, [PROBE_BITS])[:, 0]
        coarse = restored(*on_grid(layer.weight, [PROBE_BITS] * count))
        channels = given.channels.copy()
        for part in np.array_split(np.argsort(errors * given.channels), max(1, min(PARTS, count // _LEAST_CHANNELS))):
            weight = layer.weight.copy()
            weight[part] = coarse[part]
            changed = {layer.node.input[1]: layer.stored(weight)}
            shift = mean_output(layer, weight.astype(np.float64) - layer.weight, means.found()[layer.input])
            if layer.bias is not None and shift is not None:
                changed[layer.node.input[2]] = layer.bias - shift
            noise = errors[part].sum() * given.energy
            if noise > 0:
                channels[part] = moved(with_constants(proto, changed)) / noise
        found[name] = Influence(np.sqrt(given.channels * channels), given.energy)
    return found


def divergence(expected: Floats, got: Floats) -> float:
    """How far outputs are from the expected ones: Kullback-Leibler of class probabilities (n, classes); of other shapes the power of the
    difference over that of the expected.
    """
    if expected.ndim == 2 and expected.shape[1] > 1:
        wanted = _log_shares(expected)
        return float((np.exp(wanted) * (wanted - _log_shares(got))).sum(axis=1).mean())
    return float(np.square(got - expected).sum() / max(float(np.square(expected).sum()), 1e-30))


def _log_shares(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
