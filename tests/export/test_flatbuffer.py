from __future__ import annotations

import copy
import hashlib
import struct
from typing import Any

import numpy as np
import pytest

from edgeprune.errors import ExportError
from edgeprune.export.flatbuffer import (
    _add_numbers,
    averaged_in_place,
    changed,
    described,
    metadata_of,
    named_like_torch,
    operations,
    packed,
    rectified_once,
    schema,
    shuffled_in_place,
    stored_bits,
    unpacked,
)

pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed: pip install 'edgeprune[tflite]' (make setup does)")

TAG = "litert.Wrapper/torch.nn.modules.container.Sequential_wrapped/torch.nn.modules.linear.Linear_0;"


def linear() -> bytes:
    """x (1, 2) -> relu(2x), by hand: one FULLY_CONNECTED, one RELU."""
    s = schema()

    def tensor(name: str, shape: list[int], buffer: int) -> Any:
        made = s.TensorT()
        made.name, made.shape, made.buffer, made.type = name.encode(), np.array(shape, np.int32), buffer, s.TensorType.FLOAT32
        return made

    def operator(code: int, inputs: list[int], outputs: list[int]) -> Any:
        made = s.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = code, np.array(inputs, np.int32), np.array(outputs, np.int32)
        return made

    model, graph = s.ModelT(), s.SubGraphT()
    codes = [s.BuiltinOperator.FULLY_CONNECTED, s.BuiltinOperator.RELU]
    model.operatorCodes = [s.OperatorCodeT() for _ in codes]
    for made, code in zip(model.operatorCodes, codes, strict=True):
        made.builtinCode = made.deprecatedBuiltinCode = code
        made.version = 1
    empty, weight = s.BufferT(), s.BufferT()
    weight.data = np.frombuffer((2 * np.eye(2, dtype=np.float32)).tobytes(), np.uint8)
    graph.tensors = [tensor("args_0", [1, 2], 0), tensor(TAG, [2, 2], 1), tensor(TAG + "1", [1, 2], 0), tensor("out", [1, 2], 0)]
    graph.operators = [operator(0, [0, 1, -1], [2]), operator(1, [2], [3])]
    graph.operators[0].builtinOptionsType = s.BuiltinOptions.FullyConnectedOptions
    graph.operators[0].builtinOptions = s.FullyConnectedOptionsT()
    graph.inputs, graph.outputs = np.array([0], np.int32), np.array([3], np.int32)
    model.version, model.subgraphs, model.buffers = 3, [graph], [empty, weight]
    return packed(model)


def run(content: bytes) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    interpreter.set_tensor(0, np.array([[1.5, -1]], np.float32))
    interpreter.invoke()
    return interpreter.get_tensor(3).tolist()


def test_metadata_and_hash_change_nothing_else() -> None:
    plain = linear()
    content = described(plain, {"layout": "NHWC", "labels": '["é"]'})
    assert run(content) == run(plain) == [[3.0, 0.0]]
    metadata = metadata_of(content)
    assert {"layout": "NHWC", "labels": '["é"]'}.items() <= metadata.items()
    assert metadata.keys() - {"layout", "labels"} == {"edgeprune_version", "content_sha256"}
    assert not changed(content)
    assert metadata_of(plain) == {} and not changed(plain)
    again = described(content, {"layout": "NCHW"})
    assert metadata_of(again)["layout"] == "NCHW" and not changed(again)


@pytest.mark.parametrize("place", [b"NHWC", struct.pack("<f", 2.0)])
def test_every_changed_byte_is_noticed(place: bytes) -> None:
    content = described(linear(), {"layout": "NHWC"})
    at = content.index(place)
    assert changed(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def test_data_begins_at_multiples_of_sixteen() -> None:
    content = linear()
    assert content.index((2 * np.eye(2, dtype=np.float32)).tobytes()) % 16 == 0


def behind(content: bytes) -> bytes:
    """The same file with its weight after the flatbuffer, where litert-quantizer puts the data of larger networks."""
    model = unpacked(content)
    weight, model.buffers[1].data = bytes(model.buffers[1].data), None
    model.buffers[1].offset, model.buffers[1].size = 1, len(weight)
    start = -(-len(packed(model)) // 16) * 16
    model.buffers[1].offset = start
    return packed(model).ljust(start, b"\0") + weight


def test_data_behind_the_flatbuffer_come_along() -> None:
    content = behind(linear())
    assert run(content) == [[3.0, 0.0]]
    assert run(described(content, {"layout": "NHWC"})) == [[3.0, 0.0]]
    with pytest.raises(ExportError, match="truncated"):
        unpacked(content[:-1])


def test_names_of_torch() -> None:
    named, layers = named_like_torch(linear(), {TAG.rstrip(";"): "0"}, {}, ["input"], ["output"])
    assert [t.name for t in unpacked(named).subgraphs[0].tensors] == [b"input", b"0.weight", b"0", b"output"]
    assert layers == {"0": "0.weight"}
    assert stored_bits(named) == {"0": 32}
    assert run(named) == [[3.0, 0.0]]


def test_a_layer_whose_chain_is_lost_is_known_by_its_weight() -> None:
    weight = hashlib.sha256((2 * np.eye(2, dtype=np.float32)).tobytes()).hexdigest()
    assert named_like_torch(linear(), {}, {weight: "fc"}, ["input"], ["output"])[1] == {"fc": "fc.weight"}
    assert named_like_torch(linear(), {}, {}, ["input"], ["output"])[1] == {}


@pytest.mark.parametrize(
    ("axes", "keep", "left"), [((2, 3), False, 0), ((-1, -2), False, 0), ((2, 3), True, 1), ((1,), False, 0), ((2,), False, 1)]
)
def test_averages_need_no_transpose(axes: tuple[int, ...], keep: bool, left: int) -> None:
    """x (1, 2, 3, 2) NHWC -> NCHW -> mean over `axes`."""
    from ai_edge_litert.interpreter import Interpreter

    s = schema()
    model, graph = s.ModelT(), s.SubGraphT()
    model.operatorCodes = [s.OperatorCodeT(), s.OperatorCodeT()]
    for made, code in zip(model.operatorCodes, (s.BuiltinOperator.TRANSPOSE, s.BuiltinOperator.MEAN), strict=True):
        made.builtinCode = made.deprecatedBuiltinCode = code
        made.version = 1
    model.buffers, graph.tensors, graph.operators = [s.BufferT()], [], []
    model.version, model.subgraphs = 3, [graph]
    x = np.arange(12, dtype=np.float32).reshape(1, 2, 3, 2) ** 2
    expected = x.transpose(0, 3, 1, 2).mean(axes, keepdims=keep)
    for shape in (x.shape, (1, 2, 2, 3), expected.shape):
        tensor = s.TensorT()
        tensor.name, tensor.shape, tensor.type = b"t", np.array(shape, np.int32), s.TensorType.FLOAT32
        graph.tensors.append(tensor)
    for inputs, output, values in ((0, 1, [0, 3, 1, 2]), (1, 2, list(axes))):
        operator = s.OperatorT()
        operator.opcodeIndex, operator.inputs = output - 1, np.array([inputs, _add_numbers(model, "c", values)], np.int32)
        operator.outputs = np.array([output], np.int32)
        graph.operators.append(operator)
    graph.operators[0].builtinOptionsType, graph.operators[0].builtinOptions = s.BuiltinOptions.TransposeOptions, s.TransposeOptionsT()
    graph.operators[1].builtinOptionsType, graph.operators[1].builtinOptions = s.BuiltinOptions.ReducerOptions, s.ReducerOptionsT()
    graph.operators[1].builtinOptions.keepDims = keep
    graph.inputs, graph.outputs = np.array([0], np.int32), np.array([2], np.int32)

    content = averaged_in_place(packed(model))

    assert operations(content)["TRANSPOSE"] == left
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    np.testing.assert_allclose(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]), expected)


@pytest.mark.parametrize(("fused", "left"), [("RELU", 1), ("RELU6", 1), ("NONE", 2), ("RELU_N1_TO_1", 2)])
def test_what_is_rectified_is_not_rectified_again(fused: str, left: int) -> None:
    """x (1, 2) -> fused(2x) -> relu -> relu -> relu: the last one gives the output."""
    from ai_edge_litert.interpreter import Interpreter

    s, model = schema(), unpacked(linear())
    graph = model.subgraphs[0]
    graph.operators[0].builtinOptions.fusedActivationFunction = getattr(s.ActivationFunctionType, fused)
    for _ in range(2):
        tensor, operator = copy.copy(graph.tensors[3]), copy.copy(graph.operators[1])
        operator.inputs, operator.outputs = graph.operators[-1].outputs, np.array([len(graph.tensors)], np.int32)
        graph.tensors.append(tensor)
        graph.operators.append(operator)
    graph.outputs = graph.operators[-1].outputs
    before = packed(model)

    content = rectified_once(before)

    assert operations(content) == {"FULLY_CONNECTED": 1, "RELU": left}
    results = []
    for file in (before, content):
        interpreter = Interpreter(model_content=file)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], np.array([[-1, 4]], np.float32))
        interpreter.invoke()
        results.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(("swap", "left"), [([0, 2, 1, 3, 4], 1), ([0, 1, 2, 4, 3], 3)])
def test_channel_shuffles_cost_one_transpose(swap: list[int], left: int) -> None:
    """x (1, 2, 2, 6) NHWC, to NCHW, channels in groups of two, swapped (or height and width swapped: no shuffle), and back."""
    from ai_edge_litert.interpreter import Interpreter

    s = schema()
    model, graph = s.ModelT(), s.SubGraphT()
    model.operatorCodes = [s.OperatorCodeT(), s.OperatorCodeT()]
    for made, code in zip(model.operatorCodes, (s.BuiltinOperator.TRANSPOSE, s.BuiltinOperator.RESHAPE), strict=True):
        made.builtinCode = made.deprecatedBuiltinCode = code
        made.version = 1
    model.buffers, graph.tensors, graph.operators = [s.BufferT()], [], []
    model.version, model.subgraphs = 3, [graph]
    x = np.arange(24, dtype=np.float32).reshape(1, 2, 2, 6)
    steps: list[tuple[int, list[int]]] = [(0, [0, 3, 1, 2]), (1, [1, 3, 2, 2, 2]), (0, swap), (1, [1, 6, 2, 2]), (0, [0, 2, 3, 1])]
    values = [x]
    for code, numbers in steps:
        values.append(values[-1].transpose(numbers) if code == 0 else values[-1].reshape(numbers))
    for value in values:
        tensor = s.TensorT()
        tensor.name, tensor.shape, tensor.type = b"t", np.array(value.shape, np.int32), s.TensorType.FLOAT32
        graph.tensors.append(tensor)
    for index, (code, numbers) in enumerate(steps):
        operator = s.OperatorT()
        operator.opcodeIndex, operator.inputs = code, np.array([index, _add_numbers(model, "c", numbers)], np.int32)
        operator.outputs = np.array([index + 1], np.int32)
        graph.operators.append(operator)
    graph.inputs, graph.outputs = np.array([0], np.int32), np.array([5], np.int32)

    content = shuffled_in_place(packed(model))

    assert operations(content)["TRANSPOSE"] == left
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    assert np.array_equal(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]), values[-1])


def test_operations() -> None:
    assert operations(linear()) == {"FULLY_CONNECTED": 1, "RELU": 1}


@pytest.mark.parametrize("content", [b"", b"no flatbuffer at all", linear()[:60]])
def test_what_is_no_such_file(content: bytes) -> None:
    with pytest.raises(ExportError):
        unpacked(content)
