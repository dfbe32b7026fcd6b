"""From a network to the file that is deployed, and back to numbers: one class per format, found by name.

A format is a class with `name`, `suffix`, `export` and `load` (see `Format`); outsiders add one with an entry point in the
group "edgeprune.formats". An artifact is written under a temporary name and renamed once it was shown to compute what the
network computes: a file that is there was checked. No torch here: `formats()` is a light command's to call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from edgeprune.errors import ExportError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

Arrays = NDArray[Any] | Sequence[NDArray[Any]]
Runner = Callable[[Arrays], list[NDArray[Any]]]

_BUILT_IN = {"onnx": "edgeprune.export.onnx:OnnxFormat"}
_GROUP = "edgeprune.formats"


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A deployable file and the evidence that it computes what the network computes.

    parity_max_abs: the largest absolute difference between the artifact's and the network's outputs over `samples` inputs;
    parity_relative: the same over the largest absolute output. dynamic_batch: whether it takes any batch size.
    """

    path: Path
    format: str
    sha256: str
    size_bytes: int
    opset: int
    dynamic_batch: bool
    parity_max_abs: float
    parity_relative: float
    samples: int
    metadata: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for artifacts.json; the path as text."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"path": str(self.path), "metadata": dict(self.metadata)}

    @staticmethod
    def from_json(text: Mapping[str, Any]) -> Artifact:
        """The inverse of `to_json`."""
        return Artifact(**{**text, "path": Path(text["path"])})


class Format(Protocol):
    """What a file format must offer; the class takes no arguments."""

    name: str
    suffix: str

    def export(
        self,
        model: nn.Module,
        example_inputs: Tensor | Sequence[Tensor],
        path: Path,
        *,
        samples: Tensor | Sequence[Tensor] | None,
        metadata: Mapping[str, Any] | None,
        tolerance: float,
    ) -> Artifact:
        """Write `path` and return what was written; nothing is left behind on failure."""

    def load(self, path: Path) -> Runner:
        """A function from input arrays to the list of output arrays; raises ExportError for a file that cannot be used."""


def formats() -> tuple[str, ...]:
    """The names `export` takes, built-in ones first."""
    added = sorted({point.name for point in entry_points(group=_GROUP)} - _BUILT_IN.keys())
    return (*_BUILT_IN, *added)


def export(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | Path,
    *,
    format: str = "onnx",
    samples: Tensor | Sequence[Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = 1e-4,
) -> Artifact:
    """Write `model` as an artifact and return it with its parity figures.

    `path` is the file, or a folder that gets `model` with the format's suffix. `samples` are real inputs for the parity check
    (default: the example inputs), batch first. `metadata` is written into the file: text as it is, anything else as JSON.
    `tolerance` limits the largest absolute difference over the largest absolute output.
    Raises UsageError for an unknown format, ParityError above the tolerance, UnsupportedOp naming an operation the format
    has not, ExportError otherwise.
    """
    writer = _format(format)
    target = Path(path)
    if target.is_dir() or not target.suffix:
        target = target / f"model{writer.suffix}"
    return writer.export(model, example_inputs, target, samples=samples, metadata=metadata, tolerance=tolerance)


def load_artifact(path: str | Path) -> Runner:
    """A function from input arrays to output arrays that runs the artifact on this machine; load once, call often.

    Raises ExportError for a file that is missing, damaged or of an unknown format.
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"there is no artifact {file}: give the path of an exported file.")
    found = [f for f in map(_format, formats()) if f.suffix == file.suffix]
    if not found:
        raise ExportError(f"no format has the suffix {file.suffix!r} of {file}; there is: {', '.join(formats())}.")
    return found[0].load(file)


def run_artifact(path: str | Path, inputs: Arrays) -> list[NDArray[Any]]:
    """The artifact's outputs for `inputs` (an array or one per input, batch first); see `load_artifact`."""
    return load_artifact(path)(inputs)


def _format(name: str) -> Format:
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        made: Format = getattr(importlib.import_module(module), attribute)()
        return made
    points = [point for point in entry_points(group=_GROUP) if point.name == name]
    if not points:
        raise UsageError(f"unknown artifact format {name!r}; there is: {', '.join(formats())}.")
    added: Format = points[0].load()()
    return added
