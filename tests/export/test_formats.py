from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import ExportError, UsageError
from edgeprune.export import Artifact, Runner, export, formats, load_artifact, run_artifact
from tests.export.export_nets import NETS, settle

X = torch.rand(1, 3, 12, 12)


@pytest.mark.parametrize("name", formats())
def test_every_format_writes_what_it_can_run(name: str, tmp_path: Path) -> None:
    if name == "tflite":
        pytest.importorskip("litert_torch", reason="the converter is not installed: pip install 'edgeprune[tflite]' (make setup does)")
    model = settle(NETS["residual"]())
    artifact = export(model, X, tmp_path, format=name)
    assert artifact.format == name
    assert artifact.path.parent == tmp_path
    assert abs(run_artifact(artifact.path, X.numpy())[0] - model(X).detach().numpy()).max() < 1e-4


def test_an_unknown_format_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'caffe'; there is: onnx"):
        export(nn.ReLU(), X, tmp_path, format="caffe")


def test_an_artifact_that_is_not_there_or_of_no_format(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"there is no artifact .*gone\.onnx"):
        load_artifact(tmp_path / "gone.onnx")
    (tmp_path / "model.caffe").touch()
    with pytest.raises(ExportError, match=r"'\.caffe'"):
        load_artifact(tmp_path / "model.caffe")


class Outside:
    name, suffix = "outside", ".out"

    def export(self, model: nn.Module, example_inputs: Tensor | Sequence[Tensor], path: Path, **options: Any) -> Artifact:
        path.write_bytes(b"x")
        raise ExportError(f"{path.name} {sorted(options)}")

    def load(self, path: Path) -> Runner:
        return lambda inputs: [path.read_bytes()]  # type: ignore[list-item]


def test_an_outsiders_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point = EntryPoint("outside", f"{__name__}:Outside", "edgeprune.formats")
    monkeypatch.setattr(sys.modules["edgeprune.export"], "entry_points", lambda group: EntryPoints([point]).select(group=group))
    assert formats() == ("onnx", "tflite", "outside")
    with pytest.raises(ExportError, match=r"model\.out \['layout', 'metadata', 'quantizer', 'reference', 'samples', 'tolerance'\]"):
        export(nn.ReLU(), X, tmp_path, format="outside")
    assert run_artifact(tmp_path / "model.out", X.numpy()) == [b"x"]


def test_listing_formats_imports_no_torch() -> None:
    code = "import sys; from edgeprune.export import formats; formats(); sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
