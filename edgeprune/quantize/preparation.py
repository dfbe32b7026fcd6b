"""What can be done to the fp32 network so that it rounds better: equalised ranges, corrected biases. ONNX in, ONNX out.

Range equalisation: where a layer's output feeds one other layer only, through nothing or a ReLU, channel c of the first may be divided
by any s_c > 0 if the second multiplies by it. s_c = sqrt(r1_c / r2_c), with r the largest weights on either side, makes both sides'
channels alike. Clipping at 6 is not scale-free, so such pairs stay.
Bias correction: rounded weights shift a layer's mean output by (W' - W) applied to its mean input; the bias takes that back.
Source: Nagel, van Baalen, Blankevoort, Welling, Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019. We
differ in: mean inputs come from calibration images, so borders and correlations count; ReLU6 is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeprune.quantize.bits import BitPlan
from edgeprune.quantize.grid import on_grid, restored
from edgeprune.quantize.network import Layer, Network, attributes

_ROUNDS = 20  # of equalisation along chains; pairs settle within a few


def equalized(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with ranges equalised along every pair there is; `proto` itself where there is none."""
    network = Network(proto)
    pairs = _pairs(network)
    if not pairs:
        return proto
    weights = {name: layer.weight.astype(np.float64) for name, layer in network.layers.items()}
    biases = {name: layer.bias.astype(np.float64) for name, layer in network.layers.items() if layer.bias is not None}
    for _ in range(_ROUNDS):
        for first, second in pairs:
            scale = _scale(weights[first], weights[second], attributes(network.layers[second].node).get("group", 1))
            weights[first] /= scale.reshape(-1, *[1] * (weights[first].ndim - 1))
            if first in biases:
                biases[first] /= scale
            axis = 0 if weights[second].shape[1] == 1 and len(weights[second]) == len(scale) else 1
            weights[second] *= np.expand_dims(scale, [i for i in range(weights[second].ndim) if i != axis])
    changed = {network.layers[name].node.input[1]: network.layers[name].stored(w) for name, w in weights.items()}
    changed |= {network.layers[name].node.input[2]: b for name, b in biases.items()}
    return with_constants(proto, changed)


def corrected(proto: onnx.ModelProto, plan: BitPlan, means: Mapping[str, NDArray[np.float64]]) -> onnx.ModelProto:
    """The network with the biases its int8 layers need so that their mean outputs stay; `means`: of each layer's input (c, …)."""
    network = Network(proto)
    changed = {}
    for name, layer in network.layers.items():
        if plan.precision(name) == "int8" and layer.bias is not None and layer.input in means:
            bits = plan.channels.get(name) or (8,) * len(layer.weight)
            difference = restored(*on_grid(layer.weight, bits)).astype(np.float64) - layer.weight
            shift = mean_output(layer, difference, means[layer.input])
            if shift is not None:
                changed[layer.node.input[2]] = layer.bias - shift
    return with_constants(proto, changed)


def _pairs(network: Network) -> list[tuple[str, str]]:
    """(first, second) names of layers that may be equalised: all of the first's output goes into the second, element by element."""
    found = []
    reads = {id(layer.node): name for name, layer in network.layers.items()}
    used = [node.input[1] for node in network.nodes if id(node) in reads]
    for name, layer in network.layers.items():
        tensor = layer.output
        clip = network.clipped(tensor)
        if clip is not None and clip.op_type == "Relu":
            tensor = clip.output[0]
        readers = network.readers.get(tensor, [])
        if len(readers) != 1 or tensor in network.outputs or id(readers[0]) not in reads or readers[0].op_type != layer.node.op_type:
            continue
        second = network.layers[reads[id(readers[0])]]
        group = attributes(second.node).get("group", 1)
        depthwise = group == len(layer.weight) == len(second.weight)
        alone = used.count(layer.node.input[1]) == used.count(second.node.input[1]) == 1
        if second.input == tensor and alone and (depthwise or group == 1) and layer.node.op_type != "MatMul":
            found.append((name, second.name))
    return found


def _scale(first: NDArray[np.float64], second: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """(channels,): by how much each channel between two layers shrinks."""
    made = np.abs(first).reshape(len(first), -1).max(axis=1)
    read = np.abs(second if group > 1 else np.moveaxis(second, 1, 0)).reshape(len(first), -1).max(axis=1)
    live = (made > 0) & (read > 0)
    return np.where(live, np.sqrt(np.where(live, made, 1.0) / np.where(live, read, 1.0)), 1.0)


def mean_output(layer: Layer, weight: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """(channels,): the mean over positions of what `weight` makes of the mean input; None for convs of other than two dimensions."""
    if layer.node.op_type != "Conv":
        return np.asarray(weight @ mean.reshape(-1, mean.shape[-1]).mean(axis=0))
    given: Mapping[str, Any] = attributes(layer.node)
    if weight.ndim != 4 or given.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
    padded = torch.nn.functional.pad(torch.from_numpy(mean)[None], (left, right, top, bottom))
    made = torch.nn.functional.conv2d(
        padded,
        torch.from_numpy(weight),
        stride=tuple(given.get("strides", (1, 1))),
        dilation=tuple(given.get("dilations", (1, 1))),
        groups=given.get("group", 1),
    )
    return np.asarray(made.mean(dim=(0, 2, 3)).numpy())


def with_constants(proto: onnx.ModelProto, values: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """A copy with other values of these constants, as float32."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for constant in made.graph.initializer:
        if constant.name in values:
            constant.CopyFrom(numpy_helper.from_array(values[constant.name].astype(np.float32), constant.name))
    return made
