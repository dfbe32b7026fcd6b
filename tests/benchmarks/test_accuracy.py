"""The benchmark's own logic, on a network without training and images of noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgeprune as ep
from benchmarks.accuracy import OURS, Bench, Results, Sizes, run, table
from benchmarks.networks import resnet
from edgeprune.data import load_data
from edgeprune.train.evaluate import evaluate

SIZES = Sizes(scoring=16, reconstruction=16, held=20)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    rng = np.random.default_rng(0)
    parts = [(rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8), np.arange(n) % 10) for n in (80, 40)]
    data = load_data(tuple(parts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet(8)
    return Bench("resnet20", model, data.train, data.val, sizes=SIZES, work=tmp_path_factory.mktemp("work"))


def test_a_run_goes_on_where_it_was_and_epochs_are_added_to_the_row(bench: Bench, tmp_path: Path) -> None:
    run(bench, Results(tmp_path), (50,), [OURS], epochs=0)
    first = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    for kept in bench.work.iterdir():
        kept.unlink()  # a fresh clone has the figures alone
    run(bench, Results(tmp_path), (50,), [OURS], epochs=1)
    (row,) = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert row["reconstruction_cpu_seconds"] == first[0]["reconstruction_cpu_seconds"]  # not done again
    assert set(row["accuracy"]) == {"pruned", "reconstructed", "epochs 1"} and set(first[0]["accuracy"]) == {"pruned", "reconstructed"}
    assert 0.3 < row["macs_share"] <= 0.5
    assert set(row["git"]) == set(row["kl"]) == {"reconstructed", "epochs 1"}
    assert row["training"]["epochs 1"]["recipe"]["epochs"] == 1
    row["training"]["epochs 1"]["recipe"]["lr"], row["accuracy"]["epochs 1"] = 1.0, -1.0
    Results(tmp_path).put(row)
    run(bench, Results(tmp_path), (50,), [OURS], epochs=1)  # another recipe's epoch
    (again,) = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert again["accuracy"]["epochs 1"] >= 0 and again["training"]["epochs 1"]["recipe"]["lr"] < 1


def test_rows_with_other_images_are_measured_again_with_the_same_channels(bench: Bench, tmp_path: Path) -> None:
    run(bench, Results(tmp_path), (50,), [OURS], epochs=0)
    late = Results(tmp_path)
    row = late.rows[0]
    late.rows[0] = row | {"sizes": row["sizes"] | {"reconstruction": 8}, "accuracy": {"pruned": -1.0, "reconstructed": -1.0}}
    Results(tmp_path).put(row | {"removed": 70})
    run(bench, late, (50,), [OURS], epochs=0)  # it had read the file before the other process wrote
    assert [r["removed"] for r in Results(tmp_path).rows] == [50, 70]
    again = Results(tmp_path).find("resnet20", OURS, 50)
    assert again is not None and again["plan"] == row["plan"]
    assert (again["accuracy"]["pruned"], again["accuracy"]["reconstructed"]) == (-1.0, row["accuracy"]["reconstructed"])


def test_figures_are_those_of_plain_evaluation(bench: Bench) -> None:
    assert bench.accuracy(bench.dense) == pytest.approx(100 * evaluate(bench.dense, bench.test).accuracy, abs=0.01)
    assert bench.divergence(bench.dense) == 0
    plan = ep.Plan.uniform(bench.graph, keep=0.1)
    assert bench.divergence(ep.slim(bench.dense, bench.graph, plan)) > 0


def test_the_table_shows_what_was_not_measured() -> None:
    base: dict[str, Any] = {"network": "resnet20", "removed": 50, "macs_share": 0.499, "params_share": 0.6}
    rows = [
        base | {"chooser": OURS, "accuracy": {"pruned": 10.0, "reconstructed": 80.0, "epochs 1": 90.0}},
        base | {"chooser": "peer", "accuracy": {"pruned": 11.0, "reconstructed": 70.0}},
    ]
    lines = table(rows, {"resnet20": {"accuracy": 91.5}}).splitlines()
    assert lines[2] == "| resnet20 | -50.1% | -40.0% | edgeprune | 91.50 | 10.00 | 80.00 | 90.00 |"
    assert lines[3].endswith("| 70.00 | - |") and "after 1 epoch |" in lines[0]
