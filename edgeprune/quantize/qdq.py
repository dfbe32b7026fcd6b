"""Write a BitPlan into an ONNX network: QuantizeLinear/DequantizeLinear pairs that runtimes fuse into 8-bit kernels.

Activations are u8 with one scale, weights s8 with a scale per output channel, biases int32: the combination that runs fastest on x86
and is safe on ARM cores without dot product. A tensor that an int8 layer makes stays 8-bit through everything that only moves
values (pooling, padding, slicing, reshaping: these nodes work on the 8-bit tensor itself) and through arithmetic whose inputs
are all 8-bit; clipping activations vanish into the tensor's own saturation. A float node gets a float tensor, an int8 layer an 8-bit
one: each change of precision is one node that costs time, nothing else does.
onnxruntime (1.31, seen) runs an fp32 conv in 8 bits all the same where its input and its clipped output are 8-bit: to keep a layer in
floats, keep a neighbour too.
Weights that only have to be small (fp16, int4) become constants that the runtime turns into floats when it loads the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeprune.quantize.bits import BitPlan
from edgeprune.quantize.calibrate import Range
from edgeprune.quantize.grid import on_grid
from edgeprune.quantize.network import ARITHMETIC, MOVES, Layer, Network

_INT4_OPSET = 21  # the first one with 4-bit tensors


def observed_tensors(network: Network) -> tuple[str, ...]:
    """The tensors whose ranges `write_qdq` may need: what layers and arithmetic read, and what they make once it is clipped."""
    found = dict.fromkeys(layer.input for layer in network.layers.values())
    layers = {id(layer.node) for layer in network.layers.values()}
    for node in network.nodes:
        if id(node) in layers or node.op_type in ARITHMETIC:
            clip = network.clipped(node.output[0])
            found[clip.output[0] if clip else node.output[0]] = None
    return tuple(found)


def write_qdq(proto: onnx.ModelProto, plan: BitPlan, ranges: Mapping[str, Range]) -> onnx.ModelProto:
    """A network in which the layers of the plan have its precision; `ranges` holds what `observed_tensors` asks for.

    `proto` is not changed. The outputs stay float. Layers that the network does not have are ignored.
    """
    writer = _Writer(proto, plan, ranges)
    for node in writer.network.nodes:
        writer.add(node)
    return writer.finished()


class _Writer:
    """The new graph as it grows, and which tensors exist in which form."""

    def __init__(self, proto: onnx.ModelProto, plan: BitPlan, ranges: Mapping[str, Range]) -> None:
        self.network = Network(proto)
        self._plan, self._ranges = plan, ranges
        self._layers = {id(layer.node): (name, layer) for name, layer in self.network.layers.items()}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._byte: dict[str, tuple[str, str]] = {}  # tensor -> (its 8-bit form, the range that scales it)
        self._floats = set(self.network.inputs)
        self._made_byte: set[str] = set()  # 8-bit from the start, not converted for a reader
        self._absorbed: set[int] = set()
        self._copies = 0

    def add(self, node: onnx.NodeProto) -> None:
        """One node of the old graph, in its precision."""
        if id(node) in self._absorbed:
            return
        name, layer = self._layers.get(id(node), ("", None))
        read = self.network.activations(node)
        if layer is not None and self._plan.precision(name) == "int8":
            self._int8_layer(name, layer)
        elif node.op_type in MOVES and read and read[0] in self._made_byte and self._moved(node, read[0]):
            pass
        elif node.op_type in ARITHMETIC and all(t in self._made_byte for t in read) and len(read) == len([i for i in node.input if i]):
            self._arithmetic(node)
        else:
            self._float(node, name)

    def finished(self) -> onnx.ModelProto:
        """The new network."""
        for name in self.network.outputs:
            self._as_float(name)
        old = self.network.proto
        used = {name for node in self._nodes for name in node.input}
        kept = [c for c in self.network.constants.values() if c.name in used or c.name in self.network.outputs]
        made = onnx.ModelProto()
        made.CopyFrom(old)
        for field in (made.graph.node, made.graph.initializer, made.graph.value_info):
            del field[:]
        made.graph.node.extend(self._nodes)
        made.graph.initializer.extend([*kept, *self._constants.values()])
        if any(c.data_type == TensorProto.INT4 for c in self._constants.values()):
            for opset in made.opset_import:
                opset.version = max(opset.version, _INT4_OPSET) if opset.domain == "" else opset.version
            made.ir_version = max(made.ir_version, 10)
        onnx.checker.check_model(made, full_check=True)
        return made

    def _int8_layer(self, name: str, layer: Layer) -> None:
        bits = self._plan.channels.get(name) or (8,) * len(layer.weight)
        values, scale = on_grid(layer.weight, bits)
        _, input_scale, _ = self._scaled(self._source(layer.input))
        if layer.bias is not None:
            # int32 must hold the bias in units of both scales
            needed = (np.abs(layer.bias) / (input_scale * 2.0**30)).astype(np.float32)
            if (needed > scale).any():
                scale = np.maximum(scale, needed)
                values = np.rint(layer.weight / scale.reshape(-1, *[1] * (layer.weight.ndim - 1))).astype(np.int8)
        inputs = [self._for_byte_reader(layer.input), self._dequantized(layer.node.input[1], layer.stored(values), scale, layer.axis)]
        if layer.bias is not None:
            bias_scale = scale * np.float32(input_scale)
            whole = np.rint(layer.bias.astype(np.float64) / bias_scale).astype(np.int32)
            inputs.append(self._dequantized(f"{layer.output}.bias", whole, bias_scale, 0))
        # a linear's kernel may return floats, which spares the last one a rounding
        self._emit(layer.node, inputs, byte=layer.node.op_type == "Conv" or layer.output not in self.network.outputs)

    def _arithmetic(self, node: onnx.NodeProto) -> None:
        self._emit(node, [self._for_byte_reader(name) for name in node.input if name], byte=True)

    def _emit(self, node: onnx.NodeProto, inputs: list[str], *, byte: bool) -> None:
        """The node with its inputs renamed; `byte`: its output, clipped where a clipping activation follows, becomes 8-bit."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(inputs)
        self._nodes.append(copy)
        output = node.output[0]
        if not byte:
            self._floats.add(output)
            return
        clip = self.network.clipped(output)
        final = clip.output[0] if clip else output
        if clip:
            self._absorbed.add(id(clip))
        copy.output[0] = f"{final}.unrounded"
        self._quantize(copy.output[0], final)
        self._made_byte.add(final)

    def _moved(self, node: onnx.NodeProto, source: str) -> bool:
        """The node on 8-bit values, if it can be."""
        tensor, scaling = self._byte[source]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[0] = tensor
        if node.op_type == "Pad":
            mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
            value = self.network.array(node.input[2]) if len(node.input) > 2 and node.input[2] in self.network.constants else np.zeros(1)
            if (len(node.input) > 2 and node.input[2] and node.input[2] not in self.network.constants) or value.any():
                return False
            if mode == b"constant":
                del copy.input[2:]
                axes = list(node.input[3:])
                copy.input.extend([self._zero_point(scaling), *axes])
        if len(node.output) != 1:
            return False
        output = node.output[0]
        copy.output[0] = f"{output}.u8"
        self._nodes.append(copy)
        self._byte[output] = (copy.output[0], scaling)
        self._made_byte.add(output)
        return True

    def _float(self, node: onnx.NodeProto, name: str) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for place, tensor in enumerate(node.input):
            if tensor in self._byte:
                self._as_float(tensor)
            elif place == 1 and name and self._plan.precision(name) in ("fp16", "int4"):
                copy.input[1] = self._small(name, tensor)
        self._nodes.append(copy)
        self._floats.update(node.output)

    def _small(self, name: str, tensor: str) -> str:
        """A float weight stored in 16 or 4 bits; the runtime folds what follows when it loads the network."""
        layer = self.network.layers[name]
        if self._plan.precision(name) == "fp16":
            small = self._constant(f"{tensor}.fp16", self.network.array(tensor).astype(np.float16))
            self._nodes.append(helper.make_node("Cast", [small], [f"{tensor}.float"], to=TensorProto.FLOAT))
            return f"{tensor}.float"
        values, scale = on_grid(layer.weight, [4] * len(layer.weight))
        stored = layer.stored(values)
        packed = helper.make_tensor(f"{tensor}.int4", TensorProto.INT4, stored.shape, _nibbles(stored), raw=True)
        self._constants[packed.name] = packed
        shape = [1] * stored.ndim
        shape[layer.axis] = -1
        factor = self._constant(f"{name}.step", scale.reshape(shape))
        self._nodes.append(helper.make_node("Cast", [packed.name], [f"{tensor}.whole"], to=TensorProto.FLOAT))
        self._nodes.append(helper.make_node("Mul", [f"{tensor}.whole", factor], [f"{tensor}.float"]))
        return f"{tensor}.float"

    def _source(self, tensor: str) -> str:
        """The tensor whose range scales the 8-bit form of `tensor`."""
        return self._byte[tensor][1] if tensor in self._byte else tensor

    def _for_byte_reader(self, tensor: str) -> str:
        """A dequantized copy for one reader of its own: runtimes fuse such pairs reader by reader."""
        if tensor not in self._byte:
            self._quantize(tensor, tensor)
        byte, scaling = self._byte[tensor]
        self._copies += 1
        copy = f"{tensor}.dq{self._copies}"
        self._nodes.append(helper.make_node("DequantizeLinear", [byte, *self._scale_names(scaling)], [copy]))
        return copy

    def _as_float(self, tensor: str) -> None:
        """Make sure that `tensor` exists as floats under its own name."""
        if tensor not in self._floats and tensor in self._byte:
            byte, scaling = self._byte[tensor]
            self._nodes.append(helper.make_node("DequantizeLinear", [byte, *self._scale_names(scaling)], [tensor]))
            self._floats.add(tensor)

    def _quantize(self, source: str, tensor: str) -> None:
        self._nodes.append(helper.make_node("QuantizeLinear", [source, *self._scale_names(tensor)], [f"{tensor}.u8"]))
        self._byte[tensor] = (f"{tensor}.u8", tensor)

    def _scaled(self, tensor: str) -> tuple[Range, float, int]:
        """(range, scale, zero point) of a tensor's 8-bit form."""
        low, high = self._ranges[tensor]
        maker = self.network.maker.get(tensor)
        if maker is not None and (limits := self.network.limits(maker)) is not None:
            low, high = max(low, limits[0]), min(high, limits[1])
        scale = float(np.float32(max((high - low) / 255, 1e-8)))
        return (low, high), scale, int(np.clip(np.rint(-low / scale), 0, 255))

    def _scale_names(self, tensor: str) -> list[str]:
        if f"{tensor}.scale" not in self._constants:
            _, scale, zero = self._scaled(tensor)
            self._constant(f"{tensor}.scale", np.array(scale, np.float32))
            self._constant(f"{tensor}.zero", np.array(zero, np.uint8))
        return [f"{tensor}.scale", f"{tensor}.zero"]

    def _zero_point(self, tensor: str) -> str:
        return self._scale_names(tensor)[1]

    def _dequantized(self, name: str, values: NDArray[np.generic], scale: NDArray[np.float32], axis: int) -> str:
        whole = self._constant(f"{name}.whole", values)
        factor = self._constant(f"{name}.scale", scale)
        zero = self._constant(f"{name}.zero", np.zeros(len(scale), values.dtype))
        self._nodes.append(helper.make_node("DequantizeLinear", [whole, factor, zero], [f"{name}.float"], axis=axis))
        return f"{name}.float"

    def _constant(self, name: str, values: NDArray[np.generic]) -> str:
        self._constants[name] = numpy_helper.from_array(values, name)
        return name


def _nibbles(values: NDArray[np.int8]) -> bytes:
    """Two 4-bit numbers a byte, the first in the low half."""
    flat = values.astype(np.uint8).ravel() & 15
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return bytes((flat[::2] | flat[1::2] << 4).astype(np.uint8))
