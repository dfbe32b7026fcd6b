from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.errors import ParityError, UsageError
from edgeprune.export import Draft, export, load_artifact, read_metadata
from edgeprune.quantize import BitPlan
from edgeprune.quantize.bits import Method
from edgeprune.quantize.quantizer import BitQuantizer, CalibrationImages
from tests.quantize.onnx_nets import SIDE, data, images, net

X = torch.zeros(1, 3, SIDE, SIDE)


def test_an_int8_artifact_says_how_it_was_made(tmp_path: Path) -> None:
    quantizer = BitQuantizer(CalibrationImages(data().train, limit=48))
    made = export(net(), X, tmp_path / "m.onnx", samples=torch.from_numpy(images()[0][:16]), quantizer=quantizer)
    assert made.parity_sqnr_db > 25 and set(made.bits.values()) == {8} and len(made.bits) == 6
    carried = read_metadata(made.path)
    assert BitPlan.from_json(json.loads(carried["bitplan"])) == quantizer.chosen
    assert carried["quantize"] == "int8" and carried["calibration_images"] == "48"
    assert carried["calibration_sha256"] == CalibrationImages(data().train, limit=48).sha256
    assert carried["calibration_sha256"] != CalibrationImages(data().train, limit=48, seed=1).sha256
    figures = quantizer.facts["sqnr_db"]
    assert set(figures) == {"plain", "bias", "equalized"} and quantizer.facts["variant"] == max(figures, key=figures.get)
    assert load_artifact(made.path)(images()[0])[0].shape == (64, 4)


def test_bits_of_channels_show_in_the_artifact(tmp_path: Path) -> None:
    plan = BitPlan({"b": "int8", "fc": "fp16"}, {"b": (4, 8) * 8})
    quantizer = BitQuantizer(CalibrationImages(data().train), plan, variants=("plain",))
    made = export(net(), X, tmp_path / "m.onnx", samples=torch.from_numpy(images()[0][:8]), quantizer=quantizer)
    assert (made.bits["b"], made.bits["fc"], made.bits["stem"]) == (6.0, 16, 32)
    assert made.metadata["quantize"] == "mixed"


def test_a_ruined_network_is_refused(tmp_path: Path) -> None:
    plan = BitPlan(dict.fromkeys(["stem", "a", "b"], "int8"), {"stem": (2,) * 8, "a": (2,) * 16, "b": (2,) * 16})
    quantizer = BitQuantizer(CalibrationImages(data().train), plan, variants=("plain",), least_sqnr_db=30.0)
    with pytest.raises(ParityError, match="dB"):
        export(net(), X, tmp_path / "m.onnx", samples=torch.from_numpy(images()[0][:8]), quantizer=quantizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_the_method_of_calibration_is_on_record(method: Method, tmp_path: Path) -> None:
    quantizer = BitQuantizer(CalibrationImages(data().train), method=method)
    made = export(net(), X, tmp_path / "m.onnx", quantizer=quantizer)
    assert made.metadata["calibration_method"] == method
    with pytest.raises(UsageError, match=f"minmax, not by {method}"):
        quantizer(Draft(format="tflite", content=b"", layers={}, as_fed=np.asarray))


def test_other_formats() -> None:
    with pytest.raises(UsageError, match="engine"):
        BitQuantizer(CalibrationImages(data().train))(Draft(format="engine", content=b"", layers={}, as_fed=np.asarray))
