"""The ImageNet benchmark's own logic, on a small network without training and images of noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cifar10 import data_folder
from benchmarks.imagenet import halves, measure, table
from benchmarks.networks import resnet
from edgeprune.data import load_data


def test_rows_of_the_dense_network_and_of_every_budget() -> None:
    rng = np.random.default_rng(0)
    parts = [(rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8), np.arange(n) % 10) for n in (40, 20)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet(8).eval()
    dense, row = measure(model, load_data(tuple(parts)), (30,))
    assert (dense["removed"], set(dense["accuracy"]), set(row["accuracy"])) == (0, {"pruned"}, {"pruned", "reconstructed"})
    assert 0.5 < row["macs_share"] <= 0.7
    assert all(0 <= step[part] <= 100 for step in row["accuracy"].values() for part in ("seen", "new"))


def test_the_table_keeps_seen_and_new_images_apart() -> None:
    rows: list[dict[str, Any]] = [
        {"removed": 0, "macs_share": 1.0, "params_share": 1.0, "accuracy": {"pruned": {"seen": 88.0, "new": 87.4}}},
        {
            "removed": 20,
            "macs_share": 0.799,
            "params_share": 0.9,
            "accuracy": {"pruned": {"seen": 10.0, "new": 11.0}, "reconstructed": {"seen": 80.0, "new": 79.0}},
        },
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| dense | dense | 88.0 | 87.4 | - | - |"
    assert lines[3] == "| -20.1% | -10.0% | 10.0 | 11.0 | 80.0 | 79.0 |"


@pytest.mark.skipif(not (data_folder() / "imagenet").is_dir(), reason="the benchmark images are not here (EDGEPRUNE_DATA)")
def test_the_halves_share_no_image() -> None:
    data = halves()
    assert (len(data.train), len(data.val)) == (500, 500)
    assert not set(data.train.labels.tolist()) & set(data.val.labels.tolist())
