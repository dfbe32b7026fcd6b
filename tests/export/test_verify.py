from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from edgeprune.errors import UsageError
from edgeprune.export import Artifact, export
from edgeprune.export.onnx import _content_hash
from edgeprune.export.verify import BROKEN, GATE, UNREADABLE, Check, keep_samples, verify, write_list
from edgeprune.graph import portable
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from edgeprune.run import Run
from tests.export.export_nets import NETS, settle

X = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as compress leaves it, with a budget of size."""
    folder = tmp_path_factory.mktemp("run")
    model = settle(NETS["residual"]())
    plan = Plan.uniform(trace(model, X[:1]), 1.0)

    def compute() -> list[Artifact]:
        portable.save(model, folder / "model.safetensors", plan=plan)
        keep_samples(folder, model, X)
        return [export(model, X[:1], folder, samples=X)]

    def write(artifacts: list[Artifact]) -> dict[str, Any]:
        return {
            "artifacts": write_list(folder, artifacts),
            "files": ["model.safetensors", "artifacts.json", "samples.safetensors", "model.onnx"],
        }

    asked = {"budget": {"size_bytes": 1e6, "latency_ms": 5.0, "macs": None}}
    with Run.open(folder, asked=asked, command=["test"]) as run:
        run.cached("export", {}, compute, write=write, read=lambda _: [])
    reached = {"name": "latency_ms", "asked": 5.0, "reached": 4.0, "basis": "predicted"}
    (folder / "result.json").write_text(json.dumps({"budgets": [reached]}))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def failed(path: Path) -> list[Check]:
    return [c for c in verify(path) if not c.passed]


def test_a_finished_run_passes(run: Path) -> None:
    checks = verify(run)
    assert failed(run) == []
    assert [c.name for c in checks] == [
        "model.safetensors: checksum",
        "artifacts.json: checksum",
        "samples.safetensors: checksum",
        "model.safetensors",
        "model.onnx: checksum",
        "model.onnx: parity",
        "model.onnx: probe",
        "budget: model.onnx",
        "budget: latency_ms",
    ]


def test_a_lone_artifact_passes_anywhere(run: Path, tmp_path: Path) -> None:
    lone = Path(shutil.copy(run / "model.onnx", tmp_path / "elsewhere.onnx"))
    assert [(c.name, c.passed) for c in verify(lone)] == [("elsewhere.onnx: content", True), ("elsewhere.onnx: probe", True)]


def test_a_truncated_artifact(run: Path) -> None:
    file = run / "model.onnx"
    file.write_bytes(file.read_bytes()[:-100])
    checksum, content = failed(run)[:2]
    assert "truncated" in checksum.found and checksum.exit_code == BROKEN
    assert content.name == "model.onnx: content"
    assert [c.exit_code for c in failed(file)] == [BROKEN]


def tampered(file: Path) -> None:
    """Another weight, and the hash inside the file made to fit."""
    proto = onnx.load(file)
    weight = next(i for i in proto.graph.initializer if i.name == "head.weight")
    weight.raw_data = bytes(len(weight.raw_data))
    props = {p.key: p.value for p in proto.metadata_props}
    onnx.helper.set_model_props(proto, props | {"content_sha256": _content_hash(proto)})
    file.write_bytes(proto.SerializeToString())


def test_a_tampered_artifact_is_named_even_with_a_hash_that_fits(run: Path) -> None:
    tampered(run / "model.onnx")
    assert [c.name for c in failed(run)] == ["model.onnx: checksum", "model.onnx: parity", "model.onnx: probe"]
    assert {c.exit_code for c in failed(run)} == {BROKEN}
    assert [c.name for c in failed(run / "model.onnx")] == ["model.onnx: probe"]


def test_a_missing_artifact(run: Path) -> None:
    (run / "model.onnx").unlink()
    assert next((c.name, c.found) for c in failed(run)) == ("model.onnx: checksum", "missing")


@pytest.mark.parametrize("name", ["model.safetensors", "samples.safetensors", "artifacts.json"])
def test_other_files_that_changed(run: Path, name: str) -> None:
    file = run / name
    file.write_bytes(file.read_bytes().replace(b"0", b"1", 1) + b" ")
    first = failed(run)[0]
    assert (first.name, first.exit_code) == (f"{name}: checksum", UNREADABLE)
    assert "changed" in first.found


def test_a_budget_that_is_missed(run: Path) -> None:
    manifest = json.loads((run / "run.json").read_text())
    manifest["asked"]["budget"]["size_bytes"] = 100
    (run / "run.json").write_text(json.dumps(manifest))
    (missed,) = failed(run)
    assert (missed.name, missed.exit_code) == ("budget: model.onnx", GATE)
    assert "asked for at most 100" in missed.found


def test_the_bit_plan_is_looked_up_in_the_file(finished: Path, tmp_path: Path) -> None:
    model = settle(NETS["residual"]())
    artifact = export(model, X[:1], tmp_path, samples=X)
    keep_samples(tmp_path, model, X)
    for bits, wrong in (
        ({"head": 32, "stem.0": 32}, []),
        ({"head": 8, "stem.0": 32}, ["model.onnx: bit plan"]),
        ({"gone": 8}, ["model.onnx: bit plan"]),
    ):
        write_list(tmp_path, [replace(artifact, bits=bits)])
        assert [c.name for c in failed(tmp_path)] == wrong


def test_what_is_no_run_and_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished run"):
        verify(tmp_path)
    with pytest.raises(UsageError, match="nothing to verify"):
        verify(tmp_path / "gone.onnx")
    (tmp_path / "artifacts.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        verify(tmp_path)


def test_a_file_of_others_has_no_hash(run: Path, tmp_path: Path) -> None:
    proto = onnx.load(run / "model.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "theirs.onnx")
    (check,) = failed(tmp_path / "theirs.onnx")
    assert (check.name, check.exit_code) == ("theirs.onnx: hash", GATE)
