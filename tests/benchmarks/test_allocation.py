"""The benchmark's own logic, on a network without training and images of noise."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.accuracy import Bench
from benchmarks.accuracy import Sizes as ImagesFor
from benchmarks.allocation import BUDGETS, METHODS, Arena, Results, Sizes, examine, learners, run
from benchmarks.allocation_report import LEARNED, chart, table
from benchmarks.criteria import Clock, OutOfTime
from benchmarks.networks import resnet
from edgeprune.data import load_data

FEW = Sizes(recalibration=16, reconstruction=16, training=16, fitness=8, fitness_recalibration=8, evaluations=3)
ENDLESS = Clock(float("inf"))


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    rng = np.random.default_rng(0)
    parts = [(rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8), np.arange(n) % 10) for n in (80, 20)]
    data = load_data(tuple(parts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet(8)
    sizes = ImagesFor(scoring=16, reconstruction=16, held=20)
    return Arena(Bench("resnet20", model, data.train, data.val, sizes=sizes, work=tmp_path_factory.mktemp("work")), FEW)


def test_only_random_searches_have_seeds() -> None:
    found = list(learners("resnet20", list(METHODS), 3))
    assert len(found) == len(set(found)) == len(METHODS) + 2 * 3
    assert {learner.allocator for learner in found if learner.seed} == {LEARNED, "LeGR bare", "LcP bare"}
    assert [learner.seed for learner in found] == sorted(learner.seed for learner in found)


def test_one_search_makes_a_row_per_budget_and_a_run_goes_on_where_it_was(arena: Arena, tmp_path: Path) -> None:
    path, wanted = tmp_path / "allocation.json", list(learners("resnet20", ["knapsack", "global", "global per cost", LEARNED], 1))
    with pytest.raises(OutOfTime):
        run(arena, Results(path), wanted, Clock(time.monotonic() - 1), budgets=BUDGETS, training=True)
    run(arena, Results(path), wanted, ENDLESS, budgets=["macs-64", "macs-50"], training=False)
    first = json.loads(path.read_text())["rows"]
    assert len(first) == 8 and first[6]["search"] == first[7]["search"]
    results = Results(path)
    run(arena, results, wanted, ENDLESS, budgets=BUDGETS, training=True)
    examine(arena, results, ENDLESS)
    content = json.loads(path.read_text())
    rows: list[dict[str, Any]] = content["rows"]
    assert len(rows) == 12 and [r["search"] for r in rows if r["budget"] != "latency"] == [r["search"] for r in first]
    for row in rows:
        assert {"recalibrated", "reconstructed"} <= row["after"].keys() and row["revision"]
        assert row["learned_at"] == ("latency" if row["budget"] == "latency" else "macs-64")
        assert ("fine-tuned" in row["after"]) == (row["budget"] == "macs-50")
        limit = {"macs-64": 0.36, "macs-50": 0.5}.get(row["budget"], 1.0)
        assert limit - 0.05 < row["macs_share"] <= limit or row["budget"] == "latency"
        assert arena.plan(row).sha256 == row["plan_sha256"]
    searched = next(r for r in rows if r["allocator"] == LEARNED)["search"]
    assert searched["evaluations"] == 3 and searched["best_so_far"]
    assert content["dense"]["resnet20"]["divergence"] == 0 and "test" in content["dense"]["resnet20"]
    text = table(rows, content["dense"])
    assert text.count("### resnet20") == 3
    verdict = text.partition(f"### {LEARNED} against")[2].partition("###")[0]
    assert verdict.count("| after BN recalibration |") == verdict.count("| after reconstruction |") == 3
    mine = {r["allocator"]: r["after"]["reconstructed"]["divergence"] for r in rows if r["budget"] == "macs-50"}
    beaten = [name for name in ("global", "global per cost", "knapsack") if mine[LEARNED] < mine[name]]
    line = next(x for x in verdict.splitlines() if "macs-50 | after reconstruction" in x)
    assert line.endswith(f"| {', '.join(beaten) or 'none of them'} |") and f"{mine[LEARNED]:.3f}" in line
    assert "the 10,000 test images" in text and "Allocators on CIFAR-10" in chart(rows, content["dense"])
