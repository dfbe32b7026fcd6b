"""From a network to the file that is deployed, and back to numbers: one class per format, found by name.

A format is a class with `name`, `suffix`, `export` and `load` (see `Format`); outsiders add one with an entry point in the
group "edgeprune.formats". An artifact is written under a temporary name and renamed once it was shown to compute what the
network computes: a file that is there was checked. Quantization goes through the one hook `export(…, quantizer=)`: see
`Quantizer`. No torch here: `formats()` is a light command's to call.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from edgeprune.errors import ExportError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime otherwise keeps a device id and a database in the user's cache folder

Arrays = NDArray[Any] | Sequence[NDArray[Any]]
Runner = Callable[[Arrays], list[NDArray[Any]]]

_BUILT_IN = {"onnx": "edgeprune.export.onnx:OnnxFormat", "tflite": "edgeprune.export.tflite:TfliteFormat"}
_GROUP = "edgeprune.formats"
_NEEDS = {"tflite": ("litert_torch", "ai_edge_litert")}  # modules of the extra with the format's name


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A deployable file and the evidence that it computes what the network computes.

    The parity figures compare the artifact's outputs with the fp32 network's over `samples` inputs, also for a quantized file.
    parity_max_abs: the largest absolute difference; parity_relative: the same over the largest absolute output; parity_sqnr_db:
    power of the network's outputs over that of the difference, in dB, of the worst output; parity_top1: share of samples whose
    largest entry of the first output is the same one. opset: of the ONNX file, schema version of the TFLite one. dynamic_batch:
    whether it takes any batch size. bits: weight bits by layer (torch's names), empty for an fp32 file.
    """

    path: Path
    format: str
    sha256: str
    size_bytes: int
    opset: int
    dynamic_batch: bool
    parity_max_abs: float
    parity_relative: float
    parity_sqnr_db: float
    parity_top1: float
    samples: int
    metadata: Mapping[str, str]
    bits: Mapping[str, int | float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for artifacts.json; the path as text."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "path": str(self.path),
            "metadata": dict(self.metadata),
            "bits": dict(self.bits),
        }

    @staticmethod
    def from_json(text: Mapping[str, Any]) -> Artifact:
        """The inverse of `to_json`."""
        return Artifact(**{**text, "path": Path(text["path"])})


@dataclass(frozen=True, eq=False, kw_only=True)
class Draft:
    """An fp32 file on its way to disk, as a Quantizer gets it: batch norms folded, no metadata yet, not yet checked.

    content: the whole file (a serialized onnx.ModelProto, or a TFLite flatbuffer). layers: for every conv and linear layer that is
    one operation in the file, torch's name of the layer -> the name of its weight tensor in the file (ONNX initializer, TFLite
    tensor). as_fed: what the file takes for inputs in the network's own layout, e.g. NCHW -> NHWC; calibration goes through it.
    """

    format: str
    content: bytes
    layers: Mapping[str, str]
    as_fed: Callable[[NDArray[Any]], NDArray[Any]]


class Quantizer(Protocol):
    """What makes a quantized file of an fp32 one, between conversion and parity check: `export(…, quantizer=)`.

    edgeprune.quantize makes these, one per bit plan and calibration set. Work on the network itself that changes no shape (range
    equalisation, weights on a grid) comes before export, on `fold_batchnorm`'s copy of it. Inputs and outputs of the file stay
    float32, so that both runtimes are fed alike. The figures of the Artifact then say how far the file is from the fp32 network
    that was given to export as `reference` (default: the exported one), and `least_sqnr_db` takes the place of the tolerance.
    """

    @property
    def least_sqnr_db(self) -> float:
        """The parity gate: below it export raises ParityError."""

    @property
    def bits(self) -> Mapping[str, int | float]:
        """Weight bits by layer (torch's names; 32 for fp32, a mean where channels differ), read after the call: Artifact.bits."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Into the file beside the caller's, read after the call: quantize, bit plan, calibration_sha256, calibration_images …."""

    def __call__(self, draft: Draft) -> bytes:
        """The quantized file's content. Raises ExportError, UsageError for a format it cannot write."""


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
        quantizer: Quantizer | None,
        reference: nn.Module | None,
        layout: str | None,
    ) -> Artifact:
        """Write `path` and return what was written; nothing is left behind on failure."""

    def load(self, path: Path) -> Runner:
        """A function from input arrays to the list of output arrays; raises ExportError for a file that cannot be used."""


def formats() -> tuple[str, ...]:
    """The names `export` takes, built-in ones first."""
    added = sorted({point.name for point in entry_points(group=_GROUP)} - _BUILT_IN.keys())
    return (*_BUILT_IN, *added)


def require(names: Sequence[str]) -> None:
    """What can be known before hours are spent: raises UsageError for an unknown format, ExportError where its extra is missing."""
    if unknown := [name for name in names if name not in formats()]:
        raise UsageError(f"unknown artifact format {unknown[0]!r}; there is: {', '.join(formats())}.")
    for name in names:
        if missing := [module for module in _NEEDS.get(name, ()) if find_spec(module) is None]:
            raise ExportError(
                f"writing .{name} files needs {missing[0].replace('_', '-')}, which is an extra: pip install 'edgeprune[{name}]', or leave "
                f"{name} out of the formats."
            )


def export(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | Path,
    *,
    format: str = "onnx",
    samples: Tensor | Sequence[Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = 1e-4,
    quantizer: Quantizer | None = None,
    reference: nn.Module | None = None,
    layout: str | None = None,
) -> Artifact:
    """Write `model` as an artifact and return it with its parity figures.

    `path` is the file, or a folder that gets `model` with the format's suffix. `samples` are real inputs for the parity check
    (default: the example inputs), batch first. `metadata` is written into the file: text as it is, anything else as JSON.
    `tolerance` limits the largest absolute difference over the largest absolute output; with a `quantizer`, its own limit holds.
    `reference`: the fp32 network the artifact is compared with (default: `model`). `layout`: of image inputs, "NCHW" or "NHWC";
    None is the format's own (onnx: NCHW, tflite: NHWC).
    Raises UsageError for an unknown format, ParityError above the tolerance, UnsupportedOp naming an operation the format
    has not, ExportError otherwise.
    """
    require([format])
    writer = _format(format)
    target = Path(path)
    if target.is_dir() or not target.suffix:
        target = target / f"model{writer.suffix}"
    return writer.export(
        model,
        example_inputs,
        target,
        samples=samples,
        metadata=metadata,
        tolerance=tolerance,
        quantizer=quantizer,
        reference=reference,
        layout=layout,
    )


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


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata an artifact carries (preprocessing, labels, layout, probe …), text by key; empty for one of another kind.

    Raises ExportError for a damaged file.
    """
    file = Path(path)
    if file.suffix not in (".onnx", ".tflite"):
        return {}
    found: dict[str, str] = importlib.import_module(f"edgeprune.export{file.suffix}").read_metadata(file)
    return found


def _format(name: str) -> Format:
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        made: Format = getattr(importlib.import_module(module), attribute)()
        return made
    points = [point for point in entry_points(group=_GROUP) if point.name == name]
    added: Format = points[0].load()()
    return added
