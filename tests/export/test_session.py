from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeprune.export.session import session_of

SHAPE = [1, 3]


def doubled() -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, SHAPE) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubled", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_network_and_its_bytes_give_the_same_session() -> None:
    x = np.arange(3, dtype=np.float32).reshape(SHAPE)
    for network in (doubled(), doubled().SerializeToString()):
        assert np.array_equal(session_of(network).run(None, {"x": x})[0], 2 * x)


def test_options_are_passed_on_and_misspelt_ones_are_not(capfd: pytest.CaptureFixture[str]) -> None:
    session = session_of(doubled(), intra_op_num_threads=1, enable_cpu_mem_arena=False)
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.enable_cpu_mem_arena, options.log_severity_level) == (1, False, 4)
    with pytest.raises(AttributeError):
        session_of(doubled(), intra_op_threads=1)
    with pytest.raises(Exception, match="protobuf parsing failed"):
        session_of(b"no network")
    assert capfd.readouterr() == ("", "")
