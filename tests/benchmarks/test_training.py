"""The throughput benchmark on a case of its own: figures that belong together. No threshold here: the machine may be busy."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from benchmarks import training
from benchmarks.cifar10 import data_folder
from tests.colours import colour_net


def net() -> nn.Module:
    return nn.Sequential(colour_net(), nn.Linear(3, 10))


def test_figures_of_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.CASES, "small", (net, training.cifar, 16, 2))
    row = training.measured("small")
    assert row["case"] == "small"
    assert min(row["bare_images_per_s"], row["finetune_images_per_s"], row["contiguous_images_per_s"]) > 0
    assert row["share"] > 0


@pytest.mark.skipif(not (data_folder() / "imagenet").is_dir(), reason="the benchmark images are not here (EDGEPRUNE_DATA)")
def test_photos_are_files(tmp_path: Path) -> None:
    data = training.photos(tmp_path, 20)
    assert (len(data.train), len(data.val), data.sample_shape) == (20, 20, (1, 3, 224, 224))
    assert len(list((tmp_path / "train").rglob("*.jpg"))) == 20
