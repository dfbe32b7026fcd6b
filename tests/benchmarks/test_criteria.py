"""The benchmark's own logic, on a network without training and images of noise."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import peer_pruning
from benchmarks.criteria import Bench, Cell, Clock, OutOfTime, Results, Sizes, cells, code_of, judge, run, to_tune
from benchmarks.criteria_report import chart, table, winners
from benchmarks.networks import resnet
from edgeprune.data import load_data
from edgeprune.train.evaluate import evaluate

SIZES = Sizes(scoring=16, recalibration=16, reconstruction=16, validation=20, glance=10)
ENDLESS = Clock(float("inf"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    rng = np.random.default_rng(0)
    parts = [(rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8), np.arange(n) % 10) for n in (80, 20)]
    data = load_data(tuple(parts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet(8)
    return Bench("resnet20", model, data.train, data.val, sizes=SIZES, work=tmp_path_factory.mktemp("work"))


def row(network: str, criterion: str, removed: int, reconstructed: float, **more: Any) -> dict[str, Any]:
    cell = {"network": network, "criterion": criterion, "seed": 0, "removed": removed, "allocation": "uniform"}
    figures = {"pruned": 1.0, "recalibrated": 2.0, "reconstructed": reconstructed}
    return {**cell, "validation": figures, "macs_share": 1 - removed / 100, "scoring_cpu_seconds": 1.0, **more}


def test_every_combination_once_and_seeds_where_there_are_some() -> None:
    found = list(cells("resnet20", ["l1", "random", "torch-pruning Taylor"], [50, 35]))
    assert len(found) == len(set(found)) == 3 + 9 + 1 + 3 + 3 + 1
    assert {c.seed for c in found if c.criterion == "random" and c.removed == 50} == {0, 1, 2}
    assert len(list(cells("resnet20", ["random"], [50, 35], all_seeds=True))) == 18


def test_a_run_goes_on_where_it_was(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "criteria.json"
    wanted = list(cells("resnet20", ["l1"], [50]))
    with pytest.raises(OutOfTime):
        run(bench, Results(path), wanted, Clock(time.monotonic() - 1))
    run(bench, Results(path), wanted[:1], ENDLESS, training=0)
    first = json.loads(path.read_text())["rows"]
    run(bench, Results(path), wanted, ENDLESS, training=16)
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3 and [r["cpu_seconds"] for r in rows if r["allocation"] == wanted[0].allocation] == [first[0]["cpu_seconds"]]
    assert all(r["macs_share"] <= 0.5 and set(r["validation"]) >= {"pruned", "recalibrated", "reconstructed"} for r in rows)
    assert sum("fine-tuned" in r["validation"] for r in rows) == 1
    written = path.stat().st_mtime_ns
    results = Results(path)
    run(bench, results, wanted, ENDLESS, training=16)
    assert path.stat().st_mtime_ns == written
    judge(bench, results, ENDLESS)
    tested = [r for r in results.rows.values() if "test" in r]
    assert tested and results.dense["resnet20"].keys() == {"validation", "test"}
    assert "l1" in table(list(results.rows.values()), results.dense)
    run(bench, results, wanted, ENDLESS, training=24)
    assert not any("fine-tuned" in r.get("test", {}) for r in results.rows.values())  # that was another network


def test_a_row_is_stale_when_its_criterion_or_the_images_change(bench: Bench, tmp_path: Path) -> None:
    results = Results(tmp_path / "criteria.json")
    cell = Cell("resnet20", "l1", 0, 50, "uniform")
    results.put(row("resnet20", "l1", 50, 3.0, code=code_of("l1"), sizes=SIZES.__dict__))
    assert results.has(cell, SIZES) and not results.has(cell, Sizes())
    assert not results.has(Cell("resnet20", "l1", 1, 50, "uniform"), SIZES)
    results.put(row("resnet20", "l1", 50, 3.0, code="older", sizes=SIZES.__dict__))
    assert not results.has(cell, SIZES)


def test_a_stale_row_keeps_its_figures_where_the_plan_is_the_same(bench: Bench) -> None:
    cell = Cell("resnet20", "l1", 0, 50, "uniform")
    known = bench.measure(cell) | {"code": "older", "training_images": 16}
    assert bench.measure(cell, known) == known | {"code": code_of("l1")}
    assert "training_images" not in bench.measure(cell, known | {"plan_sha256": "another"})


def test_accuracy_is_that_of_the_product_and_leaves_validation_images_out_of_everything_else(bench: Bench) -> None:
    assert bench.accuracy(bench.dense) == pytest.approx(100 * evaluate(bench.dense, bench.held).accuracy)
    assert not set(bench.held.indices) & set(bench.rest.indices)
    assert len(bench.held) == 20 and sum(len(y) for _, y in bench.scoring) == 16


def test_scores_are_kept_on_disk(bench: Bench) -> None:
    first, again = bench.scores("reconstruction", 0), bench.scores("reconstruction", 0)
    assert first.facts == again.facts
    assert all((first.values[g.name] == again.values[g.name]).all() for g in bench.graph.groups)
    other = [bench.scores("random", seed).values for seed in (0, 1)]
    assert any((other[0][n] != other[1][n]).any() for n in other[0])


def test_who_is_trained_and_who_is_tested() -> None:
    rows = [row(n, c, 50, v) for n in ("resnet20", "resnet56") for c, v in (("a", 9.0), ("b", 7.0), ("c", 8.0), ("d", 6.0))]
    rows.append({**row("resnet20", "a", 50, 9.5), "allocation": "global"})
    rows += [row(n, next(iter(peer_pruning.PEERS)), 50, 5.0) for n in ("resnet20", "resnet56")]
    assert [(r["criterion"], r["allocation"]) for r in to_tune(rows, "resnet20")][:3] == [
        ("a", "global"),
        ("c", "uniform"),
        ("b", "uniform"),
    ]
    assert [r["criterion"] for r in to_tune(rows, "resnet56")] == ["a", "c", "b", next(iter(peer_pruning.PEERS))]
    chosen = {(r["network"], r["criterion"], stage) for r, stage in winners(rows)}
    assert ("resnet20", "a", "reconstructed") in chosen and ("resnet20", "torch-pruning L2 group norm", "reconstructed") in chosen
    assert not any(stage == "fine-tuned" for _, _, stage in chosen)


def test_the_report_holds_what_the_rows_say() -> None:
    rows = [row("resnet20", "l1", 50, 71.25, test={"reconstructed": 70.5}), row("resnet20", "random", 50, 60.0)]
    rows += [{**row("resnet20", "random", 50, 64.0), "seed": 1}, row("resnet20", "hrank", 50, 59.0, test={"reconstructed": 58.5})]
    dense = {"resnet20": {"validation": 99.0, "test": 91.7}}
    text = table(rows, dense)
    assert text.index("| l1 |") < text.index("| random |")
    assert "1.0 / 2.0 / 71.2" in text and "62.0 (60.0 to 64.0)" in text
    assert "| resnet20 | -50.0% | reconstructed | l1 | uniform | 71.25 | 70.50 |" in text
    assert "58.50" not in text  # it was the best once, before the others had rows
    page = chart(rows, dense)
    assert "reconstructed" in page and 'src="http' not in page


@pytest.mark.skipif(peer_pruning.version() is None, reason="Torch-Pruning is not installed")
def test_the_peers_choice_is_a_plan_within_the_budget(bench: Bench) -> None:
    for name in peer_pruning.PEERS:
        plan = peer_pruning.plan(name, bench.dense, bench.graph, bench.scoring, 0.6)
        assert plan.keep and all(n.endswith(".conv1") and kept for n, kept in plan.keep.items())
        assert bench.measure(Cell("resnet20", name, 0, 40, peer_pruning.ALLOCATION))["macs_share"] == pytest.approx(0.6, abs=0.03)


def test_a_choice_that_cannot_be_read_off_is_refused() -> None:
    dense = torch.arange(12.0).reshape(4, 3)
    assert peer_pruning._kept(dense, dense[[1, 3]]) == (1, 3)
    with pytest.raises(ValueError, match="cannot be read off"):
        peer_pruning._kept(dense, dense[[1, 3]] + 0.5)
