from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgeprune.quantize.bits import BitPlan, Precision
from edgeprune.quantize.calibrate import Range, Ranges, observe
from edgeprune.quantize.network import Network
from edgeprune.quantize.qdq import observed_tensors, write_qdq
from tests.quantize.onnx_nets import batches, images, proto, run, sqnr_db

LAYERS = tuple(Network(proto()).layers)


@pytest.fixture(scope="module")
def ranges() -> dict[str, Range]:
    found = Ranges(observed_tensors(Network(proto())))
    observe(proto(), batches(), found)
    return found.found()


def kernels(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """What onnxruntime runs, before it chooses layouts of this machine's."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node)


def test_int8_is_close_small_and_fused(ranges: dict[str, Range], tmp_path: Path) -> None:
    made = write_qdq(proto(), BitPlan(dict.fromkeys(LAYERS, "int8")), ranges)
    assert sqnr_db(made, proto()) > 25
    found = kernels(made, tmp_path)
    assert found["QLinearConv"] == 5 and found["QGemm"] == 1 and found["QLinearAdd"] == 1
    # in at the start, out and in around the hard swish (and the mean): padding, slicing and ReLUs cost nothing
    assert found["Conv"] == found["Relu"] == 0 and found["QuantizeLinear"] == 2 and found["DequantizeLinear"] == 1
    stored = {i.name: i.data_type for i in made.graph.initializer}
    assert stored["stem.weight.whole"] == onnx.TensorProto.INT8 and "stem.weight" not in stored
    assert len(proto().graph.node) == len(Network(proto()).nodes)


@pytest.mark.parametrize("kept", LAYERS)
def test_one_layer_in_fp32(ranges: dict[str, Range], kept: str, tmp_path: Path) -> None:
    made = write_qdq(proto(), BitPlan({n: "int8" for n in LAYERS if n != kept}), ranges)
    assert sqnr_db(made, proto()) > 25
    found = kernels(made, tmp_path)
    # onnxruntime rounds the weights of a conv whose input and output are both 8-bit by itself when it loads the file
    assert found["QLinearConv"] + found["QGemm"] == (6 if kept in ("a", "depthwise") else 5)
    assert f"{kept}.weight" in {i.name for i in made.graph.initializer}


def test_nothing_quantized_is_the_same_network(ranges: dict[str, Range]) -> None:
    made = write_qdq(proto(), BitPlan({}), ranges)
    np.testing.assert_array_equal(run(made, images()[0]), run(proto(), images()[0]))
    assert [n.op_type for n in made.graph.node] == [n.op_type for n in proto().graph.node]


@pytest.mark.parametrize(("precision", "least_db"), [("fp16", 55.0), ("int4", 8.0)])
def test_storage_only_precisions(ranges: dict[str, Range], precision: Precision, least_db: float, tmp_path: Path) -> None:
    made = write_qdq(proto(), BitPlan(dict.fromkeys(LAYERS, precision)), ranges)
    assert least_db < sqnr_db(made, proto()) < least_db + 40
    found = kernels(made, tmp_path)
    assert not {"Cast", "QuantizeLinear", "DequantizeLinear"} & found.keys() and found["Mul"] == 1  # floats again once the file is loaded
    weights = sum(len(i.raw_data) for i in made.graph.initializer if "weight" in i.name)
    floats = sum(len(i.raw_data) for i in proto().graph.initializer if "weight" in i.name)
    assert weights == pytest.approx(floats / (2 if precision == "fp16" else 8), rel=0.02)


def test_fewer_bits_inside_a_layer(ranges: dict[str, Range]) -> None:
    channels = {"b": (2,) * 8 + (8,) * 8}
    made = write_qdq(proto(), BitPlan(dict.fromkeys(LAYERS, "int8"), channels), ranges)
    values = next(onnx.numpy_helper.to_array(i) for i in made.graph.initializer if i.name == "b.weight.whole")
    assert np.abs(values[:8]).max() <= 2 < np.abs(values[8:]).max()
    assert 5 < sqnr_db(made, proto()) < sqnr_db(write_qdq(proto(), BitPlan(dict.fromkeys(LAYERS, "int8")), ranges), proto())


def test_a_huge_bias_fits_int32(ranges: dict[str, Range]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(proto())
    for constant in model.graph.initializer:
        if constant.name == "point.weight":
            weight = onnx.numpy_helper.to_array(constant).copy()
            weight[0] = 1e-12
            constant.CopyFrom(onnx.numpy_helper.from_array(weight, constant.name))
    assert sqnr_db(write_qdq(model, BitPlan(dict.fromkeys(LAYERS, "int8")), ranges), model) > 20
