from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import edgeprune as ep
from edgeprune.device.connection import Local
from edgeprune.device.parity import FLOAT_TOLERANCE, compared, outputs, runner_on
from edgeprune.errors import DeviceError, ParityError
from tests.colours import SIDE, colour_data, colour_net
from tests.device.boards import Board, Client


def two_inputs(path: Path) -> Path:
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in ("a", "b", "y")]
    graph = helper.make_graph([helper.make_node("Sub", ["a", "b"], ["y"])], "g", shapes[:2], shapes[2:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


class Elsewhere(Local):
    """A machine that computes a little differently: it is given another file."""

    def __init__(self, other: Path) -> None:
        super().__init__()
        self.other = other

    def push(self, file: Path) -> str:
        return super().push(self.other if file.suffix == ".onnx" else file)


def test_the_same_file_computes_the_same(artifact: Path) -> None:
    with Local() as here:
        found, why = compared(here, artifact)
    assert why == ""
    assert found
    assert (found.max_abs, found.relative, found.tolerance, found.samples) == (0.0, 0.0, FLOAT_TOLERANCE, 2)


def test_another_result_is_refused_and_a_rounding_is_not(artifact: Path, tmp_path: Path) -> None:
    for scale, refused in ((1.01, True), (1.0001, False)):
        node = helper.make_node("LeakyRelu", ["x"], ["z"], alpha=0.0)
        factor = helper.make_node("Mul", ["z", "c"], ["y"])
        shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 8]) for n in ("x", "y")]
        constant = helper.make_tensor("c", TensorProto.FLOAT, [1], [scale])
        graph = helper.make_graph([node, factor], "g", shapes[:1], shapes[1:], [constant])
        other = tmp_path / "other.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), other)
        with Elsewhere(other) as there:
            if refused:
                with pytest.raises(ParityError, match=r"computes something else .*1\.00% of the largest \(allowed: 0\.10%\)"):
                    compared(there, artifact)
            else:
                assert compared(there, artifact)[0]


def test_arrays_go_to_inputs_by_name_or_in_order(tmp_path: Path) -> None:
    file = two_inputs(tmp_path / "m.onnx")
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 3), np.float32)
    with Local() as here:
        for arrays in ({"b": b, "a": a}, {"first": a, "second": b}):
            (y,), _ = outputs(here, file, arrays)
            np.testing.assert_array_equal(y, a - b)
        with pytest.raises(DeviceError, match=r"1 array\(s\) for 2 input\(s\)"):
            outputs(here, file, {"a": a})
        with pytest.raises(DeviceError, match=r"input a is float32 \[2, 4\], the artifact takes"):
            outputs(here, file, {"a": np.ones((2, 4), np.float32), "b": b})


def test_a_runtime_that_is_missing_here_is_no_verdict(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')\n")
    with Local() as there:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        found, why = compared(there, artifact)
    assert found is None
    assert "not here" in why


def test_accuracy_is_evaluated_on_the_board(board: Board, client: Client, tmp_path: Path) -> None:
    file, data = ep.export(colour_net(), torch.zeros(1, 3, SIDE, SIDE), tmp_path / "net.onnx").path, colour_data()
    there, here = ep.evaluate(file, data, host="pi"), ep.evaluate(file, data)
    assert (there.accuracy, there.images) == (here.accuracy, here.images)
    assert there.loss == pytest.approx(here.loss, rel=1e-4)
    assert board.empties()


def test_images_come_last_where_the_artifact_says_so(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5)).eval()
    x = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
    file = ep.export(model, torch.zeros(1, 3, 8, 8), tmp_path / "net.tflite", format="tflite").path
    with Local() as board, torch.no_grad():
        (found,) = runner_on(board, file)(x)
        np.testing.assert_allclose(found, model(torch.from_numpy(x)), atol=1e-5)
