"""How much discriminant information (DI) a layer's output channels carry: what noise on a channel costs the classes' separation.

The ridge regression of DI (criteria/di.py, mode maps: every pixel is a feature, a few images at a time) predicts the targets from a
layer's outputs with weights W. Noise of variance v on every feature of channel c raises its squared error by N v ||W_c||^2 over N
images, so the influence of the channel is N ||W_c||^2 / ||Yb||^2: the share of the targets' energy lost per unit of variance.
Rounding the channel's weights by e_c (a sum of squares) puts noise of variance e_c * energy on its outputs, `energy` being the mean
square of what one weight meets. e_c * energy * influence_c is then the loss: comparable between channels and, as far as a linear
readout can tell, between layers. Targets are the labels where all images have one, else what the network returns.
Source: Hou and Kung, arXiv 2005.13796 (2020): channels of larger DI influence get more bits. Its bit rule was not recoverable; this
derivation and the ridge (as large as the mean eigenvalue of the images' kernel matrix) are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.criteria.di import maps_gradient
from edgeprune.errors import DataError
from edgeprune.quantize.calibrate import Batch, observe
from edgeprune.quantize.network import Network

AT_ONCE = 32  # images of one regression
_SIDE = 32  # pixels: of larger maps every second, third … pixel is taken


@dataclass(frozen=True, eq=False)
class Influence:
    """Of one layer: `channels` (c,) >= 0 per unit of noise variance, and `energy`, the mean square of its inputs."""

    channels: NDArray[np.float64]
    energy: float


def influences(proto: onnx.ModelProto, batches: Iterable[Batch]) -> Mapping[str, Influence]:
    """By layer. Raises DataError for fewer than 32 images or targets that are all alike."""
    network = Network(proto)
    watcher = _Watcher(network)
    observe(proto, batches, watcher)
    return watcher.found()


class _Watcher:
    """Keeps the outputs of all layers for AT_ONCE images, then only sums; an Observer."""

    def __init__(self, network: Network) -> None:
        self._layers = network.layers
        self._made = {layer.output: name for name, layer in self._layers.items()}
        self._read = {layer.input for layer in self._layers.values()}
        self._returned = network.outputs[0]
        # the network's output comes last: it completes the batch
        self.tensors = (*sorted((self._read | self._made.keys()) - {self._returned}), self._returned)
        self._waiting: dict[str, list[Tensor]] = {}
        self._targets: list[Tensor] = []
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._energy: dict[str, float] = dict.fromkeys(self._read, 0.0)
        self._images = self._regressions = 0

    def see(self, name: str, values: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        """See Observer."""
        if name in self._read:
            self._energy[name] += float(np.square(values, dtype=np.float64).mean()) * len(values)
        if name in self._made:
            layer = self._made[name]
            maps = _maps(values, last=self._layers[layer].node.op_type != "Conv")
            step = max(1, -(-maps.shape[-1] // _SIDE))
            self._waiting.setdefault(layer, []).append(maps[:, :, ::step, ::step].clone())
        if name == self._returned:
            self._images += len(values)
            known = bool((labels >= 0).all())
            outputs = torch.from_numpy(values.reshape(len(values), -1)).double()
            self._targets.append(torch.from_numpy(labels)[:, None] if known else outputs)
            while sum(map(len, self._targets)) >= AT_ONCE:
                self._regress()

    def found(self) -> Mapping[str, Influence]:
        """By layer."""
        if not self._regressions:
            raise DataError(f"discriminant information needs at least {AT_ONCE} images that differ in their targets, got {self._images}.")
        return {
            name: Influence(self._sums[name] / self._regressions, self._energy[layer.input] / self._images)
            for name, layer in self._layers.items()
        }

    def _regress(self) -> None:
        targets, rest = _cut(self._targets)
        self._targets = rest
        if not targets.is_floating_point():
            targets = torch.nn.functional.one_hot(torch.unique(targets, return_inverse=True)[1].flatten()).double()
        targets = targets - targets.mean(dim=0)
        energy = float(targets.square().sum())
        for name, waiting in self._waiting.items():
            maps, self._waiting[name] = _cut(waiting)
            rho = float(maps.double().var(dim=0, correction=0).sum())
            if energy > 0 and rho > 0:
                weights = maps_gradient(maps, targets, rho).numpy() / (2 * rho)
                self._sums[name] = self._sums.get(name, 0) + weights * AT_ONCE / energy
            self._sums.setdefault(name, np.zeros(maps.shape[1]))
        self._regressions += energy > 0


def _maps(values: NDArray[np.float32], *, last: bool) -> Tensor:
    """(n, channels, h, w), whatever the layer's output; `last`: its channels are the last axis."""
    tensor = torch.from_numpy(values)
    tensor = tensor.movedim(-1, 1) if last else tensor
    return tensor.reshape(*tensor.shape[:2], -1, tensor.shape[-1] if tensor.ndim > 3 else 1)


def _cut(parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(the first AT_ONCE rows, what is left)."""
    whole = torch.cat(parts)
    return whole[:AT_ONCE], [whole[AT_ONCE:]] if len(whole) > AT_ONCE else []
