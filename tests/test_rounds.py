"""Pruning in rounds: the schedule, one plan for what all rounds removed, and a run that goes on where it was."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import edgeprune as ep
from edgeprune.errors import BudgetError, UsageError
from edgeprune.graph.slim import named_tensors, slim
from edgeprune.pipeline import Job, Pipeline
from edgeprune.result import Result
from edgeprune.rounds import schedule
from edgeprune.run import Run
from edgeprune.train import silent
from edgeprune.widths import WidthRules
from tests.colours import SIDE, colour_data, colour_net, same, weights

EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)


def compress(out: Path, *, rounds: int = 3, **options: Any) -> Result:
    chosen: dict[str, Any] = {
        "budget": ep.Budget(macs=0.3),
        "device": "rpi4",
        "data": colour_data(),
        "recipe": ep.Recipe(epochs=1, lr=0.02, batch_size=16),
        "round_to": 1,
        "criterion": "l1",
        **options,
    }
    return ep.compress(colour_net(), EXAMPLE, out=out, rounds=rounds, **chosen)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return compress(tmp_path_factory.mktemp("rounds") / "run")


def test_the_schedule_is_geometric_and_ends_at_the_budget(tmp_path: Path) -> None:
    """Limits that the dense network meets anyway stay as they are."""
    model = colour_net()
    job = Job(
        name="x", model=model, example_inputs=(EXAMPLE,), budget=ep.Budget(macs=0.125, params=0.5, latency_ms=1e6),
        device=ep.device("rpi4"), data=None, criterion="l1", allocator="knapsack", recipe=ep.Recipe(epochs=0), recover="none",
        rules=WidthRules(round_to=1), formats=("onnx",), seed=0, calibration_images=1, rounds=3,
    )  # fmt: skip
    with Run.open(tmp_path / "run", asked={}, command=[]) as folder:
        first = Pipeline(job, folder, silent)
        budgets = [b.limits() for b in schedule(first)]
        macs, params = first.graph.macs, first.graph.params
    assert [b["macs"] for b in budgets] == pytest.approx([macs / 2, macs / 4, macs / 8])
    assert [b["params"] for b in budgets] == pytest.approx([params * 0.5 ** (n / 3) for n in (1, 2, 3)])
    assert [b["latency_ms"] for b in budgets] == pytest.approx([1e6] * 3)


def test_a_run_in_rounds_is_a_run_like_any_other(finished: Result) -> None:
    """Budget, plan, report facts, and loading from the dense network."""
    dense = colour_net()
    graph = ep.trace(dense, EXAMPLE)
    rebuilt = ep.load(finished.folder / "model.safetensors", model=colour_net())
    assert finished.met
    assert ep.trace(rebuilt, EXAMPLE).macs <= 0.3 * graph.macs
    assert {n: t.shape for n, t in named_tensors(rebuilt)} == {n: t.shape for n, t in named_tensors(slim(dense, graph, finished.plan))}
    kept = {g["name"]: (g["kept"], g["channels"]) for g in finished.facts["groups"]}
    assert kept == {g.name: (len(finished.plan.keep[g.name]), g.channels) for g in graph.groups}
    assert ep.Plan.from_json(json.loads((finished.folder / "plan.json").read_text())) == finished.plan
    assert [e["epoch"] for e in finished.facts["curve"]] == [1, 2, 3]
    assert finished.facts["figures"][2]["name"] == "macs"
    assert finished.facts["figures"][2]["before"]["value"] == graph.macs


def test_every_round_cuts_its_part(finished: Result) -> None:
    dense = ep.trace(colour_net(), EXAMPLE).macs
    stages = json.loads((finished.folder / "run.json").read_text())["stages"]
    left = [stages[f"round-{n}: trace"]["facts"]["macs"] / dense for n in (1, 2, 3)]
    assert left[0] == 1
    assert left[1] <= 0.3 ** (1 / 3) < left[1] + 0.1
    assert left[2] <= 0.3 ** (2 / 3) < left[2] + 0.1
    assert {"round-1: finetune", "round-2: finetune", "finetune", "compose"} <= stages.keys()
    assert [name for name in stages if name.startswith("accuracy")] == [
        "accuracy dense", "accuracy right after pruning", "accuracy after reconstruction", "accuracy after fine-tuning",
    ]  # fmt: skip  # the validation images see the last round alone


class Stop(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("moment", ["round-1: finetune", "round-2: reconstruct"])
def test_a_run_in_rounds_goes_on(finished: Result, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Run.log

    def log(self: Run, text: str) -> None:
        plain(self, text)
        if text.startswith(f"{moment}:"):
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Run, "log", log)
        compress(tmp_path / "run")
    resumed = compress(tmp_path / "run", resume=True)
    assert f"{moment}: read back" in (tmp_path / "run" / "log.txt").read_text()
    assert same(weights(resumed.folder / "model.safetensors"), weights(finished.folder / "model.safetensors"))
    assert resumed.plan == finished.plan


def test_another_budget_reads_back_the_scores_of_the_dense_network(finished: Result, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    compress(tmp_path / "run", budget=ep.Budget(macs=0.4), resume=True)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "\nscore: read back" in re.sub(r"(?m)^\S+ ", "", log) and "schedule: read back" not in log


def test_rounds_without_training(tmp_path: Path) -> None:
    result = compress(tmp_path / "run", rounds=2, recipe=ep.Recipe(epochs=0))
    assert result.met
    assert result.facts["curve"] == []
    with pytest.raises(BudgetError, match="the floor is") as refused:
        compress(tmp_path / "tiny", budget=ep.Budget(macs=0.001))
    assert refused.value.exit_code == 3 and not (tmp_path / "tiny").exists()
    with pytest.raises(UsageError, match="rounds 1 or more"):
        compress(tmp_path / "none", rounds=0)
