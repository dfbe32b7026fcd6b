"""Commands that write artifacts, run them on data, and check them from the files alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli.options import (
    AsJson,
    DataOption,
    Factory,
    Model,
    ModelOrArtifact,
    Numbers,
    Shape,
    TrustPickle,
    load,
    load_with_data,
    must_be_writable,
    numbers_of,
    shape_of,
)
from edgeprune.errors import EdgepruneError, ExportError, GateError, ModelError, UsageError
from edgeprune.terminal import print_json, print_table, progress_bars, say

if TYPE_CHECKING:
    from edgeprune.data import Data


def export(
    path: Model,
    formats: Annotated[str, typer.Option("--format", help="artifact formats, comma-separated: onnx, tflite")] = "onnx",
    data: DataOption = None,
    factory: Factory = None,
    input_shape: Shape = None,
    mean: Numbers = None,
    std: Numbers = None,
    layout: Annotated[str | None, typer.Option(help="of images in .tflite files: NHWC (no transposes, the default) or NCHW")] = None,
    quantize: Annotated[str, typer.Option(help="none, int8, or mixed: int8 where it is faster on this machine; needs --data")] = "none",
    calibration: Annotated[str, typer.Option(help="ranges of int8: minmax, percentile or entropy (.tflite: only minmax)")] = "minmax",
    out: Annotated[Path | None, typer.Option(help="folder for the artifacts (default: runs/<model>-export)")] = None,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Artifacts of a network as it is, checked against it.

    Each must compute what the network computes, on real images where --data gives some, before it is written.
    """
    from edgeprune.export import require
    from edgeprune.quantize import check_way, quantizer_for
    from edgeprune.run import default_folder

    asked = [f.strip() for f in formats.split(",")]
    require(asked)
    if layout not in (None, "NHWC", "NCHW"):
        raise UsageError(f"--layout must be NHWC or NCHW, got {layout!r}.")
    check_way(quantize, data, calibration)
    if out:
        must_be_writable(out)

    from edgeprune import export as write
    from edgeprune.data import image_facts
    from edgeprune.export.verify import PARITY_SAMPLES, keep_samples, write_list

    loaded, source = load_with_data(path, factory, data, input_shape=input_shape, mean=mean, std=std, trust_pickle=trust_pickle)
    folder = out or default_folder(loaded.name, "export")
    folder.mkdir(parents=True, exist_ok=True)
    samples = source.val.first(PARITY_SAMPLES) if source else loaded.example_inputs
    metadata = image_facts(source)
    artifacts = []
    quantizer = quantizer_for(quantize, source, method=calibration)
    for form in asked:
        say(f"exporting {form} …")
        order = layout if form == "tflite" else None
        options: dict[str, Any] = {"samples": samples, "metadata": metadata, "layout": order, "quantizer": quantizer}
        artifacts.append(write(loaded.model, loaded.example_inputs, folder, format=form, **options))
    keep_samples(folder, loaded.model, samples)
    listed = write_list(folder, artifacts)
    if as_json:
        return print_json({"folder": str(folder), "artifacts": listed})
    rows = [[a.path.name, f"{a.size_bytes:,}", f"{a.parity_relative:.2g}", f"{a.parity_sqnr_db:.0f}", a.samples] for a in artifacts]
    print_table(["artifact", "bytes", "largest error / largest output", "signal to error, dB", "inputs compared"], rows)
    typer.echo(f"\nThe files are in {folder}; `edgeprune verify {folder}` checks them again.")


def evaluate(
    path: ModelOrArtifact,
    data: Annotated[str, typer.Option("--data", help="see compress")],
    factory: Factory = None,
    input_shape: Shape = None,
    mean: Numbers = None,
    std: Numbers = None,
    host: Annotated[
        str | None, typer.Option(help="the board that runs the artifact: [user@]name[:port] or a name of ~/.ssh/config")
    ] = None,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Top-1 accuracy of a model or artifact on validation images.

    An artifact is run by its own runtime, with the preprocessing it carries.
    """
    from edgeprune import api

    artifact = path.suffix in (".onnx", ".tflite")
    if host and not artifact:
        raise UsageError(f"--host runs artifacts (.onnx, .tflite), {path} is none: export it first.")
    source = _images(path, data, mean, std)
    model: Any = path if artifact else load(path, factory, shape_of(input_shape), trust_pickle, sample=source.sample_shape).model
    with progress_bars() as progress:
        found = api.evaluate(model, source, host=host or "", progress=progress)
    if as_json:
        print_json({"accuracy": found.accuracy, "loss": found.loss, "images": found.images})
    else:
        typer.echo(f"{100 * found.accuracy:.2f}% of {found.images:,} validation images right, loss {found.loss:.4f}")


def _images(path: Path, data: str, mean: str | None, std: str | None) -> Data:
    """The images, prepared as the user said, else as the artifact says it was exported for; floats come as they are."""
    import json

    from edgeprune.data import load_data
    from edgeprune.export import read_metadata

    carried = json.loads(read_metadata(path).get("preprocessing", "null")) if path.is_file() else None
    size = tuple(carried["size"]) if carried and Path(data).is_dir() else None
    source = load_data(data, size=size, mean=numbers_of(mean), std=numbers_of(std))
    if carried and carried["mean"] and mean is None and source.preprocessing.mean is not None:
        return load_data(data, size=size, mean=carried["mean"], std=carried["std"])
    return source


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_OR_ARTIFACT", help="a folder of compress or export, or an artifact (.onnx, .tflite)")
    ],
    as_json: AsJson = False,
) -> None:
    """Checksums, parity, bits and budget again, from files alone.

    The exit code says what failed first: 1 a limit, 5 an artifact, 6 the run's own files.
    """
    from dataclasses import asdict

    from edgeprune.export.verify import verify as checks_of

    checks = checks_of(path)
    failed = [check for check in checks if not check.passed]
    if as_json:
        print_json({"path": str(path), "passed": not failed, "checks": [asdict(check) for check in checks]})
    else:
        print_table(["check", "", "found"], [[c.name, "ok" if c.passed else "FAILED", c.found] for c in checks])
    if failed:
        kinds: dict[int, type[EdgepruneError]] = {1: GateError, 5: ExportError, 6: ModelError}
        more = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
        raise kinds[failed[0].exit_code](f"{path} does not pass: {failed[0].name}: {failed[0].found.rstrip('.')}{more}.")
