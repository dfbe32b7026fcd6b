"""What quantization reads from an ONNX network: its layers with their weights, who makes and reads each tensor, what can be 8-bit.

Nothing here changes the ModelProto. Layers are named by the module whose weight they hold, as the exporter names initializers
("layer1.0.conv1.weight"); a weight that the simplifier renamed gives the name of the layer's output instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Floats = NDArray[np.float32]
# They choose or move values and make none, so they work on 8-bit tensors as they are.
MOVES = frozenset(
    {
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Slice",
        "Pad",
        "MaxPool",
        "Identity",
        "DepthToSpace",
        "SpaceToDepth",
        "Expand",
    }
)
# onnxruntime has 8-bit kernels for these, once all their inputs and their output are 8-bit.
ARITHMETIC = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"})


@dataclass(frozen=True, eq=False)
class Layer:
    """A conv or linear. `weight` has the output channels first, (channels, …), whatever the node's own order; `bias` (channels,)."""

    name: str
    node: onnx.NodeProto
    weight: Floats
    bias: Floats | None

    @property
    def input(self) -> str:
        """The tensor it reads."""
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        """The tensor it makes."""
        return str(self.node.output[0])

    @property
    def axis(self) -> int:
        """Where the node's own weight has its output channels."""
        return 0 if self.node.op_type == "Conv" or attributes(self.node).get("transB") else self.weight.ndim - 1

    def stored(self, weight: NDArray[Any]) -> NDArray[Any]:
        """A weight (channels, …) in the order of the node's own."""
        return np.ascontiguousarray(np.moveaxis(weight, 0, self.axis))


class Network:
    """Lookups on one ModelProto, which must not change meanwhile."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes: list[onnx.NodeProto] = list(proto.graph.node)

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        """Initializers by name."""
        return {i.name: i for i in self.proto.graph.initializer}

    @cached_property
    def inputs(self) -> list[str]:
        """What the network is fed."""
        return [i.name for i in self.proto.graph.input if i.name not in self.constants]

    @cached_property
    def outputs(self) -> list[str]:
        """What the network returns."""
        return [o.name for o in self.proto.graph.output]

    @cached_property
    def maker(self) -> dict[str, onnx.NodeProto]:
        """The node that makes a tensor."""
        return {output: node for node in self.nodes for output in node.output}

    @cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read a tensor, once for each time."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Convs and linears with constant weights, by name, in the order they run."""
        found: dict[str, Layer] = {}
        for node in self.nodes:
            if (layer := self._layer(node)) is not None:
                found[layer.name if layer.name not in found else layer.output] = layer
        return found

    @cached_property
    def layer_of(self) -> dict[str, str]:
        """The name of the layer that makes a tensor."""
        return {layer.output: name for name, layer in self.layers.items()}

    def array(self, name: str) -> NDArray[Any]:
        """The values of a constant."""
        return np.asarray(numpy_helper.to_array(self.constants[name]))

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """The tensors a node reads that are not constant."""
        return [name for name in node.input if name and name not in self.constants]

    def limits(self, node: onnx.NodeProto) -> tuple[float, float] | None:
        """(lowest, highest) output of a clipping activation; None for other nodes."""
        if node.op_type == "Relu":
            return 0.0, float("inf")
        if node.op_type != "Clip" or any(name and name not in self.constants for name in node.input[1:]):
            return None
        bounds = [float(self.array(name)) if name else None for name in (*node.input[1:], "", "")[:2]]
        low, high = bounds
        return (-float("inf") if low is None else low), (float("inf") if high is None else high)

    def clipped(self, tensor: str) -> onnx.NodeProto | None:
        """The clipping activation that alone reads a tensor: a saturating 8-bit tensor does its work."""
        readers = self.readers.get(tensor, [])
        if len(readers) == 1 and tensor not in self.outputs and self.limits(readers[0]) is not None:
            return readers[0]
        return None

    def _layer(self, node: onnx.NodeProto) -> Layer | None:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2 or node.input[1] not in self.constants:
            return None
        given = attributes(node)
        if node.op_type == "Gemm" and (given.get("transA") or given.get("alpha", 1.0) != 1 or given.get("beta", 1.0) != 1):
            return None
        if node.input[0] in self.constants or any(name not in self.constants for name in node.input[2:]):
            return None
        weight = self.array(node.input[1])
        if weight.dtype != np.float32 or weight.ndim < 2 or (node.op_type == "MatMul" and weight.ndim != 2):
            return None
        bias = self.array(node.input[2]) if len(node.input) > 2 else None
        if node.op_type != "Conv" and not given.get("transB"):
            weight = weight.T
        name = node.input[1]
        plain = name.removesuffix(".weight") if name.endswith(".weight") else node.output[0]
        return Layer(plain, node, weight, bias)


def attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    """The attributes of a node as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
