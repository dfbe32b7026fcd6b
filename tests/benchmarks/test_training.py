"""The throughput benchmark on a case of its own: figures that belong together. No threshold here: the machine may be busy."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from benchmarks import training
from tests.colours import colour_net


def net() -> nn.Module:
    return nn.Sequential(colour_net(), nn.Linear(3, 10))


def test_figures_of_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.CASES, "small", (net, training.cifar, 16, 2))
    row = training.measured("small")
    assert row["case"] == "small"
    assert min(row["bare_images_per_s"], row["finetune_images_per_s"], row["contiguous_images_per_s"]) > 0
    assert row["share"] > 0


def test_photos_are_files(tmp_path: Path) -> None:
    data = training.photos(tmp_path, 20)
    assert (len(data.train), data.sample_shape) == (20, (1, 3, 224, 224))
