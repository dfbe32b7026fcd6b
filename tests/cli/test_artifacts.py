from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import NET, QUICK, Command
from tests.colours import colour_net

needs_converter = pytest.mark.skipif(
    find_spec("litert_torch") is None, reason="the converter is not installed: pip install 'edgeprune[tflite]' (make setup does)"
)


def test_evaluate(edgeprune: Command, here: Path) -> None:
    import edgeprune as ep

    expected = ep.evaluate(colour_net(), here / "data.npz")
    done = edgeprune("evaluate", *NET, "--data", "data.npz")
    assert done.out == f"{100 * expected.accuracy:.2f}% of 30 validation images right, loss {expected.loss:.4f}\n"
    ep.export(colour_net(), torch.zeros(1, 3, 8, 8), here / "net.onnx")
    found = json.loads(edgeprune("evaluate", "net.onnx", "--data", "data.npz", "--json").out)
    assert (found["accuracy"], found["images"]) == (expected.accuracy, 30)


def test_export_writes_what_verify_accepts(edgeprune: Command, here: Path) -> None:
    done = edgeprune("export", *NET, "--data", "data.npz", "--out", "out.v1")
    assert done.code == 0
    assert {p.name for p in (here / "out.v1").iterdir()} == {"model.onnx", "artifacts.json", "samples.safetensors"}
    assert done.out.splitlines()[1].split()[0] == "model.onnx"
    (listed,) = json.loads((here / "out.v1" / "artifacts.json").read_text())
    assert listed["samples"] == 30 and json.loads(listed["metadata"]["preprocessing"])["size"] == [8, 8]
    checked = edgeprune("verify", "out.v1")
    assert checked.code == 0
    assert "FAILED" not in checked.out
    found = json.loads(edgeprune("verify", "out.v1/model.onnx", "--json").out)
    assert found["passed"] and {c["name"] for c in found["checks"]} == {"model.onnx: content", "model.onnx: probe"}


def test_an_artifact_is_fed_as_it_was_exported_for(edgeprune: Command, here: Path) -> None:
    grey = ["--mean", "0.1,0.1,0.1", "--std", "0.3,0.3,0.3"]
    edgeprune("export", *NET, "--data", "data.npz", *grey, "--out", "out")
    expected = edgeprune("evaluate", *NET, "--data", "data.npz", *grey)
    assert edgeprune("evaluate", "out/model.onnx", "--data", "data.npz").out == expected.out
    assert edgeprune("evaluate", *NET, "--data", "data.npz").out != expected.out


def test_verify_names_a_tampered_file(edgeprune: Command, here: Path) -> None:
    edgeprune("export", *NET, "--input-shape", "1,3,8,8", "--out", "out")
    file = here / "out" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-7])
    for words in (["out"], ["out/model.onnx"]):
        done = edgeprune("verify", *words)
        assert done.code == 5
        assert "FAILED" in done.out
        assert "model.onnx" in done.message and "truncated" in done.message


@needs_converter
def test_both_formats_and_both_runtimes(edgeprune: Command, here: Path) -> None:
    done = edgeprune("export", *NET, "--data", "data.npz", "--format", "onnx,tflite", "--out", "out", "--json")
    found = json.loads(done.out)
    assert [a["format"] for a in found["artifacts"]] == ["onnx", "tflite"]
    figures = [json.loads(edgeprune("evaluate", f"out/model.{form}", "--data", "data.npz", "--json").out) for form in ("onnx", "tflite")]
    assert figures[0]["accuracy"] == figures[1]["accuracy"]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], abs=1e-4)
    assert edgeprune("verify", "out").code == 0


@needs_converter
def test_compress_writes_both_and_verify_checks_the_run(edgeprune: Command, here: Path) -> None:
    done = edgeprune("compress", *QUICK, "--macs", "0.6", "--size-mb", "1", "--format", "onnx,tflite", "--out", "run")
    assert done.code == 0
    checked = edgeprune("verify", "run", "--json")
    assert checked.code == 0
    names = {c["name"] for c in json.loads(checked.out)["checks"]}
    assert {"model.onnx: parity", "model.tflite: parity", "budget: model.tflite", "budget: macs", "model.safetensors: checksum"} <= names
    (here / "run" / "model.safetensors").write_bytes(b"x")
    assert edgeprune("verify", "run").code == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "caffe"], "there is: onnx, tflite"),
        (["--layout", "CHW"], "NHWC or NCHW"),
        (["--quantize", "int9"], "int9"),
        (["--quantize", "int8", "--calibration", "median"], "median"),
    ],
)
def test_options_that_make_no_sense(edgeprune: Command, here: Path, words: list[str], message: str) -> None:
    done = edgeprune("export", *NET, "--input-shape", "1,3,8,8", *words)
    assert done.code == 2
    assert message in done.message


def test_verify_wants_a_run_or_an_artifact(edgeprune: Command, here: Path) -> None:
    assert edgeprune("verify", "nowhere").code == 2
