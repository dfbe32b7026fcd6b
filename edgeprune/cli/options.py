"""The options that several commands share, and what becomes of their words. Heavy imports wait until a command needs them."""

from __future__ import annotations

import difflib
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.errors import UsageError

if TYPE_CHECKING:
    from edgeprune.data import Data
    from edgeprune.load import LoadedModel


def _defaults_from(context: typer.Context, path: Path | None) -> Path | None:
    """Options of this command from a TOML file; what is typed on the command line wins."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid TOML: {error}.") from error
    names = {
        option.removeprefix("--"): parameter
        for parameter in context.command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--") and option not in ("--config", "--help")
    }
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there is: {', '.join(sorted(names))}."
            raise UsageError(f"--config {path} sets {key!r}, which is no option of `edgeprune {context.command.name}`: {hint}")
        several = isinstance(value, list) and not getattr(names[key], "multiple", False)  # latency-ms = [30, 20] is --latency-ms 30,20
        defaults[str(names[key].name)] = ",".join(map(str, value)) if several else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


Config = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=_defaults_from, help="a TOML file of options under the same names: latency-ms = 30"),
]
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="a state dict (.pt, .pth, .th, .safetensors; with --model) or an exported program (.pt2)")
]
ModelOrArtifact = Annotated[Path, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="a model, or an artifact (.onnx, .tflite)")]
BoardName = Annotated[str, typer.Argument(metavar="NAME", help="a board or profile of `edgeprune device list`")]
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
Host = Annotated[
    str | None, typer.Option("--host", help="where the board is: [user@]name[:port] or a name of ~/.ssh/config; figures are measured there")
]


def load(path: Path, factory: str | None, shape: tuple[int, ...] | None, trust_pickle: bool, sample: Any = None) -> LoadedModel:
    """`load_model`, imported when it is needed; `sample` is the shape of one image of the data."""
    from edgeprune.load import load_model

    return load_model(path, factory=factory, input_shape=shape, sample_shape=sample, trust_pickle=trust_pickle)


def load_with_data(
    path: Path, factory: str | None, data: str | None, *, input_shape: str | None, mean: str | None, std: str | None, trust_pickle: bool,
    seed: int = 0,
) -> tuple[LoadedModel, Data | None]:  # fmt: skip
    """The network, and the images of --data if there are some: as large as --input-shape says, which else is theirs."""
    from edgeprune.data import load_data

    shape = shape_of(input_shape)
    size = (shape[2], shape[3]) if shape and len(shape) == 4 and data and Path(data).is_dir() else None
    source = load_data(data, size=size, mean=numbers_of(mean), std=numbers_of(std), seed=seed) if data else None
    return load(path, factory, shape, trust_pickle, sample=source.sample_shape if source else None), source


def must_be_writable(folder: Path) -> None:
    """Known before anything is loaded: the output folder can be written."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UsageError(f"--out {folder} cannot be a folder: {existing} is a file.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written ({existing}: {error.strerror}): choose another folder.") from error


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """What --input-shape says."""
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input-shape must be positive whole numbers such as 1,3,224,224, got {text!r}.")
    return shape


def limits_of(given: Mapping[str, str | None]) -> list[dict[str, float]]:
    """The limits of every budget, by the name of the figure; the sizes come in MB. A single limit counts for all budgets."""
    found: dict[str, list[float]] = {}
    for name, text in given.items():
        scale = 1e6 if name.endswith("_bytes") else 1.0
        try:
            values = [scale * float(part) for part in text.split(",")] if text is not None else []
        except ValueError:
            raise typer.BadParameter(
                f"{text!r} is no number, nor several with commas between them.", param_hint=f"'{_option(name)}'"
            ) from None
        if values:
            found[name] = values
    if not found:
        raise UsageError(f"no budget given: set at least one of {', '.join(map(_option, given))}.")
    counts = {len(values) for values in found.values()} - {1}
    if len(counts) > 1:
        raise UsageError(f"limits with several values must have equally many, got {' and '.join(map(str, sorted(counts)))}.")
    several = counts.pop() if counts else 1
    return [{name: values[n if len(values) > 1 else 0] for name, values in found.items()} for n in range(several)]


def _option(figure: str) -> str:
    """The option that limits a figure."""
    return "--" + figure.replace("_bytes", "_mb").replace("_", "-")


def numbers_of(text: str | None) -> tuple[float, ...] | None:
    """What --mean or --std says."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--mean and --std must be numbers such as 0.485,0.456,0.406, got {text!r}.") from None
