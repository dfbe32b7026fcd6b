"""How much discriminant information (DI) a layer's output channels carry: what noise on a channel costs the classes' separation.

The ridge regression of DI (criteria/di.py) predicts the labels from a layer's outputs with weights W. Noise of variance v on the
features of channel c, independent of everything, raises its squared error by N v ||W_c||^2 over N images: that is the influence,
reported as N ||W_c||^2 / ||Yb||^2, the share of the labels' energy lost per unit of noise variance.
Rounding channel c's weights with the squared error e_c (summed over its weights) puts noise of variance e_c * E on its outputs,
E the mean square of what one weight meets; so e_c * E_layer * influence_c is the loss, comparable inside a layer and, as far as one
linear readout can tell, between layers.
Source: Hou and Kung, arXiv 2005.13796 (2020), has channels of larger DI influence get more bits; the rule itself was not recoverable,
and this derivation is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edgeprune.criteria.di import Moments, maps_gradient
from edgeprune.errors import DataError
from edgeprune.quantize.calibrate import Batch, observe
from edgeprune.quantize.network import Network

Floats64 = NDArray[np.float64]
RHO = 1.0  # times the mean variance of the features


@dataclass(frozen=True, eq=False)
class Influence:
    """Of one layer: `channels` (c,) >= 0, and `input_energy`, the mean square of its inputs."""

    channels: Floats64
    input_energy: float


def influences(proto: onnx.ModelProto, batches: Iterable[Batch]) -> Mapping[str, Influence]:
    """By layer, from images with labels. Raises DataError for images without labels or too few for two classes."""
    network = Network(proto)
    watcher = _Watcher(network)
    observe(proto, batches, watcher)
    return {name: watcher.found(name, layer.input, layer.output) for name, layer in network.layers.items()}
