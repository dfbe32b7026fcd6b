"""The inside of a .tflite file: its metadata with the hash of its own content, its operations, and tensors named like torch's layers.

The schema comes with the LiteRT runtime, so a board that can run a file can also check it. The metadata is one JSON object in one
named buffer; its `content_sha256` is the hash of the file with zeros in its own place.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from edgeprune.errors import ExportError
from edgeprune.run import product_version

NAME = b"edgeprune"  # of the metadata buffer
_HASH = re.compile(rb'"content_sha256": "([0-9a-f]{64})"')
_ZEROS = b"0" * 64
_DAMAGE = (
    struct.error,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)  # of the schema's readers on damaged bytes
_MULTIPLYING = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")


def schema() -> ModuleType:
    """The generated readers and writers of the format. Raises ExportError where the runtime is not installed."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise ExportError(
            "reading and running .tflite files needs LiteRT, which is an extra: pip install 'edgeprune[tflite]' (on a board that only runs "
            "them: pip install ai-edge-litert)."
        ) from error
    found: ModuleType = schema_py_generated
    return found


def unpacked(content: bytes) -> Any:
    """The file as the schema's mutable objects (ModelT). Raises ExportError for bytes that are no such file.

    Data that lie behind the flatbuffer, as litert-quantizer puts larger ones, are brought into it: offsets do not survive `packed`.
    """
    reader = schema().ModelT
    if content[4:8] != b"TFL3":
        raise ExportError("it does not begin like a TFLite flatbuffer")
    try:
        model = reader.InitFromPackedBuf(content, 0)
        for buffer in model.buffers:
            if buffer.offset:
                if buffer.offset + buffer.size > len(content):
                    raise ExportError("it is truncated")
                buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
                buffer.offset = buffer.size = 0
    except _DAMAGE as error:
        raise ExportError("what its tables point to cannot be read") from error
    return model


def packed(model: Any) -> bytes:
    """The file of a ModelT; the data of every tensor begins at a multiple of 16 bytes, as the schema asks."""
    import flatbuffers

    class Aligned(flatbuffers.Builder):  # type: ignore[misc]  # no stubs
        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:
            return super().StartVector(elemSize, numElems, 16 if elemSize == 1 else alignment)

    builder = Aligned(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def described(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """The same file with the metadata and the hash of everything in it."""
    model = unpacked(content)
    parts = schema()
    model.description = f"edgeprune {product_version()}"
    kept = [m for m in model.metadata or [] if m.name == b"min_runtime_version"]
    text = json.dumps({**metadata, "edgeprune_version": product_version(), "content_sha256": _ZEROS.decode()}, sort_keys=True)
    buffer, entry = parts.BufferT(), parts.MetadataT()
    buffer.data = np.frombuffer(text.encode(), np.uint8)
    entry.name, entry.buffer = NAME, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*kept, entry]
    blank = packed(model)
    return blank.replace(b'"content_sha256": "' + _ZEROS, b'"content_sha256": "' + hashlib.sha256(blank).hexdigest().encode())


def changed(content: bytes) -> bool:
    """Whether a file that carries a hash no longer matches it. Files of others carry none."""
    found = _HASH.search(content)
    return found is not None and hashlib.sha256(content.replace(found[1], _ZEROS)).hexdigest() != found[1].decode()


def metadata_of(content: bytes) -> dict[str, str]:
    """What `described` wrote; empty for files of others."""
    model = unpacked(content)
    for entry in model.metadata or []:
        if entry.name == NAME:
            texts: dict[str, str] = json.loads(bytes(model.buffers[entry.buffer].data))
            return texts
    return {}


def operations(content: bytes) -> Counter[str]:
    """How often each operation occurs, by the schema's name (CONV_2D, TRANSPOSE …)."""
    model = unpacked(content)
    return Counter(_name(model, o) for graph in model.subgraphs for o in graph.operators)


def stored_bits(content: bytes) -> dict[str, int]:
    """In how many bits the weights of every layer are stored, by torch's name of the layer."""
    model = unpacked(content)
    types = schema().TensorType
    widths = {types.FLOAT32: 32, types.FLOAT16: 16, types.INT8: 8, types.UINT8: 8, types.INT4: 4, types.INT2: 2}
    names = {tensor.name.decode(): widths.get(tensor.type, 0) for graph in model.subgraphs for tensor in graph.tensors}
    return {name.removesuffix(".weight"): bits for name, bits in names.items() if name.endswith(".weight")}


def named_like_torch(
    content: bytes, tags: Mapping[str, str], weights_of: Mapping[str, str], inputs: list[str], outputs: list[str]
) -> tuple[bytes, dict[str, str]]:
    """The same file with readable tensor names, and torch's layer -> its weight tensor, for layers that are one operation here.

    The converter names every tensor by the classes around it: hundreds of bytes each, with the paths of the user's code. `tags`: that
    chain for a module -> torch's name of it. An operation's output gets its module's name, a weight the parameter's. `weights_of`: the
    SHA-256 of a weight's bytes as they lie here -> its layer, for modules whose chain is lost (a forward that torch.fx wrote).
    """
    model = unpacked(content)
    graph = model.subgraphs[0]
    layers: dict[str, str] = {}
    taken: Counter[str] = Counter()

    def rename(tensor: Any, name: str) -> str:
        taken[name] += 1
        tensor.name = (name if taken[name] == 1 else f"{name}:{taken[name]}").encode()
        return str(tensor.name.decode())

    owners = [_owner(tensor.name.decode(), tags) for tensor in graph.tensors]
    weights = {o.inputs[1] for o in graph.operators if _name(model, o) in _MULTIPLYING}
    for index in weights:
        if not owners[index] and (data := model.buffers[graph.tensors[index].buffer].data) is not None:
            owners[index] = weights_of.get(hashlib.sha256(bytes(data)).hexdigest(), "")
    for index, tensor in enumerate(graph.tensors):
        if index in weights and owners[index] and owners[index] not in layers:
            layers[owners[index]] = rename(tensor, f"{owners[index]}.weight")
        elif index in graph.inputs or index in graph.outputs:
            position = list(graph.inputs if index in graph.inputs else graph.outputs).index(index)
            rename(tensor, (inputs if index in graph.inputs else outputs)[position])
        else:
            rename(tensor, owners[index] or "constant")
    for definition in model.signatureDefs or []:
        for entries, names in ((definition.inputs, inputs), (definition.outputs, outputs)):
            order = list(graph.inputs if entries is definition.inputs else graph.outputs)
            for entry in entries:
                entry.name = names[order.index(entry.tensorIndex)].encode()
    return packed(model), layers


def averaged_in_place(content: bytes) -> bytes:
    """The same function without the transposes that stand before averages over images.

    For `x.mean((2, 3))` the converter turns its NHWC tensor to NCHW and averages there; here the average runs over the NHWC tensor
    itself, and a transpose that nothing else reads goes.
    """
    model = unpacked(content)
    graph = model.subgraphs[0]
    transposes = {int(o.outputs[0]): o for o in graph.operators if _name(model, o) == "TRANSPOSE"}
    for mean in [o for o in graph.operators if _name(model, o) == "MEAN" and int(o.inputs[0]) in transposes]:
        transpose = transposes[int(mean.inputs[0])]
        order = _numbers(model, transpose.inputs[1])
        axes = {axis % max(1, len(order)) for axis in _numbers(model, mean.inputs[1])}
        stays = [source for axis, source in enumerate(order) if axis not in axes]
        if order and axes and not mean.builtinOptions.keepDims and stays == sorted(stays):
            fresh = _add_numbers(model, f"axes of {mean.outputs[0]}", sorted(order[axis] for axis in axes))
            mean.inputs = np.array([transpose.inputs[0], fresh], np.int32)
    read = {int(i) for o in graph.operators for i in o.inputs} | {int(i) for i in graph.outputs}
    idle = {id(o) for output, o in transposes.items() if output not in read}
    _drop(model, idle)
    return packed(model)


def rectified_once(content: bytes) -> bytes:
    """The same function without a RELU of what is rectified already: two meet where a residual branch between them vanished."""
    model = unpacked(content)
    graph = model.subgraphs[0]
    makers = {int(i): o for o in graph.operators for i in o.outputs}
    instead: dict[int, int] = {}
    gone: set[int] = set()
    for o in graph.operators:
        o.inputs = np.array([instead.get(int(i), int(i)) for i in o.inputs], np.int32)
        first = int(o.outputs[0])
        if _name(model, o) == "RELU" and first not in graph.outputs and _rectifies(model, makers.get(int(o.inputs[0]))):
            instead[first] = int(o.inputs[0])
            gone.add(id(o))
    _drop(model, gone)
    return packed(model)


def _rectifies(model: Any, operator: Any | None) -> bool:
    """Whether no value that it gives is negative, as far as its kind says."""
    if operator is None:
        return False
    kinds = schema().ActivationFunctionType
    fused = getattr(operator.builtinOptions, "fusedActivationFunction", kinds.NONE)
    return _name(model, operator) in ("RELU", "RELU6") or fused in (kinds.RELU, kinds.RELU6)


def _drop(model: Any, gone: set[int]) -> None:
    """Takes operations (by id) out of the first graph, and the tensors that nothing names then: who reads all tensors stumbles there."""
    graph = model.subgraphs[0]
    graph.operators = [o for o in graph.operators if id(o) not in gone]
    ends = [*graph.inputs, *graph.outputs]
    named = {int(i) for o in graph.operators for i in (*o.inputs, *o.outputs)} | {int(i) for i in ends}
    stay = [i for i in range(len(graph.tensors)) if i in named]
    place = {-1: -1, **{old: new for new, old in enumerate(stay)}}
    graph.tensors = [graph.tensors[i] for i in stay]
    graph.inputs, graph.outputs = (np.array([place[int(i)] for i in side], np.int32) for side in (graph.inputs, graph.outputs))
    for o in graph.operators:
        o.inputs, o.outputs = (np.array([place[int(i)] for i in side], np.int32) for side in (o.inputs, o.outputs))
    for definition in model.signatureDefs or []:
        for entry in (*definition.inputs, *definition.outputs):
            entry.tensorIndex = place[entry.tensorIndex]


def shuffled_in_place(content: bytes) -> bytes:
    """The same function without the transposes around channel shuffles: each costs one transpose instead of three.

    The converter turns an NHWC tensor to NCHW, splits its channels into groups, swaps, joins, and turns it back. What such a chain does
    is found by running it on the positions of its input's elements.
    """
    model = unpacked(content)
    graph = model.subgraphs[0]
    readers: dict[int, list[Any]] = {int(i): [graph] for i in graph.outputs}
    for o in graph.operators:
        for i in {int(i) for i in o.inputs}:
            readers.setdefault(i, []).append(o)
    gone: set[int] = set()
    for first in [o for o in graph.operators if _name(model, o) == "TRANSPOSE"]:
        chain = [first]
        while len(chain) < 5 and len(found := readers.get(int(chain[-1].outputs[0]), [])) == 1 and found[0] is not graph:
            chain.append(found[0])
        if [_name(model, o) for o in chain] == ["TRANSPOSE", "RESHAPE", "TRANSPOSE", "RESHAPE", "TRANSPOSE"] and (
            groups := _groups_swapped(model, chain)
        ):
            _swap_groups(model, chain, groups)
            gone |= {id(chain[0]), id(chain[-1])}
    _drop(model, gone)
    return packed(model)


def _groups_swapped(model: Any, chain: list[Any]) -> int:
    """In how many groups a chain splits the last axis of its input to swap groups and members; 0 for anything else."""
    tensors = model.subgraphs[0].tensors
    shape = [int(n) for n in tensors[chain[0].inputs[0]].shape]
    start = result = np.arange(np.prod(shape)).reshape(shape)
    for o in chain:
        after = [int(n) for n in tensors[o.outputs[0]].shape]
        order = _numbers(model, o.inputs[1]) if _name(model, o) == "TRANSPOSE" else None
        if order == [] or (order is None and np.prod(after) != result.size):
            return 0
        result = result.reshape(after) if order is None else result.transpose(order)
    if result.shape != start.shape or len(shape) != 4:
        return 0
    for groups in range(2, shape[3]):
        if shape[3] % groups == 0 and np.array_equal(result, start.reshape(*shape[:3], groups, -1).swapaxes(3, 4).reshape(shape)):
            return groups
    return 0


def _swap_groups(model: Any, chain: list[Any], groups: int) -> None:
    """Make the three inner operations of the chain do all of it on the NHWC tensor."""
    tensors = model.subgraphs[0].tensors
    _, split, swap, join, last = chain
    n, h, w, c = (int(size) for size in tensors[chain[0].inputs[0]].shape)
    shapes = [n, h, w, groups, c // groups], [n, h, w, c // groups, groups], [n, h, w, c]
    join.outputs = last.outputs
    for o, given, values, shape in (
        (split, chain[0].inputs[0], shapes[0], shapes[0]),
        (swap, swap.inputs[0], [0, 1, 2, 4, 3], shapes[1]),
        (join, join.inputs[0], shapes[2], shapes[2]),
    ):
        o.inputs = np.array([given, _add_numbers(model, f"shape of {o.outputs[0]}", values)], np.int32)
        tensors[o.outputs[0]].shape = np.array(shape, np.int32)
        if o is not swap and o.builtinOptions is not None:  # the converter leaves them out
            o.builtinOptions.newShape = np.array(values, np.int32)


def _numbers(model: Any, index: int) -> list[int]:
    """The values of a constant int32 tensor; empty for one that is computed."""
    data = model.buffers[model.subgraphs[0].tensors[index].buffer].data
    return [] if data is None else [int(v) for v in np.frombuffer(bytes(data), np.int32)]


def _add_numbers(model: Any, name: str, values: list[int]) -> int:
    """The index of a new constant int32 tensor."""
    parts, graph = schema(), model.subgraphs[0]
    tensor, buffer = parts.TensorT(), parts.BufferT()
    buffer.data = np.frombuffer(np.array(values, np.int32).tobytes(), np.uint8)
    tensor.name, tensor.type, tensor.buffer = name.encode(), parts.TensorType.INT32, len(model.buffers)
    tensor.shape = np.array([len(values)], np.int32)
    model.buffers.append(buffer)
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _owner(tag: str, tags: Mapping[str, str]) -> str:
    """Torch's name of the module that the converter's name of a tensor ends with, "" where it names none."""
    chain = [part for part in re.sub(r";\d*$", ";", tag).split(";") if part]
    return tags.get(chain[-1], "") if chain else ""


def _name(model: Any, operator: Any) -> str:
    code = model.operatorCodes[operator.opcodeIndex]
    return _operation_names().get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM")


@cache
def _operation_names() -> dict[int, str]:
    return {value: name for name, value in vars(schema().BuiltinOperator).items() if isinstance(value, int)}
