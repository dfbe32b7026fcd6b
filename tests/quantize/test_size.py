from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeprune.device.kernels import kernels
from edgeprune.export import export
from edgeprune.graph.trace import trace
from edgeprune.quantize.quantizer import BitQuantizer, CalibrationImages
from edgeprune.quantize.size import float32_limit, quantized_size
from tests.quantize.onnx_nets import SIDE, data, net


def test_the_quantized_file_of_a_network_at_the_limit_fits(tmp_path: Path) -> None:
    x = torch.zeros(1, 3, SIDE, SIDE)
    graph = trace(net(), (x,))
    floats = float(kernels(graph).size_bytes(graph.dense_widths[None])[0])
    made = export(net(), x, tmp_path / "m.onnx", quantizer=BitQuantizer(CalibrationImages(data().train)))
    assert float32_limit(made.size_bytes, "int8", graph) <= floats
    assert float32_limit(1.5 * made.size_bytes, "int8", graph) > floats


@pytest.mark.parametrize(("way", "weights"), [("none", 4), ("mixed", 2), ("int8", 1)])
def test_a_byte_more_is_four_over_the_bytes_of_a_weight_more(way: str, weights: int) -> None:
    graph = trace(net(), (torch.zeros(1, 3, SIDE, SIDE),))
    gained = float32_limit(90_000, way, graph) - float32_limit(80_000, way, graph)
    assert gained == pytest.approx(40_000 / weights)
    assert float32_limit(1, "int8", graph) == 1.0
    assert quantized_size(float32_limit(90_000, way, graph), way, graph) == pytest.approx(90_000)
