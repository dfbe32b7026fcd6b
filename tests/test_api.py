"""compress end to end through Python: every file of the run folder is there, valid, and agrees with the others."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import edgeprune as ep
from edgeprune import pipeline
from edgeprune.device.measure import Schedule
from edgeprune.errors import BudgetError, DataError, ModelError, UnknownDevice, UsageError
from edgeprune.export import load_artifact
from edgeprune.graph.slim import fingerprint
from edgeprune.report import quantity
from edgeprune.result import Result
from tests.colours import SIDE, ColourNet, arrays, colour_data, colour_net, images, same, weights

EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)
BRIEF: Schedule = {"processes": 3, "min_runs": 20, "min_seconds": 0.02, "warmup_runs": 2, "warmup_seconds": 0.0}
FILES = ["artifacts.json", "log.txt", "model.onnx", "model.safetensors", "plan.json", "report.html", "report.md", "result.json", "run.json"]


@pytest.fixture(scope="module")
def model() -> ColourNet:
    """The user's network; no test may change it."""
    return colour_net()


@pytest.fixture(scope="module")
def weights_only(model: ColourNet, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Half the MACs by l1, no data, no epochs."""
    return ep.compress(model, EXAMPLE, budget=ep.Budget(macs=0.5), device="rpi4", out=tmp_path_factory.mktemp("weights") / "run")


@pytest.fixture(scope="module")
def trained(model: ColourNet, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A predicted latency by nuclear norm, batch norms recalibrated, one epoch."""
    limit = 0.96 * ep.predict(model, EXAMPLE, "rpi4").latency_ms.high
    return ep.compress(
        model,
        EXAMPLE,
        budget=ep.Budget(latency_ms=limit),
        device="rpi4",
        data=colour_data(),
        criterion="nuclear_norm",
        recipe=ep.Recipe(epochs=1, lr=0.05, batch_size=16, flip=False),
        out=tmp_path_factory.mktemp("trained") / "run",
        name="colours",
    )


@pytest.fixture(params=["weights_only", "trained"])
def run(request: pytest.FixtureRequest) -> Result:
    """Both finished runs."""
    found: Result = request.getfixturevalue(request.param)
    return found


def read(result: Result, name: str) -> Any:
    return json.loads((result.folder / name).read_text())


def budget_of(result: Result, name: str) -> dict[str, Any]:
    return next(b for b in result.facts["budgets"] if b["name"] == name)


def test_the_folder_holds_every_file_whole(run: Result) -> None:
    assert [name for name in FILES if not (run.folder / name).is_file()] == []
    assert not [p for p in run.folder.rglob("*") if "tmp" in p.name]
    onnx.checker.check_model(onnx.load(run.folder / "model.onnx"))
    assert read(run, "run.json")["status"] == "done"
    assert run.met


def test_the_files_agree(run: Result) -> None:
    plan = ep.Plan.from_json(read(run, "plan.json"))
    assert plan == run.plan
    assert read(run, "plan.json")["sha256"] == plan.sha256
    (artifact,) = read(run, "artifacts.json")
    assert artifact["sha256"] == hashlib.sha256((run.folder / "model.onnx").read_bytes()).hexdigest()
    assert artifact["size_bytes"] == (run.folder / "model.onnx").stat().st_size
    facts = read(run, "result.json")
    assert facts == json.loads(json.dumps(run.facts))
    assert facts["artifacts"][0]["sha256"] == artifact["sha256"]
    assert {g["name"]: g["kept"] for g in facts["groups"]} == {name: len(keep) for name, keep in plan.keep.items()}
    metadata = {p.key: p.value for p in onnx.load(run.folder / "model.onnx").metadata_props}
    assert metadata["plan_sha256"] == plan.sha256


def test_the_figures_are_those_of_the_network(run: Result, model: ColourNet) -> None:
    dense, small = ep.trace(model, EXAMPLE), ep.trace(run.model, EXAMPLE)
    figures = {f["name"]: (f["before"]["value"], f["after"]["value"]) for f in run.facts["figures"]}
    assert figures["macs"] == (dense.macs, small.macs)
    assert figures["params"] == (dense.params, sum(p.numel() for p in run.model.parameters()))
    assert small.macs < dense.macs


def test_the_saved_weights_give_the_artifacts_outputs(run: Result, model: ColourNet) -> None:
    rebuilt = ep.load(run.folder / "model.safetensors", model=ColourNet()).eval()
    x, _ = next(iter(colour_data().val.batches(8)))
    with torch.no_grad():
        expected, dense = rebuilt(x).numpy(), model(x).numpy()
    (got,) = load_artifact(run.folder / "model.onnx")(x.numpy())
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(got - dense).max() > 1e-2 * np.abs(dense).max()  # it is another network
    assert same(rebuilt.state_dict(), run.model.state_dict())


def test_the_users_network_is_untouched(run: Result, model: ColourNet) -> None:
    assert same(model.state_dict(), colour_net().state_dict())
    assert not any(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_report_holds_the_figures(run: Result) -> None:
    page, text = (run.folder / "report.html").read_text(), (run.folder / "report.md").read_text()
    for figure in run.facts["figures"]:
        assert quantity(figure["after"]["value"], figure["unit"]) in page, figure["name"]
    assert re.search("predicted, not measured", page)
    assert re.search("predicted, not measured", text)
    assert "Training loss" in text or not run.facts["curve"]


def test_half_the_macs_without_data(weights_only: Result, model: ColourNet) -> None:
    budget = budget_of(weights_only, "macs")
    assert budget["reached"] <= budget["asked"] == 0.5 * ep.trace(model, EXAMPLE).macs
    assert weights_only.facts["accuracy_steps"] == weights_only.facts["curve"] == []
    assert "accuracy" not in {f["name"] for f in weights_only.facts["figures"]}
    kept = {name: list(keep) for name, keep in weights_only.plan.keep.items()}
    assert same(weights(weights_only.folder / "model.safetensors"), ep.slim(model, ep.trace(model, EXAMPLE), ep.Plan(kept)).state_dict())  # type: ignore[arg-type]


def test_predicted_latency_with_data(trained: Result) -> None:
    budget = budget_of(trained, "latency_ms")
    assert budget["reached"] <= budget["asked"]
    assert budget["basis"] == "predicted"
    assert "predicted, not measured" in budget["how"]
    steps = trained.facts["accuracy_steps"]
    assert [s["step"] for s in steps] == ["dense", "right after pruning", "after reconstruction", "after fine-tuning"]
    assert ep.evaluate(trained.model, colour_data()).accuracy == steps[-1]["accuracy"]
    assert ep.evaluate(trained.folder / "model.onnx", colour_data()).accuracy == steps[-1]["accuracy"]
    assert [e["epoch"] for e in trained.facts["curve"]] == [1]
    accuracy = next(f for f in trained.facts["figures"] if f["name"] == "accuracy")
    assert accuracy["how"] == "top-1 on 30 validation images, by torch, after fine-tuning"


def test_what_went_in_is_in_the_manifest(trained: Result, model: ColourNet) -> None:
    manifest = read(trained, "run.json")
    assert manifest["inputs"] == {"model": fingerprint(model), "data": colour_data().fingerprint}
    asked = manifest["asked"]
    assert (asked["criterion"], asked["device"], asked["seed"], asked["recipe"]["epochs"]) == ("nuclear_norm", "rpi4-ort", 0, 1)
    assert set(manifest["versions"]) >= {"python", "edgeprune", "torch"}


def test_metadata_has_preprocessing_and_labels(tmp_path: Path, model: ColourNet) -> None:
    from PIL import Image

    x, y = images(24)
    for number, (image, label) in enumerate(zip(x, y, strict=True)):
        folder = tmp_path / "photos" / ("red", "green", "blue")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    data = ep.load_data(tmp_path / "photos", size=SIDE)
    result = ep.compress(
        model, EXAMPLE, budget=ep.Budget(macs=0.7), device="rpi4", data=data, recipe=ep.Recipe(epochs=0), out=tmp_path / "run"
    )
    metadata = {p.key: p.value for p in onnx.load(result.folder / "model.onnx").metadata_props}
    assert json.loads(metadata["labels"]) == ["blue", "green", "red"]
    assert json.loads(metadata["preprocessing"]) == data.preprocessing.to_json()
    assert [s["step"] for s in result.facts["accuracy_steps"]] == ["dense", "right after pruning", "after reconstruction"]
    accuracy = next(f for f in result.facts["figures"] if f["name"] == "accuracy")
    assert accuracy["how"].endswith("after reconstruction")


def test_this_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No word about speed: either the upper end of what was measured fits, or the answer is no."""
    monkeypatch.setattr(pipeline, "QUICK", BRIEF)
    monkeypatch.setattr(pipeline, "FULL", BRIEF)
    monkeypatch.setattr("edgeprune.choice.ROUNDS", 2)
    model, example = colour_net(), torch.zeros(1, 3, 64, 64)
    dense = ep.measure(ep.export(model, example, tmp_path / "dense.onnx").path, ep.device("host"), **BRIEF)
    asked = 0.8 * dense.latency_ms
    try:
        result = ep.compress(model, example, budget=ep.Budget(latency_ms=asked), device="host", out=tmp_path / "run")
    except BudgetError as error:
        assert re.search(r"rounds|floor", str(error))
        assert (tmp_path / "run" / "checkpoints" / "scores.safetensors").exists()
        return
    measured = read(result, "measurements.json")
    assert result.met == (measured["compressed"]["high_ms"] <= asked)
    budget = budget_of(result, "latency_ms")
    assert (budget["basis"], budget["reached"]) == ("measured", measured["compressed"]["high_ms"])
    assert measured["compressed"]["fingerprint"]["artifact_sha256"] == read(result, "artifacts.json")[0]["sha256"]
    assert any(r["high_ms"] <= asked for r in result.facts["rounds"])
    assert "predicted, not measured" not in budget["how"]


def test_several_limits_all_hold(tmp_path: Path, model: ColourNet) -> None:
    dense = ep.predict(model, EXAMPLE, "rpi4")
    budget = ep.Budget(
        macs=0.7, params=0.6, latency_ms=dense.latency_ms.high, energy_mj=dense.energy_mj.high if dense.energy_mj else None,
        size_bytes=0.9 * dense.size_bytes, peak_memory_bytes=dense.peak_memory_bytes,
    )  # fmt: skip
    result = ep.compress(model, EXAMPLE, budget=budget, device="rpi4", out=tmp_path / "run")
    names = ["latency_ms", "energy_mj", "macs", "params", "size_bytes", "peak_memory_bytes"]
    assert [b["name"] for b in result.facts["budgets"]] == names
    assert [b["name"] for b in result.facts["budgets"] if b["reached"] > b["asked"]] == []
    assert result.met


def test_unlabelled_images_are_enough_to_distil(tmp_path: Path, model: ColourNet) -> None:
    result = ep.compress(
        model,
        EXAMPLE,
        budget=ep.Budget(macs=0.6),
        device="rpi4",
        data=colour_data(labelled=False),
        criterion="nuclear_norm",
        recipe=ep.Recipe(epochs=1, batch_size=16),
        out=tmp_path / "run",
    )
    assert len(result.facts["curve"]) == 1
    assert result.facts["accuracy_steps"] == []


class NoNorms(nn.Module):
    """Nothing to recalibrate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 3)."""
        return self.b(torch.relu(self.a(x))).mean(dim=(2, 3))  # type: ignore[no-any-return]


def test_without_batch_norms_no_recalibration_is_claimed(tmp_path: Path) -> None:
    rest: dict[str, Any] = {"budget": ep.Budget(macs=0.6), "device": "rpi4", "data": colour_data(), "recipe": ep.Recipe(epochs=0)}
    result = ep.compress(NoNorms(), EXAMPLE, recover="bn", out=tmp_path / "bn", **rest)
    assert [s["step"] for s in result.facts["accuracy_steps"]] == ["dense", "right after pruning"]
    result = ep.compress(NoNorms(), EXAMPLE, out=tmp_path / "default", **rest)
    assert [s["step"] for s in result.facts["accuracy_steps"]] == ["dense", "right after pruning", "after reconstruction"]
    assert result.facts["criterion"] == "reconstruction"
    assert ep.compress(NoNorms(), EXAMPLE, out=tmp_path / "none", **rest | {"data": None}).facts["criterion"] == "l1"


def test_default_epochs_follow_the_data(tmp_path: Path, model: ColourNet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def stop(job: pipeline.Job) -> None:
        seen.append(job.recipe.epochs)
        raise UsageError("seen enough")

    monkeypatch.setattr("edgeprune.api._check", stop)
    for data in (None, colour_data(), colour_data(labelled=False)):
        with pytest.raises(UsageError, match="seen enough"):
            ep.compress(model, EXAMPLE, budget=ep.Budget(macs=0.5), data=data, out=tmp_path / "run")
    assert seen == [0, 3, 0]


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"recover": "magic"}, UsageError, "recover"),
    ({"seed": -1}, UsageError, "seed"),
    ({"criterion": "l3"}, UsageError, "'l3'"),
    ({"allocate": "greedy"}, UsageError, "'greedy'"),
    ({"search": {"cluster": "ray://x"}}, UsageError, "knapsack has no option cluster"),
    ({"formats": ("onnx", "tflight")}, UsageError, "'tflight'"),
    ({"formats": ()}, UsageError, "at least one format"),
    ({"round_to": 0}, UsageError, "round_to"),
    ({"device": "rpi9"}, UnknownDevice, "rpi9"),
    ({"recipe": ep.Recipe(epochs=1)}, DataError, "training images"),
    ({"data": ((images(12)[0], images(12)[1] + 2),) * 2}, DataError, "label 4"),
    ({"data": ((np.zeros((12, 9, 9, 3), np.uint8), images(12)[1]),) * 2}, DataError, r"\(3, 9, 9\)"),
    ({"data": "nowhere.npz"}, DataError, "nowhere.npz"),
]


@pytest.mark.parametrize(("options", "error", "words"), REFUSED, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_refused_before_anything_is_written(
    tmp_path: Path, model: ColourNet, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ep.compress(model, EXAMPLE, budget=ep.Budget(macs=0.5), out=tmp_path / "run", **{"device": "rpi4", **options})
    assert not list(tmp_path.iterdir())


def test_a_network_that_does_not_run(tmp_path: Path, model: ColourNet) -> None:
    with pytest.raises(ModelError, match="does not run"):
        ep.compress(model, torch.zeros(1, 4, SIDE, SIDE), budget=ep.Budget(macs=0.5), device="rpi4", out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_batch_of_examples_and_a_network_in_training_mode(tmp_path: Path) -> None:
    model = colour_net(dropout=0.5).train()
    before = copy.deepcopy(model.state_dict())
    result = ep.compress(model, torch.zeros(4, 3, SIDE, SIDE), budget=ep.Budget(macs=0.5), device="rpi4", out=tmp_path / "run")
    assert model.training
    assert same(model.state_dict(), before)
    assert not result.model.training
    (shape,) = [list(i.type.tensor_type.shape.dim) for i in onnx.load(result.folder / "model.onnx").graph.input]
    assert [d.dim_value for d in shape[1:]] == [3, SIDE, SIDE]


def test_evaluate_reads_what_load_data_reads(tmp_path: Path, model: ColourNet) -> None:
    np.savez(tmp_path / "d.npz", allow_pickle=False, **arrays())
    assert ep.evaluate(model, tmp_path / "d.npz") == ep.evaluate(model, colour_data())


def test_predict_is_larger_for_the_dense_network(weights_only: Result, model: ColourNet) -> None:
    dense, small = ep.predict(model, EXAMPLE, "rpi4"), ep.predict(weights_only.model, EXAMPLE, ep.device("rpi4"))
    assert small.latency_ms.value < dense.latency_ms.value
    assert "predicted, not measured" in dense.basis
