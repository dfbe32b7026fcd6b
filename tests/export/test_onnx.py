# mypy: disable-error-code="no-any-return"
# (what a module returns when called is Any to mypy)
from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import ExportError, ParityError, UnsupportedOp
from edgeprune.export import Artifact, export, load_artifact, run_artifact
from edgeprune.export.onnx import _room_for_the_exporter, read_metadata
from edgeprune.graph.exported import Exported
from edgeprune.graph.slim import slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from edgeprune.run import hash_file
from edgeprune.train.reconstruct import Recording
from tests.export.export_nets import NETS, Plain, settle
from tests.networks import build, images

X = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact]:
    model = settle(Plain())
    metadata = {"preprocessing": {"mean": [0.5], "std": [0.25], "size": [12, 12]}, "labels": ["a", "é"], "plan_sha256": "ab" * 32}
    path = tmp_path_factory.mktemp("plain") / "deep" / "model.onnx"
    return model, export(model, X, path, samples=torch.rand(6, 3, 12, 12), metadata=metadata)


@pytest.mark.parametrize("name", NETS)
def test_the_artifact_computes_what_the_network_computes(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, samples = settle(NETS[name]()), torch.rand(5, 3, 12, 12)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    artifact = export(model, X, tmp_path / "m.onnx", samples=samples)

    (got,) = run_artifact(artifact.path, samples.numpy())
    expected = model(samples).detach().numpy()
    assert np.abs(got - expected).max() == pytest.approx(artifact.parity_max_abs, abs=1e-6)
    assert artifact.parity_relative == pytest.approx(artifact.parity_max_abs / np.abs(expected).max(), rel=0.01)
    assert artifact.parity_relative < 1e-5
    assert artifact.samples == 5
    assert artifact.dynamic_batch
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(artifact.path).graph.node}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert capfd.readouterr() == ("", "")


def test_a_slim_network_of_exported_operations_is_exported_after_it_trained(tmp_path: Path) -> None:
    dense, x = build("literal_flatten", dtype=torch.float32), images("literal_flatten", 6, dtype=torch.float32)[0]
    graph = trace(dense, x)
    small = slim(dense, graph, Plan.uniform(graph, 0.5)).train()
    assert isinstance(small, Exported)
    small(x).square().sum().backward()
    artifact = export(small.eval(), x[:1], tmp_path / "m.onnx", samples=x)
    (got,) = run_artifact(artifact.path, x.numpy())
    assert np.abs(got - small(x).detach().numpy()).max() < 1e-5
    assert artifact.dynamic_batch and artifact.parity_relative < 1e-5
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(artifact.path).graph.node}
    dense_artifact = export(dense, x[:1], tmp_path / "dense.onnx", samples=x)
    assert artifact.size_bytes < dense_artifact.size_bytes


def test_says_what_was_written(written: tuple[nn.Module, Artifact]) -> None:
    _, artifact = written
    proto = onnx.load(artifact.path)
    assert artifact.sha256 == hash_file(artifact.path)
    assert artifact.size_bytes == artifact.path.stat().st_size
    assert artifact.opset == proto.opset_import[0].version >= 18
    assert [i.name for i in proto.graph.input] == ["input"]
    assert [o.name for o in proto.graph.output] == ["output"]
    assert Artifact.from_json(json.loads(json.dumps(artifact.to_json()))) == artifact


def test_metadata_is_read_back(written: tuple[nn.Module, Artifact]) -> None:
    metadata = read_metadata(written[1].path)
    assert metadata == written[1].metadata
    assert json.loads(metadata["preprocessing"]) == {"mean": [0.5], "std": [0.25], "size": [12, 12]}
    assert json.loads(metadata["labels"]) == ["a", "é"]
    assert metadata["plan_sha256"] == "ab" * 32
    assert metadata["edgeprune_version"]


def test_holds_no_path_of_the_machine_it_was_made_on(written: tuple[nn.Module, Artifact]) -> None:
    content = written[1].path.read_bytes()
    assert b"pkg.torch" not in content
    assert __file__.encode() not in content


@pytest.mark.parametrize("damage", ["truncated", "cut to nothing", "weight changed", "label changed", "text"])
def test_a_damaged_file_is_refused(
    written: tuple[nn.Module, Artifact], damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = written[1].path.read_bytes()
    proto = onnx.load(written[1].path)
    if damage == "weight changed":
        raw = bytearray(proto.graph.initializer[0].raw_data)
        raw[1] ^= 1
        proto.graph.initializer[0].raw_data = bytes(raw)
    damaged = {
        "truncated": content[: len(content) // 2],
        "cut to nothing": b"",
        "weight changed": proto.SerializeToString(),
        "label changed": content.replace(b'["a"', b'["b"'),
        "text": b"this is no model",
    }[damage]
    assert damaged != content
    file = tmp_path / "broken.onnx"
    file.write_bytes(damaged)
    with pytest.raises(ExportError, match=r"broken\.onnx"):
        run_artifact(file, X.numpy())
    assert capfd.readouterr() == ("", "")


def test_inputs_it_does_not_take(written: tuple[nn.Module, Artifact]) -> None:
    run = load_artifact(written[1].path)
    with pytest.raises(ExportError, match=r"takes 1 input\(s\) \(input\), got 2"):
        run([X.numpy(), X.numpy()])
    with pytest.raises(ExportError, match=r"\(1, 4, 12, 12\)"):
        run(np.zeros((1, 4, 12, 12), np.float32))


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x * 2


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class NotFinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x - 10)


FAILURES = [
    (Bessel, UnsupportedOp, r"bessel_j0 at .*test_onnx\.py:\d+ .*torch\.special\.bessel_j0"),
    (Branch, ExportError, r"test_onnx\.py:\d+ .*x\.sum"),
    (Noisy, ParityError, "differ by up to"),
]


@pytest.mark.parametrize(("make", "error", "message"), [*FAILURES, (NotFinite, ParityError, "nan")])
def test_a_failed_export_leaves_nothing(
    make: type[nn.Module], error: type[ExportError], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.onnx").write_text("the previous one")
    with pytest.raises(error, match=message) as caught:
        export(make().eval(), X, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the previous one"]
    assert capfd.readouterr() == ("", "")


def test_an_input_the_model_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"\(1, 4, 12, 12\)"):
        export(settle(Plain()), torch.rand(1, 4, 12, 12), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_tolerance_is_what_decides(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="limit is 0"):
        export(settle(NETS["squeeze"]()), X, tmp_path / "m.onnx", samples=torch.rand(8, 3, 12, 12), tolerance=0.0)


class OneAtATime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).view(1, 4, 100).mean(2)


def test_a_network_for_one_batch_size_keeps_it(tmp_path: Path) -> None:
    model, samples = OneAtATime().eval(), torch.rand(3, 3, 12, 12)
    artifact = export(model, X, tmp_path / "m.onnx", samples=samples)
    assert not artifact.dynamic_batch
    assert artifact.samples == 3
    (got,) = run_artifact(artifact.path, X.numpy())
    np.testing.assert_allclose(got, model(X).detach().numpy(), atol=1e-5)


class ReliesOnInplace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(y) * 2 + y  # y is the activated one: the activation worked in place


class TwoInTwoOut(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a + b, a * b


def test_in_place_side_effects_are_kept(tmp_path: Path) -> None:
    assert export(ReliesOnInplace().eval(), X, tmp_path / "m.onnx").parity_relative < 1e-5


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    artifact = export(TwoInTwoOut().eval(), (X, X + 1), tmp_path / "m.onnx")
    assert artifact.dynamic_batch
    batch = np.random.default_rng(0).random((4, 3, 12, 12), dtype=np.float32)
    total, product = run_artifact(artifact.path, [batch, batch])
    np.testing.assert_allclose(total, 2 * batch)
    np.testing.assert_allclose(product, batch * batch)
    assert [o.name for o in onnx.load(artifact.path).graph.output] == ["output_0", "output_1"]


def test_a_captured_program(tmp_path: Path) -> None:
    model = settle(Plain())
    captured = torch.export.export(model, (X,)).module()
    artifact = export(captured, X, tmp_path / "m.onnx")
    np.testing.assert_allclose(run_artifact(artifact.path, X.numpy())[0], model(X).detach().numpy(), atol=1e-5)


def test_a_training_network_is_exported_for_inference_and_left_training(tmp_path: Path) -> None:
    model = settle(Plain()).train()
    artifact = export(model, X, tmp_path / "m.onnx")
    assert model.training
    np.testing.assert_allclose(run_artifact(artifact.path, X.numpy())[0], model.eval()(X).detach().numpy(), atol=1e-5)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot write"):
        export(nn.ReLU(), X, tmp_path / "file" / "m.onnx")


def test_too_little_address_space_for_the_exporter_is_noticed_before_it_begins(tmp_path: Path) -> None:
    _room_for_the_exporter.cache_clear()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 60_000_000, before[1]))
    try:
        with pytest.raises(MemoryError, match=r"\d+ MB are left, torch's ONNX exporter takes 96 MB"):
            export(nn.ReLU(), X, tmp_path / "m.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert export(nn.ReLU(), X, tmp_path / "m.onnx").path.is_file()


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_of_a_branch_that_vanished_one_addition_is_left_until_the_refit(name: str, tmp_path: Path) -> None:
    model = build(name, dtype=torch.float32)
    x = images(name, 3, dtype=torch.float32)[0]
    graph = trace(model, x)
    plan = Plan(dict.fromkeys(graph.branches, ()))
    small = slim(model, graph, plan)
    artifact = export(small, x[:1], tmp_path / "m.onnx", samples=x)
    made = onnx.load(artifact.path).graph
    constants = {i.name for i in made.initializer}
    added = [n for n in made.node if n.op_type == "Add" and constants & set(n.input)]
    assert len(added) == len(graph.branches)
    assert [n.op_type for n in made.node if n.op_type not in ("Add", "Relu")] == ["Conv", "ReduceMean", "Gemm"]
    refitted = Recording.of(model, graph, (x,), plan=plan).refitted(small, plan)
    made = onnx.load(export(refitted, x[:1], tmp_path / "m.onnx", samples=x).path).graph
    assert not any(n.op_type == "Add" for n in made.node), "the constants vanish with the refit"
