"""Several budgets: one search, a run folder for each, a report that compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import edgeprune as ep
from edgeprune.allocate import layer_compensated
from edgeprune.cli.options import limits_of
from edgeprune.errors import BudgetError, UsageError
from edgeprune.result import Result
from tests.colours import SIDE, colour_data, colour_net

EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)
BUDGETS = [ep.Budget(macs=0.7), ep.Budget(macs=0.4)]


def compress(out: Path, **options: Any) -> Result:
    given: dict[str, Any] = {
        "budget": BUDGETS,
        "device": "rpi4",
        "data": colour_data(),
        "recipe": ep.Recipe(epochs=0),
        "round_to": 1,
        **options,
    }
    return ep.compress(colour_net(), EXAMPLE, out=out, **given)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return compress(tmp_path_factory.mktemp("several") / "run")


def test_every_budget_has_a_run_folder_of_its_own(several: Result) -> None:
    assert [part.folder.relative_to(several.folder).as_posix() for part in several.parts] == ["macs-0.7", "macs-0.4"]
    shares = []
    for part in several.parts:
        names = {path.name for path in part.folder.iterdir()}
        assert {"run.json", "plan.json", "model.safetensors", "model.onnx", "artifacts.json", "report.html", "report.md"} <= names
        before, after = next((f["before"]["value"], f["after"]["value"]) for f in part.facts["figures"] if f["name"] == "macs")
        shares.append(after / before)
        assert part.met
    assert 0.65 < shares[0] <= 0.7 and 0.35 < shares[1] <= 0.4
    assert several.met and several.plan == several.parts[0].plan


def test_what_the_budgets_share_is_done_once(several: Result) -> None:
    stages = json.loads((several.folder / "run.json").read_text())["stages"]
    assert list(stages) == ["trace", "accuracy dense", "score", "allocate"]
    for part in several.parts:
        own = json.loads((part.folder / "run.json").read_text())
        assert own["status"] == "done" and own["asked"]["budget"] == {"macs": float(part.folder.name.removeprefix("macs-"))}
        assert own["stages"]["score"]["facts"] == stages["score"]["facts"]


def test_each_plan_is_the_one_of_a_run_with_this_budget_alone(several: Result, tmp_path: Path) -> None:
    alone = compress(tmp_path / "alone", budget=BUDGETS[1])
    assert alone.parts == ()
    assert alone.plan == several.parts[1].plan


def test_the_report_compares(several: Result) -> None:
    facts = several.to_json()
    assert [p["name"] for p in facts["points"]] == ["macs-0.7", "macs-0.4"]
    assert len(facts["budgets"]) == 2 and facts["met"]
    assert [stage["name"] for stage in facts["stages"]] == ["trace", "accuracy dense", "score", "allocate"]
    assert facts["dense"]["macs"] > facts["points"][0]["macs"] > facts["points"][1]["macs"]
    assert {"macs-0.7/model.onnx", "macs-0.4/plan.json", "result.json"} <= facts["files"].keys()
    page, words = ((several.folder / f"report.{end}").read_text() for end in ("html", "md"))
    assert 'id="chart-pareto"' in page and "| macs-0.4 |" in words and "| dense |" in words and "2 networks." in words
    assert 'id="chart-pareto"' not in (several.parts[0].folder / "report.html").read_text()


def test_a_finished_run_is_read_back(several: Result) -> None:
    before = json.loads((several.folder / "run.json").read_text())["stages"]
    again = compress(several.folder, resume=True)
    assert json.loads((several.folder / "run.json").read_text())["stages"] == before
    assert [p.plan for p in again.parts] == [p.plan for p in several.parts]
    assert all(stage["cached"] for part in again.parts for stage in part.facts["stages"])


def test_a_search_is_made_once_and_its_curve_is_in_the_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    learn = layer_compensated.learn

    def counted(*args: Any, evaluations: int = 4, **options: Any) -> Any:
        found.append(args[0].budget)
        return learn(*args, evaluations=evaluations, images=8, recalibration_images=8, **options)

    counted.__signature__ = __import__("inspect").signature(learn)  # type: ignore[attr-defined]
    monkeypatch.setattr(layer_compensated, "learn", counted)
    result = compress(tmp_path / "run", allocate="layer_compensated")
    assert found == [BUDGETS[1]]
    search = result.parts[0].facts["search"]
    assert search["evaluations"] == 4 and search["best_so_far"][0][0] == 1
    assert result.parts[0].plan != result.parts[1].plan


def test_in_rounds_every_budget_goes_its_own_way(tmp_path: Path) -> None:
    """The dense network is looked at and scored once; what a later round scores depends on the budget."""
    result = compress(tmp_path / "run", rounds=2)
    assert list(json.loads((result.folder / "run.json").read_text())["stages"]) == ["trace", "accuracy dense", "score"]
    assert result.met and result.facts["search"] == {}
    alone = compress(tmp_path / "alone", rounds=2, budget=BUDGETS[1])
    assert alone.plan == result.parts[1].plan


def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="knapsack has no option jobs"):
        compress(tmp_path / "run", search={"jobs": 2})
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="budgets must be different"):
        compress(tmp_path / "run", budget=[BUDGETS[0], BUDGETS[0]])


def test_limits_on_the_command_line() -> None:
    assert limits_of({"macs": "0.65,0.5", "size_bytes": "1.5", "params": None}) == [
        {"macs": 0.65, "size_bytes": 1.5e6},
        {"macs": 0.5, "size_bytes": 1.5e6},
    ]
    assert limits_of({"latency_ms": "30"}) == [{"latency_ms": 30.0}]
    with pytest.raises(UsageError, match="set at least one of --latency-ms, --size-mb"):
        limits_of({"latency_ms": None, "size_bytes": None})
    with pytest.raises(typer.BadParameter, match="'1;2' is no number, nor several with commas between them"):
        limits_of({"peak_memory_bytes": "1;2"})
    with pytest.raises(UsageError, match="equally many, got 2 and 3"):
        limits_of({"latency_ms": "3,2,1", "macs": "0.5,0.4"})


def test_a_size_is_that_of_the_quantized_file(tmp_path: Path) -> None:
    whole = compress(tmp_path / "floats", budget=ep.Budget(size_bytes=40_000)).facts["artifacts"][0]["size_bytes"]
    found = compress(tmp_path / "bytes", budget=ep.Budget(size_bytes=13_000), quantize="int8")
    assert found.met and found.facts["artifacts"][0]["size_bytes"] <= 13_000 < whole
    assert next(f["after"]["value"] / f["before"]["value"] for f in found.facts["figures"] if f["name"] == "macs") > 0.25
    with pytest.raises(BudgetError, match=r"no plan reaches 0\.002 MB in int8: the floor is \S+ MB.* --size-mb") as error:
        compress(tmp_path / "none", budget=ep.Budget(size_bytes=2_000), quantize="int8")
    least = float(str(error.value).partition("--size-mb ")[2].partition(",")[0])
    found = compress(tmp_path / "least", budget=ep.Budget(size_bytes=1e6 * least), quantize="int8")
    assert found.met and found.facts["artifacts"][0]["size_bytes"] <= 1e6 * least < 13_000
