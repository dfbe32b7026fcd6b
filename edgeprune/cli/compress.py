"""The main job as a command, and its demonstration."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli.options import (
    AsJson,
    Config,
    DataOption,
    DeviceName,
    Factory,
    Host,
    Model,
    Numbers,
    Shape,
    TrustPickle,
    limits_of,
    load_with_data,
    must_be_writable,
)
from edgeprune.errors import BudgetError, GateError, UsageError
from edgeprune.terminal import complain, print_json, progress_bars, say
from edgeprune.widths import DEFAULT_RULES

if TYPE_CHECKING:
    from edgeprune.result import Result
    from edgeprune.train import Recipe

SHORTEST_NAMED_S = 0.05
DEMO = (
    "a small CNN is trained on scikit-learn's handwritten digits, then compressed twice to 70% of its latency: for a Raspberry Pi 4, where "
    "latency is predicted, and for this machine, where it is measured. Three to four minutes on two idle cores."
)


def compress(
    path: Model,
    device: DeviceName = "host",
    host: Host = None,
    latency_ms: Annotated[
        str | None, typer.Option(help="largest latency of one inference; several, with commas, give a network each")
    ] = None,
    energy_mj: Annotated[str | None, typer.Option(help="largest energy of one inference")] = None,
    macs: Annotated[str | None, typer.Option(help="largest MACs: a count, or a share of the dense network's")] = None,
    params: Annotated[str | None, typer.Option(help="largest number of parameters: a count, or a share")] = None,
    size_mb: Annotated[str | None, typer.Option(help="largest artifact, in MB")] = None,
    peak_memory_mb: Annotated[str | None, typer.Option(help="largest memory of one inference, in MB")] = None,
    data: DataOption = None,
    factory: Factory = None,
    input_shape: Shape = None,
    mean: Numbers = None,
    std: Numbers = None,
    criterion: Annotated[
        str | None, typer.Option(help="importance of channels, see `edgeprune criteria` (default: reconstruction with --data, else l1)")
    ] = None,
    allocator: Annotated[str, typer.Option("--allocate", help="how much of each layer stays, see `edgeprune allocators`")] = "knapsack",
    recover: Annotated[
        str | None,
        typer.Option(help="before training: none, bn (batch norms) or reconstruct (every layer refitted; the default)"),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="how to fine-tune: quick (3 epochs), standard (40) or long (150); the options below change it")
    ] = "quick",
    epochs: Annotated[int | None, typer.Option(help="epochs of fine-tuning, of every round; none without labelled training images")] = None,
    distill: Annotated[bool, typer.Option(help="fine-tune towards the dense network's answers too")] = True,
    structure_distill: Annotated[
        bool,
        typer.Option(
            "--structure-distill",
            help="before distillation, let the discriminant information of the dense network's layers decide the widths (di, di_greedy)",
        ),
    ] = False,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw")] = None,
    lr: Annotated[float | None, typer.Option(help="largest learning rate of the cosine schedule")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images per training step, of all processes together")] = None,
    ema_decay: Annotated[float | None, typer.Option(help="average the weights with this decay, such as 0.999 (0: do not)")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="share of the label spread over all classes")] = None,
    mixup: Annotated[float | None, typer.Option(help="alpha of mixup (0: off)")] = None,
    cutmix: Annotated[float | None, typer.Option(help="alpha of CutMix (0: off)")] = None,
    feature_weight: Annotated[float | None, typer.Option(help="weight of the dense network's feature maps in the loss (0: off)")] = None,
    precision: Annotated[str | None, typer.Option(help="of fine-tuning: auto (bf16 where the hardware has it), fp32 or bf16")] = None,
    flip: Annotated[bool, typer.Option(help="mirror training images at random")] = True,
    rounds: Annotated[int, typer.Option(help="prune, recover and fine-tune so often, each time a part of the way to the budget")] = 1,
    round_to: Annotated[int | None, typer.Option(help="widths are multiples of this (default: what suits the device)")] = None,
    min_channels: Annotated[
        int, typer.Option(help="no layer gets fewer channels; 0: residual branches may go as a whole")
    ] = DEFAULT_RULES.min_channels,
    max_remove: Annotated[float, typer.Option(help="largest share of a group's channels that may go")] = DEFAULT_RULES.max_remove,
    keep_dense: Annotated[
        list[str] | None, typer.Option(help="groups, layers or parameters that stay as they are; * and ? match, may be repeated")
    ] = None,
    search_minutes: Annotated[float | None, typer.Option(help="stop searching after so many minutes, for allocators that search")] = None,
    jobs: Annotated[int | None, typer.Option(help="processes that judge candidates, -1: one per core (default: 1)")] = None,
    cluster: Annotated[str | None, typer.Option(help="judge candidates on ray://host:port or dask://host:port")] = None,
    quantize: Annotated[str, typer.Option(help="none, int8, or mixed: int8 where it is faster on this machine; needs --data")] = "none",
    formats: Annotated[str, typer.Option("--format", help="artifact formats, comma-separated: onnx, tflite")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="run folder (default: runs/<model>-<device>)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    seed: Annotated[int, typer.Option(min=0, help="for everything random")] = 0,
    trust_pickle: TrustPickle = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """A smaller network that meets the budget on the device.

    It comes as an artifact, with a report and everything needed to go on or to check it in one run folder.
    """
    from edgeprune.device.card import device as find_device
    from edgeprune.plan import Budget
    from edgeprune.quantize import check_way

    started = time.monotonic()
    limits = {"latency_ms": latency_ms, "energy_mj": energy_mj, "macs": macs, "params": params}
    limits |= {"size_bytes": size_mb, "peak_memory_bytes": peak_memory_mb}
    budgets = [Budget(**found) for found in limits_of(limits)]
    check_way(quantize, data)
    search = {n: v for n, v in (("search_minutes", search_minutes), ("jobs", jobs), ("cluster", cluster)) if v is not None}
    if structure_distill:
        criterion, allocator, search = _structure(criterion, allocator, search, distill)
    if resume and out is None:
        raise UsageError("--resume needs --out: name the run folder to go on with.")
    target = find_device(device, host=host)

    from edgeprune import api
    from edgeprune.run import default_folder
    from edgeprune.train.processes import processes

    if out:
        must_be_writable(out)
    loaded, source = load_with_data(path, factory, data, input_shape=input_shape, mean=mean, std=std, trust_pickle=trust_pickle, seed=seed)
    recipe = _recipe(preset, api.trainable(source), {
        "epochs": epochs, "distill": distill, "optimizer": optimizer, "lr": lr, "batch_size": batch_size, "ema_decay": ema_decay,
        "label_smoothing": label_smoothing, "mixup": mixup, "cutmix": cutmix, "feature_weight": feature_weight, "precision": precision,
        "flip": flip,
    })  # fmt: skip
    folder = processes().told(out or default_folder(loaded.name, target.name))
    say(f"the run folder is {folder}")
    with _resumable(folder), progress_bars() as progress:
        result = api.compress(
            loaded.model,
            loaded.example_inputs,
            budget=budgets,
            device=target,
            data=source,
            criterion=criterion,
            allocate=allocator,
            recipe=recipe,
            recover=recover,
            quantize=quantize,
            round_to=round_to,
            min_channels=min_channels,
            max_remove=max_remove,
            keep_dense=keep_dense or (),
            search=search,
            formats=[f.strip() for f in formats.split(",")],
            out=folder,
            resume=resume,
            seed=seed,
            rounds=rounds,
            name=loaded.name,
            notes=loaded.notes,
            command=["edgeprune", *sys.argv[1:]],
            progress=progress,
        )
    _tell(result, as_json, time.monotonic() - started)
    _gate(result)


def demo(
    out: Annotated[Path, typer.Option(help="folder for both runs")] = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """The main job on data and a network that need no download.

    It trains a small network on scikit-learn's digits, compresses it for rpi4 and for this machine, and writes the reports.
    """
    from edgeprune.demo import run_demo, summary

    must_be_writable(out)
    say(DEMO)
    with progress_bars() as progress:
        results = run_demo(out, progress)
    if as_json:
        print_json({result.folder.name: result.to_json() for result in results})
    else:
        typer.echo(summary(results))
    for result in results:
        _gate(result)


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Ctrl-C, and a budget that no plan met after all, say how to go on; typer turns the former into the exit code 130."""
    try:
        yield
    except BudgetError as error:
        if not (folder / "run.json").exists():
            raise
        told = f"{error} The scores are kept: another budget with --resume --out {folder} reads them back."
        raise BudgetError(told, error.plan) from error
    except KeyboardInterrupt:
        complain(f"interrupted; the same command with --resume --out {folder} goes on from the last finished stage or epoch.")
        raise


def _recipe(preset: str, trainable: bool, options: Mapping[str, Any]) -> Recipe:
    """The preset with the options that were given; no epochs where there is nothing to train on and none were asked for."""
    from edgeprune.train import Recipe

    given = {name: value for name, value in options.items() if value is not None}
    return Recipe.preset(preset, **({} if trainable else {"epochs": 0}) | given)


def _structure(criterion: str | None, allocator: str, search: Mapping[str, Any], distill: bool) -> tuple[str, str, dict[str, Any]]:
    """Criterion, allocator and its options for --structure-distill. Raises UsageError where others were asked for."""
    from edgeprune.train import STRUCTURE

    if not distill:
        raise UsageError("--structure-distill is a way to distill: leave --no-distill out.")
    if allocator not in ("knapsack", STRUCTURE["allocate"]):
        raise UsageError(f"--structure-distill chooses the widths by {STRUCTURE['allocate']}: leave --allocate {allocator} out.")
    return criterion or STRUCTURE["criterion"], STRUCTURE["allocate"], {**search, **STRUCTURE["search"]}


def _tell(result: Result, as_json: bool, seconds: float) -> None:
    from edgeprune.report import headline, label

    say(_spent(result, seconds))
    if as_json:
        print_json(result.to_json())
        return
    typer.echo(f"{result.facts['title']}: {headline(result.facts)}")
    for budget in result.facts["budgets"]:
        typer.echo(f"  {label(budget['name'])}, {budget['how']}")
    for part in result.parts or (result,):
        typer.echo(f"  {', '.join(a['path'] for a in part.facts['artifacts'])} and report.html are in {part.folder}")
    if result.parts:
        typer.echo(f"  report.html in {result.folder} compares them")


def _spent(result: Result, seconds: float) -> str:
    """Where the time went: the stages that this process computed, longest first."""
    stages: dict[str, float] = defaultdict(float)
    for facts in {id(r.facts): r.facts for r in (*result.parts, result)}.values():
        for stage in facts.get("stages") or ():
            stages[stage["name"]] += 0.0 if stage["cached"] else stage["seconds"]
    named = [(name, spent) for name, spent in sorted(stages.items(), key=lambda item: -item[1]) if spent >= SHORTEST_NAMED_S]
    named.append(("reading, report and the rest", max(0.0, seconds - sum(spent for _, spent in named))))
    return f"{seconds:.1f} s: {', '.join(f'{name} {spent:.1f} s' for name, spent in named)}"


def _gate(result: Result) -> None:
    from edgeprune.report import exact, label

    missed = [b for b in result.facts["budgets"] if not b["met"]]
    if missed:
        worst = missed[0]
        reached, asked = (exact(worst[side], worst["unit"]) for side in ("reached", "asked"))
        noise = " or try again on a quieter machine" if worst["name"] == "latency_ms" and worst["basis"] == "measured" else ""
        raise GateError(
            f"the finished artifact misses the budget: {label(worst['name'])} {reached}, asked for at most {asked}. All "
            f"files are in {result.folder}; ask for a little less than you need{noise}."
        )
