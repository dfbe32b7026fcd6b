"""The commands, and nothing else: options in, one api call, words out. Heavy imports wait until a command needs them.

Exit codes: 0 done; 1 a gate failed; 2 usage; 3 no plan meets the budget; 4 device or connection; 5 export or parity; 6 model or
data; 130 interrupted. Errors are one paragraph on stderr; a traceback means a bug. With --json, stdout holds one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.errors import EdgepruneError, GateError, UsageError
from edgeprune.terminal import complain, print_json, print_table, progress_bars, say

if TYPE_CHECKING:
    from edgeprune.load import LoadedModel
    from edgeprune.result import Result

app = typer.Typer(
    name="edgeprune",
    help="Compress trained CNNs for small boards: a smaller network that meets the budget, ready to deploy, with the evidence.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
devices_app = typer.Typer(help="Boards and their profiles.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(devices_app, name="device")

Model = Annotated[Path, typer.Argument(help="a state dict (.pt, .pth, .th, .safetensors; with --model) or an exported program (.pt2)")]
Factory = Annotated[
    str | None,
    typer.Option("--model", help="builds the network of a state dict: pkg.mod:function, file.py:function, timm:NAME or torchvision:NAME"),
]
Shape = Annotated[str | None, typer.Option(help="shape of one input, such as 1,3,224,224")]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help="load a pickled module; this executes code from the file")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout; progress goes to stderr")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="folder of class folders, .npz with x_train … y_val, or pkg.mod:function giving (train, val)")
]
Numbers = Annotated[str | None, typer.Option(help="per channel, 0 to 1, comma-separated (default: ImageNet's for colour images)")]
DeviceName = Annotated[str, typer.Option("--device", help="a board or profile of `edgeprune device list`, or a .toml card")]


@app.command()
def compress(
    path: Model,
    device: DeviceName = "host",
    latency_ms: Annotated[float | None, typer.Option(help="largest latency of one inference")] = None,
    energy_mj: Annotated[float | None, typer.Option(help="largest energy of one inference")] = None,
    macs: Annotated[float | None, typer.Option(help="largest MACs: a count, or a share of the dense network's")] = None,
    params: Annotated[float | None, typer.Option(help="largest number of parameters: a count, or a share")] = None,
    size_mb: Annotated[float | None, typer.Option(help="largest artifact, in MB")] = None,
    peak_memory_mb: Annotated[float | None, typer.Option(help="largest memory of one inference, in MB")] = None,
    data: DataOption = None,
    factory: Factory = None,
    input_shape: Shape = None,
    mean: Numbers = None,
    std: Numbers = None,
    criterion: Annotated[str, typer.Option(help="importance of channels, see `edgeprune criteria`")] = "l1",
    allocator: Annotated[str, typer.Option("--allocate", help="how much of each layer stays, see `edgeprune allocators`")] = "knapsack",
    recover: Annotated[str, typer.Option(help="before training: none, bn (batch norms) or reconstruct (refit every layer)")] = "bn",
    epochs: Annotated[int | None, typer.Option(help="epochs of fine-tuning (default: 3 with labelled training images)")] = None,
    distill: Annotated[bool, typer.Option(help="fine-tune towards the dense network's answers too")] = True,
    lr: Annotated[float, typer.Option(help="largest learning rate of the cosine schedule")] = 0.01,
    batch_size: Annotated[int, typer.Option(help="images per training step")] = 128,
    flip: Annotated[bool, typer.Option(help="mirror training images at random")] = True,
    round_to: Annotated[int, typer.Option(help="widths are multiples of this")] = 8,
    quantize: Annotated[str, typer.Option(help="none: weights and activations stay fp32")] = "none",
    formats: Annotated[str, typer.Option("--format", help="artifact formats, comma-separated: onnx")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="run folder (default: runs/<model>-<device>)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    seed: Annotated[int, typer.Option(min=0, help="for everything random")] = 0,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """A smaller network that meets the budget on the device, as an artifact with a report."""
    from edgeprune.device.card import device as find_device
    from edgeprune.plan import Budget

    budget = Budget(
        latency_ms=latency_ms,
        energy_mj=energy_mj,
        macs=macs,
        params=params,
        size_bytes=size_mb * 1e6 if size_mb is not None else None,
        peak_memory_bytes=peak_memory_mb * 1e6 if peak_memory_mb is not None else None,
    )
    if quantize != "none":
        raise UsageError(f"--quantize {quantize!r} is not there yet: this version writes fp32 artifacts (--quantize none).")
    if resume and out is None:
        raise UsageError("--resume needs --out: name the run folder to go on with.")
    target = find_device(device)

    from edgeprune import api
    from edgeprune.data import load_data
    from edgeprune.run import default_folder
    from edgeprune.train import Recipe

    if out:
        _must_be_writable(out)
    shape = _shape(input_shape)
    size = (shape[2], shape[3]) if shape and len(shape) == 4 and data and Path(data).is_dir() else None
    source = load_data(data, size=size, mean=_numbers(mean), std=_numbers(std), seed=seed) if data else None
    loaded = _load(path, factory, shape, trust_pickle, sample=source.sample_shape if source else None)
    epochs = api.default_epochs(source) if epochs is None else epochs
    folder = out or default_folder(loaded.name, target.name)
    say(f"the run folder is {folder}")
    with _resumable(folder), progress_bars() as progress:
        result = api.compress(
            loaded.model,
            loaded.example_inputs,
            budget=budget,
            device=target,
            data=source,
            criterion=criterion,
            allocate=allocator,
            recipe=Recipe(
                epochs=api.default_epochs(source) if epochs is None else epochs, distill=distill, lr=lr, batch_size=batch_size, flip=flip
            ),
            recover=recover,
            round_to=round_to,
            formats=[f.strip() for f in formats.split(",")],
            out=folder,
            resume=resume,
            seed=seed,
            name=loaded.name,
            notes=loaded.notes,
            command=["edgeprune", *sys.argv[1:]],
            progress=progress,
        )
    if as_json:
        print_json(result.to_json())
    else:
        _tell(result)
    _gate(result)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for both runs")] = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """The main job on data and a small network that need no download: train, compress for rpi4 and for this machine, report."""
    from edgeprune.demo import run_demo, summary

    _must_be_writable(out)
    with progress_bars() as progress:
        results = run_demo(out, progress)
    if as_json:
        print_json({result.folder.name: result.to_json() for result in results})
    else:
        typer.echo(summary(results))
    for result in results:
        _gate(result)


@app.command()
def inspect(
    path: Model, factory: Factory = None, input_shape: Shape = None, trust_pickle: TrustPickle = False, as_json: AsJson = False
) -> None:
    """The groups of channels that can go, what stays and why, and where parameters and MACs are."""
    from edgeprune.graph.trace import trace
    from edgeprune.report import quantity

    loaded = _load(path, factory, _shape(input_shape), trust_pickle)
    graph = trace(loaded.model, loaded.example_inputs)
    if as_json:
        groups = [{"name": g.name, "channels": g.channels, "members": len(g.members)} for g in graph.groups]
        print_json({"macs": graph.macs, "params": graph.params, "groups": groups, "frozen": dict(graph.frozen)})
        return
    print_table(["group", "channels", "parameter axes"], [[g.name, g.channels, len(g.members)] for g in graph.groups])
    typer.echo(f"\n{quantity(graph.macs)} MACs, {quantity(graph.params)} parameters, {len(graph.groups)} group(s) of channels can shrink")
    if graph.frozen:
        typer.echo("\nStays dense:")
        print_table(["parameter axis", "reason"], [[name, reason] for name, reason in graph.frozen.items()])


@app.command()
def profile(
    path: Annotated[Path, typer.Argument(help="a model, or an artifact (.onnx) to measure on this machine")],
    device: DeviceName = "host",
    factory: Factory = None,
    input_shape: Shape = None,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Latency per layer: predicted for a board that is not attached, measured end to end on this machine for an artifact."""
    from dataclasses import asdict

    from edgeprune.device.card import device as find_device

    target = find_device(device)
    if path.suffix == ".onnx":
        from edgeprune.device.measure import measure

        found = measure(path, target)
        if as_json:
            print_json(found.to_json())
        else:
            typer.echo(
                f"{path.name} on {target.profile}: {found.latency_ms:.3f} ms measured ({found.low_ms:.3f} to {found.high_ms:.3f}), "
                f"p90 {found.p90_ms:.3f} ms, {found.runs:,} runs, threads: {found.threads}"
            )
        return
    from edgeprune.api import predict

    loaded = _load(path, factory, _shape(input_shape), trust_pickle)
    cost = predict(loaded.model, loaded.example_inputs, target)
    if as_json:
        print_json(asdict(cost))
        return
    rows = [[c.name, c.kind, f"{c.latency_ms:.3f}", f"{c.macs / 1e6:.2f}", f"{c.share:.1%}"] for c in cost.per_layer]
    latency = cost.latency_ms
    if (fixed := latency.value - sum(c.latency_ms for c in cost.per_layer)) > 0:
        rows.append(["(once per inference)", "", f"{fixed:.3f}", "", f"{fixed / latency.value:.1%}"])
    print_table(["layer", "kind", "ms", "M MACs", "share"], rows)
    typer.echo(f"\n{latency.value:.2f} ms ({latency.low:.2f} to {latency.high:.2f}, 90% interval); {cost.basis}")
    for note in cost.notes:
        typer.echo(f"- {note}")


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(help="a model, or an artifact (.onnx)")],
    data: Annotated[str, typer.Option("--data", help="see compress")],
    factory: Factory = None,
    input_shape: Shape = None,
    mean: Numbers = None,
    std: Numbers = None,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Top-1 accuracy on the validation images; an artifact is run by its own runtime."""
    from edgeprune import api
    from edgeprune.data import load_data

    source = load_data(data, mean=_numbers(mean), std=_numbers(std))
    model: Any = path
    if path.suffix != ".onnx":
        model = _load(path, factory, _shape(input_shape), trust_pickle, sample=source.sample_shape).model
    with progress_bars() as progress:
        found = api.evaluate(model, source, progress=progress)
    if as_json:
        print_json({"accuracy": found.accuracy, "loss": found.loss, "images": found.images})
    else:
        typer.echo(f"{100 * found.accuracy:.2f}% of {found.images:,} validation images right, loss {found.loss:.4f}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write report.html and report.md of a finished run again."""
    from edgeprune.report import write

    typer.echo(write(_facts_of(folder), folder)[0])


@app.command()
def criteria(as_json: AsJson = False) -> None:
    """Importance criteria: what each needs and where it comes from."""
    _registry("criteria", as_json)


@app.command()
def allocators(as_json: AsJson = False) -> None:
    """Ways to decide how much of each layer stays."""
    _registry("allocate", as_json)


@devices_app.command("list")
def device_list() -> None:
    """Boards and profiles."""
    from edgeprune.device.card import device as find_device
    from edgeprune.device.card import devices

    found = [find_device(name) for name in devices() if not find_device(name).resolved]
    rows = [[d.name, d.profile, "measured" if d.attached else "predicted", d.description] for d in found]
    print_table(["board", "profile", "figures are", "what it is"], rows)


@devices_app.command("show")
def device_show(name: str) -> None:
    """The whole card of a board, with the sources of its facts and the error of its fit."""
    from edgeprune.device.card import device as find_device

    found = find_device(name)
    if found.resolved:
        say(found.resolved)
    print_json(found.card.model_dump(mode="json"))


def main() -> None:
    """The command `edgeprune`: every error of ours becomes one paragraph and its exit code."""
    try:
        app()
    except EdgepruneError as error:
        complain(str(error))
        sys.exit(error.exit_code)


def _load(path: Path, factory: str | None, shape: tuple[int, ...] | None, trust_pickle: bool, sample: Any = None) -> LoadedModel:
    from edgeprune.load import load_model

    return load_model(path, factory=factory, input_shape=shape, sample_shape=sample, trust_pickle=trust_pickle)


def _must_be_writable(folder: Path) -> None:
    """Known before anything is loaded: the output folder can be written."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UsageError(f"--out {folder} cannot be a folder: {existing} is a file.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written ({existing}: {error.strerror}): choose another folder.") from error


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Ctrl-C says how to go on; typer turns it into the exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        complain(f"interrupted; the same command with --resume --out {folder} goes on from the last finished stage or epoch.")
        raise


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input-shape must be positive whole numbers such as 1,3,224,224, got {text!r}.")
    return shape


def _numbers(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--mean and --std must be numbers such as 0.485,0.456,0.406, got {text!r}.") from None


def _facts_of(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"damaged: {error}"
        raise UsageError(f"{folder} holds no finished run (result.json: {reason}): give the folder that compress printed.") from error
    return facts


def _registry(folder: str, as_json: bool) -> None:
    from edgeprune.registry import entries

    found = entries(folder)
    if as_json:
        known = {e.name: {"summary": e.summary, "needs": e.constants.get("NEEDS"), "source": e.constants.get("PAPER")} for e in found}
        return print_json(known)
    rows = [[e.name, ", ".join(e.constants.get("NEEDS", ())) or "-", e.summary, e.constants.get("PAPER", "")] for e in found]
    print_table(["name", "needs", "what it does", "source"], rows)


def _tell(result: Result) -> None:
    from edgeprune.report import headline, label

    typer.echo(f"{result.facts['title']}: {headline(result.facts)}")
    for budget in result.facts["budgets"]:
        typer.echo(f"  {label(budget['name'])}, {budget['how']}")
    names = ", ".join(a["path"] for a in result.facts["artifacts"])
    typer.echo(f"  {names} and report.html are in {result.folder}")


def _gate(result: Result) -> None:
    missed = [b for b in result.facts["budgets"] if not b["met"]]
    if missed:
        worst = missed[0]
        noise = " or try again on a quieter machine" if worst["name"] == "latency_ms" and worst["basis"] == "measured" else ""
        raise GateError(
            f"the finished artifact misses the budget: {worst['name']} is {worst['reached']:.6g}, asked for {worst['asked']:.6g}. All "
            f"files are in {result.folder}; ask for a little less than you need{noise}."
        )


if __name__ == "__main__":
    main()
