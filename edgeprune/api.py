"""The verbs of the library: compress, predict, profile, evaluate. The pipeline reads top to bottom in `compress`."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import report
from edgeprune.data import Data, load_data
from edgeprune.device.card import Device
from edgeprune.device.card import device as find_device
from edgeprune.device.cost import Cost, predict_graph
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
from edgeprune.result import Findings, Result, facts
from edgeprune.run import Run, default_folder, write_json
from edgeprune.train import Progress, Recipe, silent
from edgeprune.train.evaluate import Accuracy, accuracy_of, logits_of, settled
from edgeprune.train.evaluate import evaluate as evaluate_module
from edgeprune.widths import DEFAULT_RULES, WidthRules

RECOVERIES = {"none": "", "bn": "after BN recalibration", "reconstruct": "after reconstruction"}


def compress(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    *,
    budget: Budget,
    device: str | Device = "host",
    data: Any = None,
    criterion: str | None = None,
    allocate: str = "knapsack",
    recipe: Recipe | None = None,
    recover: str | None = None,
    quantize: str = "none",
    round_to: int = DEFAULT_RULES.round_to,
    min_channels: int = DEFAULT_RULES.min_channels,
    max_remove: float = DEFAULT_RULES.max_remove,
    keep_dense: Sequence[str] = DEFAULT_RULES.keep_dense,
    formats: Sequence[str] = ("onnx",),
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    calibration_images: int = 512,
    name: str | None = None,
    notes: Sequence[str] = (),
    command: Sequence[str] = (),
    progress: Progress = silent,
) -> Result:
    """A smaller network that meets the budget on the device, with artifact, evidence and report in a run folder.

    `model` is left as it was; `example_inputs` is a tensor or the forward's positional arguments. `data`: whatever `load_data` takes,
    or Data; None: no accuracy, no recalibration, no training, and only criteria that read weights. `criterion` None: reconstruction
    where there are training images, l1 otherwise. `recipe` None: three epochs where these have labels, none otherwise. `recover` None:
    before training batch norms are recalibrated, without training every layer is refitted. `quantize`: none, int8 or mixed (int8 where
    this machine runs it faster), calibrated on training images, else on validation ones. `round_to`, `min_channels`, `max_remove`,
    `keep_dense`: which widths a plan may choose, see WidthRules. `out`: the run folder (default runs/<name>-<device>); `resume` goes on
    with the run in it, and stages whose inputs are unchanged are read back.
    Raises BudgetError when no plan meets the budget, and the other errors of errors.py.
    """
    if seed < 0:
        raise UsageError(f"the seed must be 0 or more, got {seed}.")
    target = device if isinstance(device, Device) else find_device(device)
    source = data if isinstance(data, Data) or data is None else load_data(data, seed=seed)
    recipe = recipe or Recipe(epochs=default_epochs(source))
    job = Job(
        name=name or type(model).__name__.lower(),
        model=model,
        example_inputs=single_sample(example_inputs),
        budget=budget,
        device=target,
        data=source,
        criterion=criterion or default_criterion(source),
        allocator=allocate,
        recipe=recipe,
        recover=recover or ("bn" if recipe.epochs else "reconstruct"),
        rules=WidthRules(round_to=round_to, min_channels=min_channels, max_remove=max_remove, keep_dense=keep_dense),
        formats=tuple(formats),
        quantize=quantize,
        seed=seed,
        calibration_images=calibration_images,
        notes=tuple(notes),
    )
    _check(job)
    folder = Path(out) if out else default_folder(job.name, target.name)
    new, ours = not folder.exists(), False
    try:
        with Run.open(folder, asked=_asked(job), command=list(command) or ["edgeprune.compress", job.name], resume=resume) as run:
            ours = new
            return _stages(job, run, shlex.join(run.manifest["command"]), progress)
    except EdgepruneError:
        if ours and not (folder / "plan.json").exists():  # nothing worth going on from
            shutil.rmtree(folder, ignore_errors=True)
        raise


def default_epochs(data: Data | None) -> int:
    """Three where there are labelled training images, none otherwise."""
    return 3 if data and len(data.train) and data.train.labelled else 0


def default_criterion(data: Data | None) -> str:
    """The best one measured (benchmarks/criteria.py) where there are training images to look at, weights alone otherwise."""
    return "reconstruction" if data and len(data.train) else "l1"


def _stages(job: Job, run: Run, command: str, progress: Progress) -> Result:
    run.record("inputs", {"model": fingerprint(job.model), "data": job.data.fingerprint if job.data else None})
    stages = Pipeline(job, run, progress)
    graph = stages.graph
    job.rules.allowed(graph)  # a pattern that matches nothing is known before hours are spent
    accuracies = {"dense": stages.accuracy("dense", job.model)}
    scores = stages.scores()
    choice = stages.choose(scores)
    small = settled(slim(job.model, graph, choice.plan))
    proof = stages.proof(small, choice.plan)
    accuracies["right after pruning"] = stages.accuracy("right after pruning", small)
    if (recovered := stages.recovered(small, choice.plan)) is not small:
        step = RECOVERIES[job.recover]
        accuracies[step] = stages.accuracy(step, recovered)
    final, curve = stages.trained(recovered)
    if curve:
        accuracies["after fine-tuning"] = stages.accuracy("after fine-tuning", final)
    artifacts = stages.exported(final, choice.plan)
    if job.quantize != "none":
        accuracies["after quantization"] = stages.accuracy("after quantization", artifacts[0])
    measurements = stages.measurements(artifacts[0])
    dense_cost, cost = stages.costs(choice)
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
    write_json(run.path("result.json"), words)
    report.write(words, run.folder)
    return Result(run.folder, final, choice.plan, words)


def _check(job: Job) -> None:
    """What can be known to fail before hours are spent."""
    if job.recover not in RECOVERIES:
        raise UsageError(f"recover must be one of {', '.join(RECOVERIES)}, got {job.recover!r}.")
    check_way(job.quantize, job.data)
    find("criteria", job.criterion, "criterion")
    find("allocate", job.allocator, "allocator")
    require_formats(job.formats)
    if not job.formats or job.calibration_images < 1:
        raise UsageError("at least one format and calibration_images of 1 or more are needed.")
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
        "budget": job.budget.limits(),
        "device": job.device.profile,
        "criterion": job.criterion,
        "allocate": job.allocator,
        "recover": job.recover,
        **job.rules.to_json(),
        "recipe": job.recipe.to_json(),
        "formats": list(job.formats),
        "quantize": job.quantize,
        "seed": job.seed,
    }


def predict(model: nn.Module, example_inputs: Tensor | Sequence[Any], device: str | Device) -> Cost:
    """What the network costs on a device, without running it there: see Cost. Raises TraceError, UnknownDevice."""
    target = device if isinstance(device, Device) else find_device(device)
    return predict_graph(trace(model, example_inputs), None, target)


def evaluate(model: nn.Module | str | Path, data: Any, *, progress: Progress = silent) -> Accuracy:
    """Top-1 accuracy of a network, or of an artifact by its own runtime, on the validation images. Raises DataError, ExportError."""
    source = data if isinstance(data, Data) else load_data(data)
    if isinstance(model, nn.Module):
        return evaluate_module(model, source.val, progress=progress)
    return accuracy_of(load_artifact(model), source.val, progress=progress)


__all__ = ["compress", "evaluate", "predict"]
