"""Artifacts, and a board reached as `pi`, for the tests that measure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.device.boards import Board, Client, need_sshd


def relu() -> bytes:
    """y = relu(x), eight numbers, free batch."""
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 8]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="the relu")], "g", shapes[:1], shapes[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = relu(x) as an ONNX file, under a name that a shell would misread."""
    path = tmp_path_factory.mktemp("artifact") / 'it\'s "$(touch pwned)";\n`touch pwned` & x.onnx'
    path.write_bytes(relu())
    return path


@pytest.fixture(scope="session")
def tflite_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = relu(x) as a TFLite file; skips where LiteRT is not installed."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    flatbuffers = pytest.importorskip("flatbuffers")
    model, code, graph, operator = schema.ModelT(), schema.OperatorCodeT(), schema.SubGraphT(), schema.OperatorT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.RELU
    graph.tensors = [schema.TensorT(), schema.TensorT()]
    for tensor, name in zip(graph.tensors, (b"x", b"y"), strict=True):
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, [1, 8], schema.TensorType.FLOAT32, 0
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0], [1]
    graph.operators, graph.inputs, graph.outputs = [operator], [0], [1]
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [schema.BufferT()]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path = tmp_path_factory.mktemp("tflite") / "relu.tflite"
    path.write_bytes(bytes(builder.Output()))
    return path


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """A server whose sessions run this Python."""
    need_sshd()
    made = Board(tmp_path_factory.mktemp("board") / "pi")
    made.use_python()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def client(tmp_path: Path, board: Board, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A user who knows the board as `pi`."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    made = Client(tmp_path / "user")
    made.configure(made.knows("pi", board))
    made.trust(board)
    return made


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """The card of a board with one thread and no profile."""
    shipped = Path(__file__).parents[2] / "devices" / "rpi4.toml"
    text = shipped.read_text().split("# Written by")[0].replace("threads = 4", "threads = 1").replace('default_profile = "rpi4-ort"\n', "")
    (tmp_path / "pi4.toml").write_text(text)
    return tmp_path / "pi4.toml"
