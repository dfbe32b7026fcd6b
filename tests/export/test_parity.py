from __future__ import annotations

import errno
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import EdgepruneError, ExportError, ParityError
from edgeprune.export import Artifact, Draft
from edgeprune.export.parity import MOST_DB, Parity, accept, compare, judged, made_up_inputs, probe_again, probe_of, texts, write_checked
from edgeprune.run import Run

X = np.array([[1.0, 3.0], [5.0, 4.0]], np.float32)


@dataclass
class Coarse:
    """A quantizer that does nothing but name its limit."""

    least_sqnr_db: float
    bits: dict[str, int | float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __call__(self, draft: Draft) -> bytes:
        return draft.content


def test_figures_by_hand() -> None:
    got = X + np.array([[0.0, -2.5], [0.0, 0.0]], np.float32)
    parity = judged([([X], [got])], samples=2)
    assert parity.max_abs == 2.5
    assert parity.relative == 0.5
    assert parity.sqnr_db == pytest.approx(10 * math.log10((1 + 9 + 25 + 16) / 6.25))
    assert parity.top1 == 0.5
    assert judged([([X], [X])], samples=2) == Parity(0.0, 0.0, MOST_DB, 1.0, 2)


def test_the_worst_of_several_outputs_counts() -> None:
    noisy = X + 1
    both = judged([([X, X], [X, noisy])], samples=2)
    assert both.sqnr_db == judged([([X], [noisy])], samples=2).sqnr_db
    assert both.top1 == 1.0


def test_another_shape_is_refused() -> None:
    with pytest.raises(ParityError, match=r"\(1, 2\), the network \(2, 2\)"):
        judged([([X], [X[:1]])], samples=2)


def test_batches_are_cut_to_what_the_file_takes() -> None:
    seen = []

    def run(inputs: Any) -> list[Any]:
        seen.append(len(inputs[0]))
        return [np.maximum(inputs[0], 0)]

    inputs = (torch.randn(6, 3),)
    assert compare(nn.ReLU(), run, inputs, batch=2).relative == 0
    assert compare(nn.ReLU(), run, inputs).samples == 6
    assert seen == [2, 2, 2, 6, 1]
    with pytest.raises(ExportError, match="fixed batch of 4"):
        compare(nn.ReLU(), run, inputs, batch=4)


def test_the_gate_of_fp32_and_of_quantized_files() -> None:
    rough = Parity(1.0, 0.01, 40.0, 0.99, 8)
    with pytest.raises(ParityError, match=r"m\.onnx does not compute .* over 8 inputs .* limit is 0\.0001"):
        accept(rough, "m.onnx", tolerance=1e-4, quantizer=None)
    accept(rough, "m.onnx", tolerance=1e-4, quantizer=Coarse(39.0))
    with pytest.raises(ParityError, match=r"40\.0 dB .* limit is 41\.0 dB"):
        accept(rough, "m.onnx", tolerance=1e-4, quantizer=Coarse(41.0))
    for quantizer in (None, Coarse(0.0)):
        with pytest.raises(ParityError):
            accept(Parity(math.nan, math.nan, math.nan, 0.0, 1), "m.onnx", tolerance=1.0, quantizer=quantizer)


def test_the_probe_finds_another_function() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()

    def run(inputs: Any) -> list[Any]:
        return [network(torch.from_numpy(inputs[0])).detach().numpy()]

    probe = probe_of(network, run, (torch.zeros(1, 3, 2, 2),))
    metadata = texts({"probe": probe})
    now, then = probe_again(metadata, run) or (1.0, 1.0)
    assert now < 1e-6 > then
    wrong, _ = probe_again(metadata, lambda inputs: [run(inputs)[0] * 1.01]) or (0.0, 0.0)
    assert wrong == pytest.approx(0.01, rel=0.01)
    assert probe_again({}, run) is None
    assert probe_of(network, run, (torch.zeros(1, 3, dtype=torch.int64),)) == {}


def test_made_up_inputs_are_the_same_everywhere() -> None:
    a, b = made_up_inputs([[1, 2], [3]])
    assert [a.shape, b.shape] == [(1, 2), (3,)] and a.dtype == np.float32
    assert a[0, 0] == pytest.approx(1.117622, abs=1e-6)


def test_texts() -> None:
    assert texts({"a": "x", "b": [1], "c": None}) == {"a": "x", "b": "[1]", "c": "null"}


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "m.onnx"

    def refuse(file: Path) -> Artifact:
        assert file.read_bytes() == b"new" and file.suffix == ".onnx"
        raise ParityError("no")

    with pytest.raises(ParityError):
        write_checked(b"new", target, refuse)
    assert list(target.parent.iterdir()) == []


def test_a_full_disk_is_told_as_one_and_leaves_nothing(tmp_path: Path) -> None:
    def full(path: Path) -> Artifact:
        assert path.read_bytes() == b"content"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(EdgepruneError, match=r"no space left.*--resume") as error:
        write_checked(b"content", tmp_path / "a.onnx", full)
    assert not isinstance(error.value, ExportError)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_leaves_is_removed_when_the_run_is_resumed(tmp_path: Path) -> None:
    Run.open(tmp_path, asked={}, command=["x"]).close()

    def killed(path: Path) -> Artifact:
        shutil.copy(path, tmp_path / "checkpoints" / path.name)
        raise KeyboardInterrupt

    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(KeyboardInterrupt):
        write_checked(b"content", tmp_path / "a.onnx", killed)
    assert [p.suffix for p in (tmp_path / "checkpoints").iterdir()] == [".onnx"]
    Run.open(tmp_path, asked={}, command=["x"], resume=True).close()
    assert list((tmp_path / "checkpoints").iterdir()) == []
