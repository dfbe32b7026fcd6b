from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from edgeprune.errors import UsageError
from edgeprune.export import export, load_artifact
from edgeprune.quantize import BitPlan
from edgeprune.quantize.quantizer import BitQuantizer, CalibrationImages
from edgeprune.quantize.tflite import quantized
from tests.quantize.onnx_nets import SIDE, data, images, net

needs_converter = pytest.mark.skipif(
    find_spec("litert_torch") is None or find_spec("litert_quantizer") is None,
    reason="the converter is not installed: pip install 'edgeprune[tflite]' (make setup does)",
)


@needs_converter
def test_int8_and_one_layer_in_fp32(tmp_path: Path) -> None:
    samples = torch.from_numpy(images()[0][:8])
    quantizer = BitQuantizer(CalibrationImages(data().train, limit=32))
    small = export(net(), torch.zeros(1, 3, SIDE, SIDE), tmp_path / "a.tflite", format="tflite", samples=samples, quantizer=quantizer)
    assert small.parity_sqnr_db > 15 and set(small.bits.values()) == {8}
    assert load_artifact(small.path)(images()[0][:3])[0].shape == (3, 4)
    quantizer = BitQuantizer(CalibrationImages(data().train, limit=32), BitPlan({n: "int8" for n in small.bits if n != "b"}))
    kept = export(net(), torch.zeros(1, 3, SIDE, SIDE), tmp_path / "b.tflite", format="tflite", samples=samples, quantizer=quantizer)
    from edgeprune.export.flatbuffer import stored_bits

    stored = stored_bits(kept.path.read_bytes())
    assert (stored["b"], stored["a"]) == (32, 8) and kept.bits["b"] == 32
    assert kept.parity_sqnr_db > 15


@pytest.mark.parametrize("plan", [BitPlan({"a": "int8"}, {"a": (4,)}), BitPlan({"a": "fp16"})])
def test_what_it_does_not_write(plan: BitPlan) -> None:
    with pytest.raises(UsageError, match="onnx"):
        quantized(b"", {"a": "a.weight"}, plan, [])
