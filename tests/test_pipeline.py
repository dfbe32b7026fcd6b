"""Stages: what a change makes new, how the loop of measuring and correcting ends, and what survives a kill."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import edgeprune as ep
from edgeprune.choice import CLOSE_ENOUGH, Choice, Chooser
from edgeprune.cli import main
from edgeprune.device.cost import predict_graph
from edgeprune.device.energy import Energy
from edgeprune.device.measure import Measurement
from edgeprune.errors import BudgetError, DataError, DeviceError, UsageError
from edgeprune.graph.slim import fingerprint
from edgeprune.pipeline import Job, Pipeline
from edgeprune.plan import Scores
from edgeprune.result import Result
from edgeprune.run import Run
from edgeprune.train import silent
from edgeprune.widths import WidthRules
from tests.colours import FACTORY, SIDE, colour_data, colour_net, images, same, weights, write_npz, write_weights

EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)
LARGE = torch.zeros(1, 3, 64, 64)  # so large that arithmetic, not the calls, decides the predicted latency
STAGES = [
    "trace",
    "accuracy dense",
    "score",
    "allocate",
    "prove",
    "accuracy right after pruning",
    "reconstruct",
    "accuracy after reconstruction",
    "finetune",
    "accuracy after fine-tuning",
    "export",
]


def compress(out: Path, *, resume: bool = False, model: nn.Module | None = None, **options: Any) -> Result:
    """A run of a second or two that passes every stage of a device that is not attached."""
    chosen: dict[str, Any] = {
        "budget": ep.Budget(macs=0.5),
        "device": "rpi4",
        "data": colour_data(),
        "recipe": ep.Recipe(epochs=2, lr=0.05, batch_size=16),
        **options,
    }
    return ep.compress(model or colour_net(), EXAMPLE, out=out, resume=resume, **chosen)


def stages(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())["stages"]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(tmp_path_factory.mktemp("finished") / "run").folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to resume."""
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "run"))


def recomputed(before: dict[str, Any], folder: Path) -> list[str]:
    """The stages that were computed again: a stage's seconds are never measured alike twice, its key may be."""
    log = (folder / "log.txt").read_text().rpartition("resumed:")[2].splitlines()[1:]
    told = [line.split(" ", 1)[1].partition(":") for line in log]
    assert {name for name, _, what in told if "read back" in what} <= before.keys()
    return [name for name, _, what in told if what.endswith(" s")]


def test_the_order_of_the_stages(finished: Path) -> None:
    assert list(stages(finished)) == STAGES


def test_a_finished_run_is_read_back(again: Path) -> None:
    before, result, files = stages(again), (again / "result.json").read_text(), weights(again / "model.safetensors")
    artifact = (again / "model.onnx").stat().st_mtime_ns
    second = compress(again, resume=True)
    assert recomputed(before, again) == []
    assert stages(again) == before
    assert (again / "model.onnx").stat().st_mtime_ns == artifact
    assert same(weights(again / "model.safetensors"), files)
    first, later = json.loads(result), json.loads((again / "result.json").read_text())
    assert [stage["cached"] for stage in later["stages"]] == [True] * len(before)
    for words in (first, later):
        words["stages"] = [{**stage, "cached": True} for stage in words["stages"]]
    assert first == later
    assert same(second.model.state_dict(), {**second.model.state_dict(), **files})


CHANGES: list[tuple[dict[str, Any], str | None]] = [
    ({"recipe": ep.Recipe(epochs=1, lr=0.05, batch_size=16)}, "finetune"),
    ({"recover": "none"}, "finetune"),
    ({"budget": ep.Budget(macs=0.6)}, "allocate"),
    ({"round_to": 4}, "allocate"),
    ({"device": "host"}, "allocate"),
    ({"allocate": "uniform"}, "allocate"),
    ({"criterion": "nuclear_norm"}, "score"),
    ({"seed": 1}, "score"),
    ({"data": colour_data(val=33)}, "accuracy dense"),
    ({"model": colour_net(dropout=0.5)}, "trace"),
]


@pytest.mark.parametrize(("options", "first"), CHANGES, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_a_change_recomputes_what_depends_on_it(again: Path, options: dict[str, Any], first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only up to the artifact: exporting and measuring take long and are the last ones anyway."""
    before = stages(again)
    monkeypatch.setattr(Pipeline, "exported", _stop)
    with pytest.raises(Stop):
        compress(again, resume=True, **options)
    new = recomputed(before, again)
    expected = STAGES[STAGES.index(first) : STAGES.index("export")]
    assert new == [name for name in expected if options.get("recover") != "none" or "recalib" not in name]


class Stop(Exception):
    """The test has seen enough."""


def _stop(*_: object) -> Any:
    raise Stop


def test_a_changed_file_is_made_again(again: Path) -> None:
    before = stages(again)
    (again / "checkpoints" / "finetune.safetensors").write_bytes(b"something else")
    result = compress(again, resume=True)
    assert recomputed(before, again) == ["finetune"]
    assert same(result.model.state_dict(), {**result.model.state_dict(), **weights(again / "checkpoints" / "finetune.safetensors")})


def test_an_existing_run_is_not_overwritten(again: Path) -> None:
    before = (again / "run.json").read_text()
    with pytest.raises(UsageError, match="--resume"):
        compress(again)
    assert (again / "run.json").read_text() == before


def test_two_processes_refuse_each_other(again: Path) -> None:
    with Run.open(again, asked={}, command=["another"], resume=True), pytest.raises(UsageError, match="in use by another run"):
        compress(again, resume=True)


def test_a_refused_process_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process makes the folder between our look and our lock."""
    plain = Run.open
    others: list[Run] = []

    def open_late(folder: Path, **options: Any) -> Run:
        if not others:
            others.append(plain(folder, asked={}, command=["another"]))
        return plain(folder, **options)

    monkeypatch.setattr(Run, "open", open_late)
    with pytest.raises(UsageError, match="in use by another run"):
        compress(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").exists()
    others[0].close()


def test_a_fingerprint_is_of_weights_and_layers() -> None:
    model = colour_net()
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == fingerprint(colour_net())
    moved, strided, other = colour_net(), colour_net(), nn.Sequential(colour_net())
    moved.head.bias.data[0] += 1e-6
    strided.c.stride = (1, 1)
    assert len({fingerprint(m) for m in (model, moved, strided, other)}) == 4


def test_a_checkpoint_of_another_start_is_not_taken(tmp_path: Path) -> None:
    """Killed after an epoch, then resumed without recalibration: training begins from other weights, so from the beginning."""
    expected = compress(tmp_path / "whole", recover="none")

    def killed(what: str, done: int, total: int) -> None:
        if what == "fine-tuning" and done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        compress(tmp_path / "killed", progress=killed)
    assert list((tmp_path / "killed" / "checkpoints" / "epochs").iterdir())
    resumed = compress(tmp_path / "killed", resume=True, recover="none")
    assert same(resumed.model.state_dict(), expected.model.state_dict())


class Scripted:
    """A board that says what the test wants: milliseconds as a function of the share of MACs that is left, one factor per round.

    Energy is what `net_w` draws meanwhile, trials 2 % apart; memory grows by `runtime_bytes` and twice what is predicted.
    """

    def __init__(self, *, dense_ms: float, factors: list[float], net_w: float | None = None, runtime_bytes: int = 0) -> None:
        self.dense_ms = dense_ms
        self.factors = iter(factors)
        self.net_w = net_w
        self.runtime_bytes = runtime_bytes

    def __call__(self, pipe: Pipeline, name: str, model: nn.Module) -> Measurement:
        factor = 1.0 if name == "dense" else next(self.factors)
        graph = ep.trace(model, LARGE)
        median = self.dense_ms * graph.macs / pipe.graph.macs * factor
        memory = self.runtime_bytes and self.runtime_bytes + 2 * predict_graph(graph, None, ep.device("host")).peak_memory_bytes
        return Measurement(
            latency_ms=median, low_ms=0.99 * median, high_ms=1.01 * median, min_ms=median, p90_ms=median, p99_ms=median, first_ms=median,
            load_ms=1.0, peak_memory_bytes=1, runs=60, outliers=0, process_medians_ms=(median,) * 3, threads=1, fingerprint={},
            energy=spent(self.net_w * median) if self.net_w else None, network_memory_bytes=memory,
        )  # fmt: skip


def spent(net_mj: float) -> Energy:
    return Energy(
        total_mj=2 * net_mj, total_low_mj=net_mj, total_high_mj=3 * net_mj, net_mj=net_mj, net_low_mj=0.98 * net_mj,
        net_high_mj=1.02 * net_mj, calibrated_mj=None, active_mw=1.0, idle_mw=1.0, source="scripted", scope="board", trials=3, samples=20,
    )  # fmt: skip


def host_job(budget: ep.Budget) -> Job:
    return Job(
        name="x", model=colour_net(), example_inputs=(LARGE,), budget=budget, device=ep.device("host"),
        data=None, criterion="l1", allocator="knapsack", recipe=ep.Recipe(epochs=0), recover="bn", rules=WidthRules(round_to=1),
        formats=("onnx",), seed=0, calibration_images=1,
    )  # fmt: skip


@pytest.fixture
def choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Scripted, ep.Budget], Choice]]:
    """What a fresh job for the host chooses, with a scripted board."""

    def run(board: Scripted, budget: ep.Budget) -> Choice:
        monkeypatch.setattr(Pipeline, "measured", lambda *words, **_: board(*words))
        with Run.open(tmp_path / "run", asked={}, command=[]) as folder:
            pipe = Pipeline(host_job(budget), folder, silent)
            return Chooser(pipe, pipe.scores()).choose(budget)

    yield run


@pytest.fixture
def loop(choose: Callable[[Scripted, ep.Budget], Choice]) -> Callable[[Scripted, float], Choice]:
    """The same for a latency budget: loop(board, asked_ms)."""
    return lambda board, asked_ms: choose(board, ep.Budget(latency_ms=asked_ms))


@pytest.mark.parametrize(("asked_ms", "processes"), [(10.2, [3]), (9.9, [3, 9])])
def test_a_limit_that_seems_missed_is_measured_longer(
    asked_ms: float, processes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10.1 ms whoever measures: the longer measurement counts where it is taken, be it lower or not."""
    taken: list[int] = []

    def measured(path: Path, device: Any, **schedule: Any) -> Measurement:
        taken.append(schedule["processes"])
        return replace(Scripted(dense_ms=10.0, factors=[1.0])(pipe, "dense", colour_net()), runs=len(taken))

    monkeypatch.setattr(Pipeline, "measured", lambda self, name, model, **_: Scripted(dense_ms=10.0, factors=[])(self, name, model))
    monkeypatch.setattr("edgeprune.pipeline.measure", measured)
    with Run.open(tmp_path / "run", asked={}, command=[]) as folder:
        pipe = Pipeline(host_job(ep.Budget(latency_ms=asked_ms)), folder, silent)
        artifact = ep.export(colour_net(), LARGE, tmp_path / "m.onnx")
        assert pipe.measurements(artifact)["compressed"].runs == len(processes)
    assert taken == processes


def test_an_energy_budget_is_corrected_until_its_highest_trial_fits(choose: Callable[[Scripted, ep.Budget], Choice]) -> None:
    """Dense: 10 ms at 3 W, 30 mJ. No power figure of any card has a say."""
    choice = choose(Scripted(dense_ms=10.0, factors=[1.5, 1.5, 1.5, 1.5, 1.5], net_w=3.0), ep.Budget(energy_mj=18.0))
    readings = [r.others[0] for r in choice.rounds]
    assert {r.name for r in readings} == {"energy_mj"}
    assert readings[0].high > 18.0 >= readings[-1].high >= CLOSE_ENOUGH * 18.0
    assert readings[-1].high == pytest.approx(1.02 * readings[-1].measured)
    assert readings[-1].predicted == pytest.approx(readings[-1].high, rel=0.05)
    assert Choice.of(json.loads(json.dumps(choice.facts())), choice.plan.to_json()).rounds == choice.rounds


def test_a_memory_budget_is_corrected_for_what_the_runtime_takes(choose: Callable[[Scripted, ep.Budget], Choice]) -> None:
    model, device = colour_net(), ep.device("host")
    graph = ep.trace(model, LARGE)
    dense = 20e6 + 2 * predict_graph(graph, None, device).peak_memory_bytes
    asked = dense - 300e3
    choice = choose(Scripted(dense_ms=10.0, factors=[1.0] * 5, runtime_bytes=20_000_000), ep.Budget(peak_memory_bytes=asked))
    readings = [r.others[0] for r in choice.rounds]
    assert any(r.high <= asked < dense for r in readings)
    kept = predict_graph(graph, choice.plan.widths(graph), device).peak_memory_bytes
    assert kept > (asked - 20e6) / 2 - 0.01 * asked  # half a percent for noise, and steps of a channel


def test_of_several_limits_all_are_measured(choose: Callable[[Scripted, ep.Budget], Choice]) -> None:
    budget = ep.Budget(latency_ms=8.0, energy_mj=12.0, macs=0.9)
    choice = choose(Scripted(dense_ms=10.0, factors=[1.0] * 5, net_w=3.0), budget)
    assert choice.rounds[-1].high_ms <= 8.0
    assert CLOSE_ENOUGH * 12.0 <= choice.rounds[-1].others[0].high <= 12.0


def test_what_cannot_be_reached_names_the_nearest_and_what_to_ask_for(choose: Callable[[Scripted, ep.Budget], Choice]) -> None:
    board = Scripted(dense_ms=10.0, factors=[1.0] * 5, runtime_bytes=20_000_000)
    with pytest.raises(BudgetError, match="where 15 MB was asked") as error:
        choose(board, ep.Budget(peak_memory_bytes=15e6))
    found = re.search(r"took (\S+) MB.*--peak-memory-mb (\S+)\.", str(error.value))
    assert found and 20 < float(found[1]) < float(found[2]) < 1.1 * float(found[1])


def test_what_the_board_does_not_measure_is_no_budget(choose: Callable[[Scripted, ep.Budget], Choice]) -> None:
    with pytest.raises(DeviceError, match="energy_mj could not be measured"):
        choose(Scripted(dense_ms=10.0, factors=[1.0] * 5), ep.Budget(energy_mj=12.0))


def test_the_loop_ends_inside_the_budget(loop: Callable[[Scripted, float], Choice]) -> None:
    """A board that slows down by more than its network shrinks: corrected until it fits, and no round once it is close."""
    choice = loop(Scripted(dense_ms=10.0, factors=[1.5, 1.5, 1.5, 1.5, 1.5]), 6.0)
    fitting = [r.high_ms for r in choice.rounds if r.high_ms <= 6.0]
    model = colour_net()
    graph = ep.trace(model, LARGE)
    share = ep.trace(ep.slim(model, graph, choice.plan), LARGE).macs / graph.macs
    assert choice.rounds[0].high_ms > 6.0
    assert [r.round for r in choice.rounds] == list(range(1, len(choice.rounds) + 1))
    assert max(fitting) == pytest.approx(1.01 * 1.5 * 10.0 * share)
    assert not [high for high in fitting[:-1] if high >= CLOSE_ENOUGH * 6.0]


def test_the_loop_keeps_what_fitted(loop: Callable[[Scripted, float], Choice]) -> None:
    """A first plan that is faster than asked by far, then nothing but disturbed measurements: the first plan it is."""
    choice = loop(Scripted(dense_ms=10.0, factors=[0.75, 1e5, 1e5, 1e5, 1e5]), 6.0)
    assert [r.high_ms <= 6.0 for r in choice.rounds] == [True, False]
    assert choice.correction < 100


def test_what_the_prediction_holds_impossible_is_measured(loop: Callable[[Scripted, float], Choice]) -> None:
    """The floor as predicted is above 0.4 ms; the board says otherwise."""
    choice = loop(Scripted(dense_ms=10.0, factors=[1.0, 1.0, 1.0, 1.0, 1.0]), 0.4)
    assert choice.rounds[0].predicted_ms > 0.4 >= choice.rounds[0].high_ms
    assert any(r.high_ms <= 0.4 for r in choice.rounds)


def test_the_loop_gives_up_with_the_fastest(loop: Callable[[Scripted, float], Choice]) -> None:
    with pytest.raises(BudgetError, match=r"floor|fastest took"):
        loop(Scripted(dense_ms=10.0, factors=[3.0, 9.0, 27.0, 81.0, 243.0]), 6.0)


@pytest.mark.parametrize("resume", [False, True])
def test_scores_outlive_a_budget_that_no_plan_meets(resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is attached that is known after scoring only; the next budget goes on in the same folder."""
    board = Scripted(dense_ms=10.0 / 64, factors=[1.0] * 40)  # 64 times the MACs of what is compressed here: 10 ms
    monkeypatch.setattr(Pipeline, "measured", lambda *words, **_: board(*words))
    monkeypatch.setattr(Pipeline, "measurements", lambda *_: {})
    folder = tmp_path / "run"
    options: dict[str, Any] = {"device": "host", "recipe": ep.Recipe(epochs=0)}
    with pytest.raises(BudgetError):
        compress(folder, budget=ep.Budget(latency_ms=0.001), **options)
    kept = stages(folder)
    assert list(kept) == ["trace", "accuracy dense", "score"]
    compress(folder, budget=ep.Budget(latency_ms=9.0), resume=resume, **options)
    assert {name: stages(folder)[name] for name in kept} == kept and "export" in stages(folder)
    assert "score: read back" in (folder / "log.txt").read_text()
    with pytest.raises(UsageError, match="already holds a run"):
        compress(folder, budget=ep.Budget(latency_ms=8.0), **options)


@pytest.mark.parametrize(("budget", "quantize"), [(ep.Budget(macs=0.001), "none"), (ep.Budget(size_bytes=900), "int8")])
def test_what_no_widths_meet_is_known_before_anything_is_paid_for(budget: ep.Budget, quantize: str, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(BudgetError, match="the floor is") as refused:
        compress(tmp_path / "run", budget=budget, quantize=quantize, progress=lambda what, *_: told.append(what))
    assert refused.value.plan and not told and not (tmp_path / "run").exists()
    assert ("0.0009 MB in int8" in str(refused.value)) == (quantize == "int8")


def test_the_loop_needs_no_pruning_where_the_dense_network_fits(loop: Callable[[Scripted, float], Choice]) -> None:
    choice = loop(Scripted(dense_ms=1.0, factors=[1.0]), 6.0)
    assert len(choice.rounds) == 1
    assert {len(keep) for keep in choice.plan.keep.values()} == {16, 32}


def test_widths_are_in_the_order_of_the_groups() -> None:
    graph = ep.trace(colour_net(), EXAMPLE)
    scores = Scores("x", {g.name: np.arange(g.channels, dtype=float) for g in graph.groups})
    plan = ep.Plan.from_widths(graph, {g.name: n for n, g in enumerate(graph.groups, 3)}, scores)
    backwards = ep.Plan(dict(reversed([*plan.keep.items()])))
    assert plan.widths(graph).tolist() == backwards.widths(graph).tolist() == list(range(3, 3 + len(graph.groups)))
    assert ep.Plan({}).widths(graph).tolist() == [g.channels for g in graph.groups]


# A real process, really killed.

EPOCHS = 40  # of about 50 ms: time enough to be hit in the middle


def words(folder: Path) -> list[str]:
    """The command of all runs below; `folder` holds its inputs."""
    text = f"compress net.pt --model {FACTORY} --data data.npz --device rpi4 --macs 0.5 --epochs {EPOCHS} --lr 0.02 --batch-size 16"
    return [sys.executable, "-m", "edgeprune", *text.split(), "--seed", "3", "--out", str(folder)]


def start(folder: Path, inputs: Path, *more: str, limit_kib: int | None = None) -> subprocess.Popen[str]:
    """The checkout under test, with as many threads as here; no file may grow beyond the limit."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    limited = ["bash", "-c", f'ulimit -f {limit_kib}; exec "$@"', "bash"] if limit_kib else []
    command = [*limited, *words(folder), *more]
    return subprocess.Popen(command, cwd=inputs, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_weights(folder / "net.pt")
    write_npz(folder / "data.npz")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(inputs: Path) -> Path:
    finish(inputs / "whole", inputs)
    return inputs / "whole"


def finish(folder: Path, inputs: Path, *more: str) -> None:
    """The same command in this process, to its end."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(inputs)
        patch.setattr(sys, "argv", ["edgeprune", *words(folder)[3:], *more])
        main()
    assert not end.value.code


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("moment", "with_signal"),
    [("an epoch is done", signal.SIGKILL), ("layers are refitted", signal.SIGKILL), ("an epoch is done", signal.SIGINT)],
    ids=["kill", "kill-before-the-first-checkpoint", "ctrl-c"],
)
def test_resume_after_a_signal(moment: str, with_signal: signal.Signals, inputs: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log, epochs = folder / "log.txt", folder / "checkpoints" / "epochs"
    moments = {
        "an epoch is done": lambda: epochs.is_dir() and any(epochs.glob("epoch-*.safetensors")),
        "layers are refitted": lambda: log.is_file() and "reconstruct:" in log.read_text(),
    }
    process = start(folder, inputs)
    wait_for(moments[moment], process)
    process.send_signal(with_signal)
    output, errors = process.communicate(timeout=60)
    assert "finetune" not in stages(folder), "the signal came too late to test anything"
    assert not (folder / "model.safetensors").exists()
    assert output == ""
    if with_signal == signal.SIGINT:
        assert process.returncode == 130
        assert f"--resume --out {folder}" in " ".join(errors.split())
        assert "Traceback" not in errors
        assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    else:
        assert process.returncode == -signal.SIGKILL
    finish(folder, inputs, "--resume")
    assert same(weights(folder / "model.safetensors"), weights(uninterrupted / "model.safetensors"))
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    assert [p.name for p in folder.rglob("*") if "tmp" in p.name] == []
    curve, expected = (json.loads((f / "result.json").read_text())["curve"] for f in (folder, uninterrupted))
    assert [e["train_loss"] for e in curve] == [e["train_loss"] for e in expected]


def epochs(folder: Path) -> set[int]:
    """The checkpoints that are there."""
    return {int(p.stem[-4:]) for p in folder.rglob("epoch-*.safetensors")}


@pytest.mark.slow
def test_twelve_kills_at_random_moments(inputs: Path, tmp_path: Path) -> None:
    """Every other one in the training, the others soon after the start; the weights are those of a run that was left alone."""
    folder, more, dice, killed = tmp_path / "run", ("--epochs", "80", "--ema-decay", "0.9"), random.Random(7), 0
    finish(tmp_path / "whole", inputs, *more)
    log, done = folder / "log.txt", set[int]()
    while killed < 12:
        begun = (log.read_text().count("ed: edgeprune") if log.is_file() else 0) + 1
        before = epochs(folder) if killed % 2 else None

        def there(begun: int = begun, before: set[int] | None = before) -> bool:
            started = log.is_file() and log.read_text().count("ed: edgeprune") == begun
            return started and (before is None or bool(epochs(folder) - before))

        process = start(folder, inputs, *more, *(["--resume"] if (folder / "run.json").is_file() else []))
        wait_for(there, process)
        time.sleep(dice.uniform(0, 0.3))
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, "it finished before the last kill"
        killed += 1
        done |= epochs(folder)
    finish(folder, inputs, *more, "--resume")
    assert len(done) > 2, "hardly a kill in the training"
    assert same(weights(folder / "model.safetensors"), weights(tmp_path / "whole" / "model.safetensors"))
    curves = [json.loads((f / "result.json").read_text())["curve"] for f in (folder, tmp_path / "whole")]
    assert [e["train_loss"] for e in curves[0]] == [e["train_loss"] for e in curves[1]]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 150 kB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150k", "none", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_with_a_paragraph_and_can_be_resumed(tiny_disk: Path, inputs: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tiny_disk / "run"
    process = start(folder, inputs)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in errors) == (1, False), errors
    assert "no space left" in " ".join(errors.split())
    assert "--resume" in errors
    subprocess.run(["mount", "-o", "remount,size=20m", str(tiny_disk)], check=True)
    assert not list(folder.rglob(".*tmp"))
    finish(folder, inputs, "--resume")
    assert same(weights(folder / "model.safetensors"), weights(uninterrupted / "model.safetensors"))


def test_a_file_that_may_not_grow_ends_with_a_paragraph(inputs: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """The first checkpoint, which holds weights and momentum, is larger than all that is written before it."""
    folder = tmp_path / "run"
    process = start(folder, inputs, limit_kib=40)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in errors) == (2, False), errors
    assert "cannot be written (File too large)" in " ".join(errors.split())
    assert "reconstruct" in stages(folder)
    finish(folder, inputs, "--resume")
    assert same(weights(folder / "model.safetensors"), weights(uninterrupted / "model.safetensors"))


def test_a_lost_data_folder_ends_with_a_paragraph_and_can_be_resumed(tmp_path: Path) -> None:
    """Photos on a disk that is pulled out in the second epoch, and put back."""
    for part, count in (("train", 48), ("val", 12)):
        for n, (x, y) in enumerate(zip(*images(count, seed=count), strict=True)):
            file = tmp_path / "photos" / part / f"class{y}" / f"{n:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(file)

    def pulled_out(what: str, done: int, total: int) -> None:
        if what == "fine-tuning" and done == 4 and (tmp_path / "photos").exists():
            (tmp_path / "photos").rename(tmp_path / "away")

    def run(out: str, **options: Any) -> Result:
        return compress(tmp_path / out, data=ep.load_data(tmp_path / "photos", size=SIDE), **options)

    whole = run("whole")
    with pytest.raises(DataError, match=r"image .* cannot be read"):
        run("lost", progress=pulled_out)
    assert list((tmp_path / "lost" / "checkpoints" / "epochs").glob("epoch-0001*"))
    (tmp_path / "away").rename(tmp_path / "photos")
    assert same(run("lost", resume=True).model.state_dict(), whole.model.state_dict())
