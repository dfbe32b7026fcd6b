# mypy: disable-error-code="no-any-return"
# (what a module returns when called is Any to mypy)
from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import ExportError, ParityError, UnsupportedOp, UsageError
from edgeprune.export import Artifact, Draft, export, load_artifact, run_artifact
from edgeprune.export.flatbuffer import operations, unpacked
from edgeprune.export.tflite import TfliteFormat, read_metadata
from tests.export.export_nets import Headed, Plain, conv_bn, settle

needs_converter = pytest.mark.skipif(
    find_spec("litert_torch") is None, reason="the converter is not installed: pip install 'edgeprune[tflite]' (make setup does)"
)
X = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Everything(Headed):
    """Depthwise, strided, squeeze-and-excite, concat and residual in one; a feature map comes out too."""

    def __init__(self) -> None:
        super().__init__(12)
        self.stem, self.depthwise = conv_bn(3, 8, stride=2), conv_bn(8, 8, groups=8)
        self.gate = nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1), nn.Hardsigmoid())
        self.side = conv_bn(8, 4, 1)

    def body(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.hardswish(self.stem(x))
        y = x + torch.relu(self.depthwise(x))
        y = y * self.gate(y.mean((2, 3), keepdim=True))
        return torch.cat([y, self.side(x)], 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        y = self.body(x)
        return {"map": y, "logits": self.head(y.mean((2, 3)))}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact]:
    model = settle(Everything())
    metadata = {"preprocessing": {"mean": [0.5]}, "labels": ["a", "é"]}
    path = tmp_path_factory.mktemp("tflite") / "deep" / "model.tflite"
    return model, export(model, X, path, format="tflite", samples=torch.rand(3, 3, 12, 12), metadata=metadata)


@needs_converter
def test_the_artifact_computes_what_the_network_computes(written: tuple[nn.Module, Artifact]) -> None:
    model, artifact = written
    samples = torch.rand(5, 3, 12, 12)
    feature_map, logits = run_artifact(artifact.path, samples.numpy())
    expected = model(samples)
    assert feature_map.shape == expected["map"].shape
    assert np.abs(feature_map - expected["map"].detach().numpy()).max() < 1e-5
    assert np.abs(logits - expected["logits"].detach().numpy()).max() < 1e-5
    assert artifact.parity_relative < 1e-5 and artifact.parity_sqnr_db > 90 and artifact.parity_top1 == 1.0
    assert (artifact.samples, artifact.dynamic_batch, artifact.bits) == (3, False, {})
    assert [p.name for p in artifact.path.parent.iterdir()] == ["model.tflite"]


@needs_converter
def test_what_is_inside(written: tuple[nn.Module, Artifact]) -> None:
    content = written[1].path.read_bytes()
    found = operations(content)
    assert found["TRANSPOSE"] == 0
    assert found["CONV_2D"] + found["DEPTHWISE_CONV_2D"] == 5
    assert not {"RSQRT", "SUB", "BATCH_NORM"} & found.keys(), "a norm was not folded"
    graph = unpacked(content).subgraphs[0]
    assert [graph.tensors[i].name for i in graph.inputs] == [b"input"]
    assert list(graph.tensors[graph.inputs[0]].shape) == [1, 12, 12, 3]
    names = {tensor.name.decode() for tensor in graph.tensors}
    assert {"stem.0.weight", "gate.0.weight", "head.weight", "output_0", "output_1"} <= names
    assert b"export_nets" not in content and __file__.encode() not in content
    metadata = read_metadata(written[1].path)
    assert json.loads(metadata["labels"]) == ["a", "é"]
    assert metadata["layout"] == "NHWC" and metadata["edgeprune_version"]
    assert metadata == written[1].metadata


@needs_converter
def test_nchw_on_request_silently_and_from_a_batch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = settle(Plain())
    artifact = export(model, X.expand(4, -1, -1, -1), tmp_path / "m.tflite", format="tflite", layout="NCHW")
    graph = unpacked(artifact.path.read_bytes()).subgraphs[0]
    assert list(graph.tensors[graph.inputs[0]].shape) == [1, 3, 12, 12]
    np.testing.assert_allclose(run_artifact(artifact.path, X.numpy())[0], model(X).detach().numpy(), atol=1e-5)
    assert capfd.readouterr() == ("", "")


@needs_converter
@pytest.mark.parametrize("damage", ["truncated", "cut to nothing", "weight changed", "label changed", "text"])
def test_a_damaged_file_is_refused(
    written: tuple[nn.Module, Artifact], damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = written[1].path.read_bytes()
    weight = np.float32(written[0].head.bias[0].item()).tobytes()  # type: ignore[union-attr, index]
    damaged = {
        "truncated": content[: len(content) // 2],
        "cut to nothing": b"",
        "weight changed": content.replace(weight, weight[::-1]),
        "label changed": content.replace(b'[\\"a\\"', b'[\\"b\\"'),
        "text": b"this is no model",
    }[damage]
    assert damaged != content
    file = tmp_path / "broken.tflite"
    file.write_bytes(damaged)
    with pytest.raises(ExportError, match=r"broken\.tflite.*" + ("changed" if "changed" in damage else "truncated")):
        run_artifact(file, X.numpy())
    assert capfd.readouterr() == ("", "")


@needs_converter
def test_inputs_it_does_not_take(written: tuple[nn.Module, Artifact]) -> None:
    run = load_artifact(written[1].path)
    with pytest.raises(ExportError, match=r"takes 1 input\(s\) \(input\), got 2"):
        run([X.numpy(), X.numpy()])
    with pytest.raises(ExportError, match=r"\(1, 12, 12, 4\)"):
        run(np.zeros((1, 4, 12, 12), np.float32))


class Shuffled(Headed):
    """A channel shuffle in three groups."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.body_conv = conv_bn(3, 6), conv_bn(6, 6, 1)

    def body(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        return self.body_conv(x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w))


@needs_converter
def test_a_channel_shuffle_costs_one_transpose(tmp_path: Path) -> None:
    model = settle(Shuffled())
    artifact = export(model, X, tmp_path / "m.tflite", format="tflite", samples=torch.rand(3, 3, 12, 12))
    assert artifact.parity_relative < 1e-5
    assert operations(artifact.path.read_bytes())["TRANSPOSE"] == 1


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x * 2


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


@needs_converter
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (Bessel, UnsupportedOp, r"TFLite has no operation for .*bessel_j0.* at .*test_tflite\.py:\d+ .*bessel_j0\(x\)"),
        (Branch, ExportError, r"test_tflite\.py:\d+ .*x\.sum"),
        (Noisy, ExportError, "rand_like"),
    ],
)
def test_a_failed_export_leaves_nothing(
    make: type[nn.Module], error: type[ExportError], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.tflite").write_text("the previous one")
    with pytest.raises(error, match=message) as caught:
        export(make().eval(), X, tmp_path / "m.tflite", format="tflite")
    assert "\n" not in str(caught.value)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the previous one"]
    assert capfd.readouterr() == ("", "")


class Doubled:
    """A 'quantizer' that doubles one weight in the file: the hook, its inputs and its gate."""

    bits = {"head": 8}  # noqa: RUF012
    metadata = {"quantize": "doubled"}  # noqa: RUF012

    def __init__(self, least_sqnr_db: float) -> None:
        self.least_sqnr_db = least_sqnr_db
        self.drafts: list[Draft] = []

    def __call__(self, draft: Draft) -> bytes:
        from edgeprune.export.flatbuffer import packed

        self.drafts.append(draft)
        model = unpacked(draft.content)
        tensor = next(t for t in model.subgraphs[0].tensors if t.name.decode() == draft.layers["head"])
        buffer = model.buffers[tensor.buffer]
        buffer.data = (np.frombuffer(bytes(buffer.data), np.float32) * 1.1).view(np.uint8)
        return packed(model)


@needs_converter
def test_the_hook_of_quantizers(tmp_path: Path) -> None:
    model, quantizer = settle(Plain()), Doubled(5.0)
    artifact = export(model, X, tmp_path / "m.tflite", format="tflite", quantizer=quantizer, samples=torch.rand(4, 3, 12, 12))
    (draft,) = quantizer.drafts
    assert draft.layers == {"layers.0.0": "layers.0.0.weight", "layers.2.0": "layers.2.0.weight", "head": "head.weight"}
    assert draft.as_fed(X.numpy()).shape == (1, 12, 12, 3)
    assert 5 < artifact.parity_sqnr_db < 60
    assert (artifact.bits, artifact.metadata["quantize"]) == ({"head": 8}, "doubled")
    with pytest.raises(ParityError, match=r"limit is 80\.0 dB"):
        export(model, X, tmp_path / "n.tflite", format="tflite", quantizer=Doubled(80.0))
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


def test_an_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="NHWC, NCHW"):
        export(nn.ReLU(), X, tmp_path / "m.tflite", format="tflite", layout="CHW")


MISSING = """
import sys
sys.modules[{hidden!r}] = None
import torch
from edgeprune.export import export, load_artifact, require
from edgeprune.errors import ExportError
try:
    {act}
except ExportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("hidden", "act", "words"),
    [
        ("litert_torch", "export(torch.nn.ReLU(), torch.ones(1, 3), 'm.tflite', format='tflite')", "pip install 'edgeprune[tflite]'"),
        ("litert_torch", "require(['onnx', 'tflite'])", "needs litert-torch"),
        ("ai_edge_litert", "load_artifact('m.tflite')", "pip install 'edgeprune[tflite]'"),
    ],
)
def test_without_the_extra_the_error_says_what_to_install(hidden: str, act: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.tflite").write_bytes(b"\x1c\0\0\0TFL3" + b"\0" * 64)
    code = MISSING.format(hidden=hidden, act=act)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=_environment())
    assert words in done.stdout, done.stderr


def test_importing_the_package_and_its_formats_imports_no_converter() -> None:
    code = (
        "import sys, edgeprune.api; from edgeprune.export.tflite import TfliteFormat; "
        "sys.exit(bool({'litert_torch', 'ai_edge_litert', 'jax', 'litert_quantizer'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=_environment()).returncode == 0


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_the_format_says_what_it_is() -> None:
    assert (TfliteFormat.name, TfliteFormat.suffix) == ("tflite", ".tflite")
