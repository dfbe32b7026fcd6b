"""The facts of a run, from findings made by hand: what is asked, what is reached, and how each figure is called."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import edgeprune as ep
from edgeprune.choice import Choice, Round
from edgeprune.device.cost import predict_graph
from edgeprune.device.energy import Energy
from edgeprune.device.measure import Measurement
from edgeprune.export import Artifact
from edgeprune.graph.slim import Proof
from edgeprune.pipeline import Job
from edgeprune.result import Findings, Result, facts
from edgeprune.train import Epoch
from edgeprune.train.evaluate import Accuracy
from edgeprune.widths import WidthRules
from tests.colours import SIDE, colour_net

MANIFEST = {
    "created": "2026-01-01T00:00:00+00:00",
    "versions": {"edgeprune": "0.1", "python": "3.11"},
    "platform": "Linux",
    "stages": {"trace": {"seconds": 0.5}},
}


def measurement(median: float, high: float) -> Measurement:
    return Measurement(
        latency_ms=median, low_ms=median, high_ms=high, min_ms=median, p90_ms=high, p99_ms=high, first_ms=high, load_ms=1.0,
        peak_memory_bytes=1, runs=60, outliers=0, process_medians_ms=(median,) * 3, threads=1, fingerprint={},
    )  # fmt: skip


def found(device: str = "rpi4", *, budget: ep.Budget | None = None, **changes: Any) -> Findings:
    model, example = colour_net(), torch.zeros(1, 3, SIDE, SIDE)
    graph = ep.trace(model, example)
    plan, target = ep.Plan.uniform(graph, 0.5), ep.device(device)
    job = Job(
        name="net", model=model, example_inputs=(example,), budget=budget or ep.Budget(macs=0.5, latency_ms=30), device=target, data=None,
        criterion="l1", allocator="uniform", recipe=ep.Recipe(epochs=0), recover="bn", rules=WidthRules(round_to=8), formats=("onnx",),
        seed=0, calibration_images=1, notes=("from the file",),
    )  # fmt: skip
    artifact = Artifact(
        path=Path("run/model.onnx"), format="onnx", sha256="ab", size_bytes=1234, opset=18, dynamic_batch=True, parity_max_abs=1e-6,
        parity_relative=1e-7, parity_sqnr_db=140.0, parity_top1=1.0, samples=1, metadata={},
    )  # fmt: skip
    values: dict[str, Any] = {
        "job": job,
        "graph": graph,
        "choice": Choice(plan, 1.0, ()),
        "proof": Proof(1e-15, 2, "float64"),
        "dense_cost": predict_graph(graph, None, target),
        "cost": predict_graph(ep.trace(ep.slim(model, graph, plan), example), None, target),
        "accuracies": {"dense": None, "right after pruning": None},
        "curve": (),
        "artifacts": (artifact,),
        "measurements": {},
        **changes,
    }
    return Findings(**values)


def told(findings: Findings) -> dict[str, Any]:
    words = facts(findings, MANIFEST, dict.fromkeys(MANIFEST["stages"], False), "edgeprune compress net.pt")
    assert json.loads(json.dumps(words, allow_nan=False)) == words
    return words


def by_name(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in entries}


def test_predicted_figures_are_called_so() -> None:
    findings = found()
    words = told(findings)
    budgets, figures = by_name(words["budgets"]), by_name(words["figures"])
    assert budgets["latency_ms"]["reached"] == findings.cost.latency_ms.high
    assert budgets["latency_ms"]["basis"] == figures["latency"]["basis"] == "predicted"
    assert "predicted, not measured" in budgets["latency_ms"]["how"]
    assert figures["latency"]["after"]["low"] < figures["latency"]["after"]["value"] < figures["latency"]["after"]["high"]
    assert budgets["macs"]["asked"] == 0.5 * findings.graph.macs
    assert (budgets["macs"]["reached"], budgets["macs"]["basis"]) == (findings.cost.macs, "counted")
    assert "accuracy" not in figures
    assert words["accuracy_steps"] == []
    assert figures["size"]["after"]["value"] == 1234
    latencies = [(layer["before_ms"], layer["after_ms"]) for layer in words["layers"]]
    assert [sum(side) for side in zip(*latencies, strict=True)] == pytest.approx(
        [sum(layer.latency_ms for layer in cost.per_layer) for cost in (findings.dense_cost, findings.cost)]
    )
    assert {(layer["name"], layer["kind"]) for layer in words["layers"]} >= {(findings.graph.groups[0].name, "conv3x3")}
    assert words["notes"][0] == "from the file"


def test_measured_figures_replace_predicted_ones() -> None:
    measured = {"dense": measurement(40.0, 41.0), "compressed": measurement(28.0, 30.5)}
    rounds = (Round(1, 29.0, 31.0, 30.0, 32.0, 1.1),)
    findings = found("host", measurements=measured)
    words = told(found("host", measurements=measured, choice=Choice(findings.choice.plan, 1.1, rounds)))
    budget, figure = by_name(words["budgets"])["latency_ms"], by_name(words["figures"])["latency"]
    assert (budget["reached"], budget["met"], budget["basis"]) == (30.5, False, "measured")
    assert (figure["before"]["value"], figure["after"]["value"], figure["basis"]) == (40.0, 28.0, "measured")
    assert "predicted" not in figure["how"] + budget["how"]
    assert words["rounds"][0]["measured_ms"] == 31.0


def test_a_measured_energy_is_the_figure_and_judges_the_budget() -> None:
    energy = Energy(
        total_mj=9.0, total_low_mj=8.0, total_high_mj=10.0, net_mj=5.0, net_low_mj=4.5, net_high_mj=5.5, calibrated_mj=None, active_mw=1.0,
        idle_mw=1.0, source="ina219 hwmon2", scope="board", trials=5, samples=20,
    )  # fmt: skip
    measured = {"dense": replace(measurement(40.0, 41.0), energy=replace(energy, net_mj=8.0)), "compressed": measurement(28.0, 30.5)}
    budget = ep.Budget(energy_mj=5.4)
    measured["compressed"] = replace(measured["compressed"], energy=energy)
    words = told(found("rpi4", budget=budget, measurements=measured))
    assert {k: by_name(words["budgets"])["energy_mj"][k] for k in ("reached", "met", "basis")} == {
        "reached": 5.5,
        "met": False,
        "basis": "measured",
    }
    figure = by_name(words["figures"])["energy"]
    assert (figure["before"]["value"], figure["after"], figure["basis"]) == (8.0, {"value": 5.0, "low": 4.5, "high": 5.5}, "measured")
    assert "ina219" in figure["how"]


def test_what_the_sensors_said_is_told_by_network_and_only_where_they_said_something() -> None:
    energy = Energy(
        total_mj=9.0, total_low_mj=8.0, total_high_mj=10.0, net_mj=5.0, net_low_mj=4.5, net_high_mj=5.5, calibrated_mj=None, active_mw=1.0,
        idle_mw=1.0, source="made up", scope="board", trials=5, samples=20, trace=((0.1, 2000.0), (0.2, 2100.0)),
    )  # fmt: skip
    warm = {
        "states": [{"before": {"temperatures_c": [40.0, 41.5]}, "after": {"temperatures_c": [43.0, 42.0]}}, {"before": {}, "after": {}}]
    }
    measured = {"dense": replace(measurement(40.0, 41.0), energy=energy), "compressed": replace(measurement(28.0, 29.0), fingerprint=warm)}
    assert facts(found("rpi4", measurements=measured), MANIFEST, {"trace": False}, "edgeprune compress")["sensors"] == [
        {"network": "dense", "power_mw": [(0.1, 2000.0), (0.2, 2100.0)], "temperatures_c": []},
        {"network": "compressed", "power_mw": [], "temperatures_c": [41.5, 43.0]},
    ]
    assert told(found())["sensors"] == []


def test_where_a_board_is_attached_a_prediction_meets_no_budget() -> None:
    """Measured, but without memory and energy: their budgets are as good as missed."""
    measured = {"dense": measurement(40.0, 41.0), "compressed": measurement(28.0, 30.5)}
    budget = ep.Budget(energy_mj=1e6, peak_memory_bytes=1e12, latency_ms=31.0)
    budgets = by_name(told(found("rpi4", budget=budget, measurements=measured))["budgets"])
    assert {name: (b["met"], b["basis"]) for name, b in budgets.items()} == {
        "latency_ms": (True, "measured"),
        "energy_mj": (False, "predicted"),
        "peak_memory_bytes": (False, "predicted"),
    }
    assert all(b["met"] for b in told(found("rpi4", budget=budget))["budgets"] if b["name"] != "latency_ms")


def test_a_disturbed_measurement_is_said() -> None:
    measured = {"dense": measurement(40.0, 41.0), "compressed": replace(measurement(28.0, 29.0), problems=("throttled",))}
    assert "measuring the compressed network: throttled" in told(found("host", measurements=measured))["notes"]


@pytest.mark.parametrize(("limit", "met"), [(1234.0, True), (1233.0, False)])
def test_a_limit_holds_up_to_its_value(limit: float, met: bool) -> None:
    words = told(found(budget=ep.Budget(size_bytes=limit)))
    assert words["budgets"][0]["met"] is met
    assert words["budgets"][0]["basis"] == "measured"


def test_accuracy_is_that_of_the_last_step_and_says_which() -> None:
    steps = {"dense": Accuracy(0.9, 0.3, 1000), "right after pruning": Accuracy(0.5, 1.0, 1000), "after BN recalibration": None}
    words = told(found(accuracies=steps, curve=(Epoch(1, 0.5, None, None, 0.01, 2.0),)))
    figure = by_name(words["figures"])["accuracy"]
    assert (figure["before"]["value"], figure["after"]["value"]) == (90.0, 50.0)
    assert figure["how"] == "top-1 on 1,000 validation images, by torch, right after pruning"
    assert words["accuracy_steps"] == [
        {"step": "dense", "accuracy": 0.9, "images": 1000},
        {"step": "right after pruning", "accuracy": 0.5, "images": 1000},
    ]
    assert words["curve"][0]["val_loss"] is None


def test_a_result_knows_whether_it_met_and_lists_its_files(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("model.onnx", "checkpoints/score.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    words = {"budgets": [{"met": True}, {"met": False}], "title": "x"}
    result = Result(tmp_path, colour_net(), ep.Plan({}), words)
    assert not result.met
    names = ("checkpoints/score.safetensors", "model.onnx")
    assert result.to_json() == {**words, "met": False, "folder": str(tmp_path), "files": {name: str(tmp_path / name) for name in names}}
    assert Result(tmp_path, colour_net(), ep.Plan({}), {"budgets": [{"met": True}]}).met


@pytest.mark.parametrize(("quantize", "said"), [("int8", True), ("none", False)])
def test_predictions_for_a_quantized_network_are_said_to_be_for_fp32(quantize: str, said: bool) -> None:
    here = found()
    notes = facts(replace(here, job=replace(here.job, quantize=quantize)), MANIFEST, {"trace": False}, "edgeprune compress")["notes"]
    assert any("predicted for fp32 kernels" in note for note in notes) is said
