"""The verbs of the library: compress, predict, evaluate. A run reads top to bottom in `_stages`."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import report
from edgeprune.allocate import check_options
from edgeprune.choice import must_be_reachable
from edgeprune.data import Data, load_data
from edgeprune.device.card import Device
from edgeprune.device.card import device as find_device
from edgeprune.device.connection import connect
from edgeprune.device.cost import Cost, predict_graph
from edgeprune.device.measure import artifact, take_turn
from edgeprune.device.parity import runner_on
from edgeprune.errors import DataError, EdgepruneError, TraceError, UsageError
from edgeprune.export import load_artifact
from edgeprune.export import require as require_formats
from edgeprune.graph.running import evaluating, single_sample
from edgeprune.graph.slim import fingerprint, slim
from edgeprune.graph.trace import trace
from edgeprune.load import user_code
from edgeprune.pipeline import Job, Pipeline
from edgeprune.plan import Budget
from edgeprune.quantize import check_way
from edgeprune.registry import find
from edgeprune.result import Findings, Result, comparison, facts, stages
from edgeprune.rounds import after, last_round, overall
from edgeprune.run import Run, Team, default_folder, write_json
from edgeprune.train import Progress, Recipe, silent
from edgeprune.train.evaluate import Accuracy, accuracy_of, logits_of, settled
from edgeprune.train.evaluate import evaluate as evaluate_module
from edgeprune.train.processes import processes
from edgeprune.widths import DEFAULT_RULES, WidthRules

RECOVERIES = {"none": "", "bn": "after BN recalibration", "reconstruct": "after reconstruction"}


def compress(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    *,
    budget: Budget | Sequence[Budget],
    device: str | Device = "host",
    data: Any = None,
    criterion: str | None = None,
    allocate: str = "knapsack",
    recipe: Recipe | None = None,
    recover: str | None = None,
    quantize: str = "none",
    round_to: int | None = None,
    min_channels: int = DEFAULT_RULES.min_channels,
    max_remove: float = DEFAULT_RULES.max_remove,
    keep_dense: Sequence[str] = DEFAULT_RULES.keep_dense,
    search: Mapping[str, Any] | None = None,
    formats: Sequence[str] = ("onnx",),
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    rounds: int = 1,
    calibration_images: int = 512,
    name: str | None = None,
    notes: Sequence[str] = (),
    command: Sequence[str] = ("edgeprune.compress",),
    progress: Progress = silent,
) -> Result:
    """A smaller network that meets the budget on the device, with artifact, evidence and report in a run folder.

    `model` is left as it was; `example_inputs` is a tensor or the forward's positional arguments. Several budgets: one search, and a run
    folder inside `out` for each (`parts` of the result, in their order; the result itself is that of the first, its report compares all).
    `data`: whatever `load_data` takes, or Data; None: no accuracy, no recalibration, no training, and only criteria that read weights.
    `criterion` None: reconstruction where there are training images, l1 otherwise. `recipe` None: the preset quick where these have
    labels, no training otherwise. `recover` None: reconstruct. `quantize`: none, int8 or mixed (int8 where this machine runs it
    faster), calibrated on training images, else on validation ones. `round_to`, `min_channels`, `max_remove`, `keep_dense`: which widths
    a plan may choose, see WidthRules (`round_to` None: what the device's staircase or card says). `search`: options of the allocator,
    such as search_minutes, jobs and cluster. `rounds`: how often to prune and recover, see rounds.py. `out`: the run folder (default
    runs/<name>-<device>); `resume` goes on with the run in it, and stages whose inputs are unchanged are read back; so they are in the
    folder of a run that failed before it had a plan.
    Raises BudgetError when no plan meets the budget, and the other errors of errors.py.
    """
    budgets = _budgets(budget)
    _check_numbers(seed, rounds)
    target = device if isinstance(device, Device) else find_device(device)
    source = data if isinstance(data, Data) or data is None else load_data(data, seed=seed)
    recipe = recipe or Recipe.preset("quick", **({} if trainable(source) else {"epochs": 0}))
    job = Job(
        name=name or type(model).__name__.lower(),
        model=model,
        example_inputs=single_sample(example_inputs),
        budget=budgets[0],
        device=target,
        data=source,
        criterion=criterion or default_criterion(source),
        allocator=allocate,
        recipe=recipe,
        recover=recover or "reconstruct",
        rules=WidthRules(round_to=_multiple(target, round_to), min_channels=min_channels, max_remove=max_remove, keep_dense=keep_dense),
        formats=tuple(formats),
        quantize=quantize,
        seed=seed,
        calibration_images=calibration_images,
        notes=tuple(notes),
        rounds=rounds,
        search=dict(search or {}),
    )
    _check(job)
    team = processes()
    folder = team.told(Path(out) if out else default_folder(job.name, target.name))
    return _run(job, budgets, folder, list(command), resume=resume, team=team, progress=progress)


def _budgets(budget: Budget | Sequence[Budget]) -> tuple[Budget, ...]:
    budgets = (budget,) if isinstance(budget, Budget) else tuple(budget)
    if len(set(budgets)) < max(1, len(budgets)):
        raise UsageError(f"budgets must be different and at least one, got {len(budgets)} of which {len(set(budgets))} differ.")
    return budgets


def _run(job: Job, budgets: Sequence[Budget], folder: Path, command: list[str], *, resume: bool, team: Team, progress: Progress) -> Result:
    new, ours = not folder.exists(), None
    resume = resume or team.told(_without_plan(folder))
    try:
        with _opened(job, folder, command, resume=resume, team=team, asked=[b.limits() for b in budgets]) as run:
            ours = run.manifest["stages"] if new and run.leads else None
            if len(budgets) > 1:
                return _several(job, budgets, run, command, progress)
            return _stages(Pipeline(job, run, progress), shlex.join(command))
    except EdgepruneError as error:
        if ours is not None and ours.keys() <= {"trace"} and error.exit_code != EdgepruneError.exit_code:
            shutil.rmtree(folder, ignore_errors=True)  # nothing to go on from, unlike where a disk was full
        raise


def _without_plan(folder: Path) -> bool:
    """Whether a run in it failed before it had a plan: another loses nothing by going on there, and may read its scores back."""
    try:
        failed = json.loads((folder / "run.json").read_bytes())["status"] == "failed"
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return failed and not any(folder.rglob("plan*.json"))


def _opened(job: Job, folder: Path, command: list[str], *, resume: bool, team: Team, asked: Sequence[Mapping[str, float]]) -> Run:
    words = _asked(job) | {"budget": asked[0] if len(asked) == 1 else list(asked)}
    run = Run.open(folder, asked=words, command=command, resume=resume, team=team)
    run.record("inputs", {"model": fingerprint(job.model), "data": job.data.fingerprint if job.data else None})
    return run


def _several(job: Job, budgets: Sequence[Budget], run: Run, command: list[str], progress: Progress) -> Result:
    """What the budgets share in the folder of `run`, then a run of its own for each in a folder inside, named by the budget."""
    shared = Pipeline(job, run, progress)
    _check_plans(shared, budgets)
    given: dict[str, Any] = {"trace": shared.graph, "accuracy dense": shared.accuracy("dense", job.model), "score": shared.scores()}
    chosen: list[dict[str, Any]] = [{} for _ in budgets]
    if job.rounds == 1:  # in several rounds the networks that are searched depend on the budget
        chosen = [{"allocate": choice} for choice in shared.choose_all(given["score"], budgets)]
    parts = []
    for budget, own in zip(budgets, chosen, strict=True):
        part, folder = replace(job, budget=budget), run.path(budget.label)
        resume = run.team.told((folder / "run.json").exists())
        with _opened(part, folder, command, resume=resume, team=run.team, asked=[budget.limits()]) as inner:
            parts.append(_stages(Pipeline(part, inner, progress, given=given | own), shlex.join(command)))
    facts_of = {part.folder.name: part.facts for part in parts}
    title = f"{parts[0].facts['title']}: {len(parts)} budgets"
    compared = comparison(facts_of, title=title, created=run.manifest["created"], command=shlex.join(command))
    compared["stages"] = stages(run.manifest, run.used)  # those that the parts share
    if run.leads:
        write_json(run.path("result.json"), compared)
        report.write(compared, run.folder)
    return Result(run.folder, parts[0].model, parts[0].plan, compared, tuple(parts))


def trainable(data: Data | None) -> bool:
    """Whether there are labelled training images: without, nothing is trained unless it is asked for."""
    return bool(data and len(data.train) and data.train.labelled)


def default_criterion(data: Data | None) -> str:
    """The best one measured (benchmarks/criteria.py) where there are training images to look at, weights alone otherwise."""
    return "reconstruction" if data and len(data.train) else "l1"


def _multiple(target: Device, round_to: int | None) -> int:
    return target.channel_multiple if round_to is None else round_to


def _stages(first: Pipeline, command: str) -> Result:
    """The main job: from the dense network to the artifact and its report, in the order in which things happen."""
    job, run, graph = first.job, first.run, first.graph
    _check_plans(first, (job.budget,))
    accuracies = {"dense": first.accuracy("dense", job.model)}
    stages, curve = last_round(first)
    with run.inside(stages.part):
        scores = stages.scores()
        choice = stages.choose(scores)
    small = settled(slim(stages.job.model, stages.graph, choice.plan))
    proof = stages.proof(small, choice.plan)
    accuracies["right after pruning"] = stages.accuracy("right after pruning", small)
    if (recovered := stages.recovered(small, choice.plan)) is not small:
        step = RECOVERIES[job.recover]
        accuracies[step] = stages.accuracy(step, recovered)
    final, epochs = stages.trained(recovered, choice.plan)
    curve = (*curve, *after(curve, epochs))
    if epochs:
        accuracies["after fine-tuning"] = stages.accuracy("after fine-tuning", final)
    choice = overall(first, stages, choice)
    artifacts = first.exported(final, choice.plan)
    if job.quantize != "none":
        accuracies["after quantization"] = first.accuracy("after quantization", artifacts[0])
    measurements = first.measurements(next(a for a in artifacts if a.format == first.judged))
    dense_cost, cost = first.costs(choice)
    found = Findings(
        job=job,
        graph=graph,
        choice=choice,
        proof=proof,
        dense_cost=dense_cost,
        cost=cost,
        accuracies=accuracies,
        curve=curve,
        artifacts=artifacts,
        measurements=measurements,
    )
    words = facts(found, run.manifest, run.used, command)
    if run.leads:
        write_json(run.path("result.json"), words)
        report.write(words, run.folder)
    return Result(run.folder, final, choice.plan, words)


def _check_plans(first: Pipeline, budgets: Sequence[Budget]) -> None:
    """A pattern that matches nothing, and a budget that no widths meet, are known before hours are spent."""
    first.job.rules.allowed(first.graph)
    for budget in budgets:
        must_be_reachable(first, budget)


def _check_numbers(seed: int, rounds: int) -> None:
    if seed < 0 or rounds < 1:
        raise UsageError(f"the seed must be 0 or more and rounds 1 or more, got {seed} and {rounds}.")


def _check(job: Job) -> None:
    """What can be known to fail before hours are spent."""
    if job.recover not in RECOVERIES:
        raise UsageError(f"recover must be one of {', '.join(RECOVERIES)}, got {job.recover!r}.")
    check_way(job.quantize, job.data)
    find("criteria", job.criterion, "criterion")
    check_options(job.allocator, job.search, job.rules)
    require_formats(job.formats)
    if not job.formats or job.calibration_images < 1:
        raise UsageError("at least one format and calibration_images of 1 or more are needed.")
    if job.device.host:
        with connect(job.device.host) as board:
            board.hello()
    if job.recipe.epochs and (job.data is None or not len(job.data.train)):
        raise DataError("fine-tuning needs training images: give data with a training part, or 0 epochs.")
    if job.data:
        expected = next((tuple(t.shape[1:]) for t in job.example_inputs if isinstance(t, Tensor)), None)
        got = tuple(job.data.sample_shape[1:])
        if expected is not None and expected != got:
            raise DataError(f"the data have images of shape {got}, the model takes {expected}: give --input-shape to match, or other data.")
        with user_code("running the network on the example input", TraceError), torch.no_grad(), evaluating(job.model):
            job.data.check(classes=logits_of(job.model(*job.example_inputs)).shape[1])


def _asked(job: Job) -> dict[str, Any]:
    return {
        "device": job.device.profile,
        "host": job.device.host,
        "criterion": job.criterion,
        "allocate": job.allocator,
        "recover": job.recover,
        **job.rules.to_json(),
        "search": dict(job.search),
        "recipe": job.recipe.to_json(),
        "formats": list(job.formats),
        "quantize": job.quantize,
        "seed": job.seed,
        "rounds": job.rounds,
    }


def predict(model: nn.Module, example_inputs: Tensor | Sequence[Any], device: str | Device) -> Cost:
    """What the network costs on a device, without running it there: see Cost. Raises TraceError, UnknownDevice."""
    target = device if isinstance(device, Device) else find_device(device)
    return predict_graph(trace(model, example_inputs), None, target)


def evaluate(model: nn.Module | str | Path, data: Any, *, host: str = "", progress: Progress = silent) -> Accuracy:
    """Top-1 accuracy of a network, or of an artifact by its own runtime, on the validation images.

    `host`: the board that runs the artifact, over SSH; int8 results differ between CPUs. Raises DataError, ExportError, DeviceError.
    """
    source = data if isinstance(data, Data) else load_data(data)
    if isinstance(model, nn.Module):
        return evaluate_module(model, source.val, progress=progress)
    if not host:
        return accuracy_of(load_artifact(model), source.val, progress=progress)
    with connect(host) as board:
        take_turn(board)
        return accuracy_of(runner_on(board, artifact(model)), source.val, progress=progress)


__all__ = ["compress", "evaluate", "predict"]
