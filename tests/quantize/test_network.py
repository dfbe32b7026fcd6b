from __future__ import annotations

import numpy as np
import onnx

from edgeprune.quantize.network import Network, attributes
from tests.quantize.onnx_nets import net, proto


def test_layers_carry_torchs_names_and_weights() -> None:
    layers = Network(proto()).layers
    assert list(layers) == ["stem", "a", "b", "depthwise", "point", "fc"]
    for name, layer in layers.items():
        module = net().get_submodule(name)
        np.testing.assert_allclose(layer.weight, module.weight.detach().numpy(), rtol=1e-6)  # type: ignore[operator]
        assert layer.bias is not None
        np.testing.assert_array_equal(layer.stored(layer.weight), Network(proto()).array(layer.node.input[1]))


def test_a_clip_counts_only_if_it_reads_alone() -> None:
    network = Network(proto())
    stem, last = network.layers["stem"], network.layers["point"]
    clip = network.clipped(stem.output)
    assert clip is not None and network.limits(clip) == (0.0, float("inf"))
    assert network.clipped(last.output) is None  # hard swish is no clip


def test_gemm_of_either_order() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    made = []
    for transposed, stored in ((1, weight), (0, weight.T)):
        node = onnx.helper.make_node("Gemm", ["x", "w.weight"], ["y"], transB=transposed)
        graph = onnx.helper.make_graph(
            [node],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, ["n", 3])],
            [onnx.helper.make_tensor_value_info("y", 1, ["n", 2])],
            [onnx.numpy_helper.from_array(np.ascontiguousarray(stored), "w.weight")],
        )
        layer = Network(onnx.helper.make_model(graph)).layers["w"]
        assert attributes(layer.node)["transB"] == transposed
        np.testing.assert_array_equal(layer.stored(layer.weight), stored)
        made.append(layer.weight)
    np.testing.assert_array_equal(made[0], made[1])
