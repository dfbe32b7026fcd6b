"""The TFLite artifact: converted by litert-torch, run by LiteRT, described and checked like the ONNX one.

Images are NHWC in the file, which LiteRT's kernels want (NCHW on request costs transposes); whoever runs it through `load` feeds and
gets the network's own layout. The batch is 1. The converter is an extra and is imported only when it converts.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeprune.errors import ExportError, UsageError
from edgeprune.export import Arrays, Artifact, Draft, Quantizer, Runner
from edgeprune.export.flatbuffer import (
    averaged_in_place,
    changed,
    described,
    metadata_of,
    named_like_torch,
    rectified_once,
    shuffled_in_place,
)
from edgeprune.export.fold import as_args, frozen_copy
from edgeprune.export.parity import accept, compare, numbered, probe_of, recorded, texts, write_checked
from edgeprune.export.prepare import NETWORK_ERRORS, explained, prepared
from edgeprune.graph.running import first_line, silent_torch, single_sample

LAYOUTS = ("NHWC", "NCHW")
SCHEMA_VERSION = 3
_CONVERTER_ERRORS = (*NETWORK_ERRORS, LookupError, AttributeError, ArithmeticError)


class TfliteFormat:
    """The format "tflite", run by LiteRT."""

    name = "tflite"
    suffix = ".tflite"

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
        """See `edgeprune.export.export`: a file for one sample at a time, checked with LiteRT; dynamic_batch is always False.

        Raises ExportError where the converter or the runtime is not installed, and as `export` says.
        """
        if layout not in (None, *LAYOUTS):
            raise UsageError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
        converter = _converter()
        network = prepared(model, single_sample(as_args(example_inputs)))
        original = network.original if reference is None else frozen_copy(reference).cpu()
        last = layout != "NCHW"
        content, layers = _converted(converter, network.lean, network.args, last=last)
        if quantizer is not None:
            content = quantizer(
                Draft(format="tflite", content=content, layers=layers, as_fed=_images_last if last else lambda array: array)
            )
        extra = {"layout": layout or "NHWC", "quantize": "none", **(quantizer.metadata if quantizer else {}), **(metadata or {})}
        if probe := probe_of(original, _runner(content, path, last=last), network.args):
            extra["probe"] = probe
        content = described(content, texts(extra))
        inputs = network.args if samples is None else tuple(s.detach().cpu() for s in as_args(samples))

        def verify(file: Path) -> Artifact:
            parity = compare(original, self.load(file), inputs)
            accept(parity, path.name, tolerance=tolerance, quantizer=quantizer)
            facts = {"format": self.name, "opset": SCHEMA_VERSION, "dynamic_batch": False, "metadata": metadata_of(content)}
            return recorded(parity, file, path, quantizer, **facts)

        return write_checked(content, path, verify)

    def load(self, path: Path) -> Runner:
        """A function from input arrays to output arrays in the network's own layout, one sample at a time inside.

        Raises ExportError for a damaged or unusable file, and without the runtime; the function for inputs it does not take.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ExportError(f"{path} cannot be read: {error.strerror}.") from error
        last = read_metadata(path).get("layout") == "NHWC"  # a truncated file ends here
        if changed(content):
            raise ExportError(f"{path} was changed after it was written: its content does not match the hash it carries. Export it again.")
        return _runner(content, path, last=last)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata an artifact carries, text by key; empty for a file of others. Raises ExportError for a damaged file."""
    try:
        return metadata_of(path.read_bytes())
    except ExportError as error:
        raise _unusable(path, error) from error


class _ImagesLast(nn.Module):
    """The network with images as (n, h, w, c) at both ends and its outputs as one tuple."""

    def __init__(self, wrapped: nn.Module, *, last: bool) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.last = last
        self.training = False

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        """Permutes, calls, permutes."""
        if not self.last:
            return tuple(tree_leaves(self.wrapped(*args)))
        outputs = tree_leaves(self.wrapped(*(a.permute(0, 3, 1, 2) if a.ndim == 4 else a for a in args)))
        return tuple(o.permute(0, 2, 3, 1) if o.ndim == 4 else o for o in outputs)


def _converter() -> ModuleType:
    with silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jax and torchao, about themselves
        import litert_torch
    found: ModuleType = litert_torch
    return found


def _converted(converter: ModuleType, model: nn.Module, args: tuple[Tensor, ...], *, last: bool) -> tuple[bytes, dict[str, str]]:
    """(the file, torch's layer -> weight tensor)."""
    wrapped = _ImagesLast(model, last=last)
    fed = tuple(torch.from_numpy(_images_last(a.numpy())) if last else a for a in args)
    try:
        with torch.no_grad():
            outputs = len(wrapped(*fed))
        with silent(), silent_torch(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch, jax and the converter, about each other
            content: bytes = converter.convert(wrapped, fed).model_content()
    except _CONVERTER_ERRORS as error:
        raise explained(error, "TFLite", model, args) from error
    ends = numbered("input", len(args)), numbered("output", outputs)
    lean = rectified_once(shuffled_in_place(averaged_in_place(content)))
    return named_like_torch(lean, _tags(wrapped), _weights(model), *ends)


def _weights(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every weight's bytes in the order of axes that the file has -> its layer."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim in (2, 4):
            order = (0, 1) if weight.ndim == 2 else (1, 2, 3, 0) if getattr(module, "groups", 1) > 1 else (0, 2, 3, 1)
            found.setdefault(hashlib.sha256(weight.detach().permute(*order).contiguous().numpy().tobytes()).hexdigest(), name)
    return found


def _tags(wrapped: _ImagesLast) -> dict[str, str]:
    """The converter's name of every module, its chain of classes and attributes, -> torch's name of it."""
    tags: dict[str, str] = {}
    for name, _ in wrapped.named_modules():
        if name.startswith("wrapped."):
            chain, module, steps = [_class(wrapped)], wrapped, name.split(".")
            for step in steps:
                module = getattr(module, step)
                chain.append(f"{_class(module)}_{step}")
            tags["/".join(chain)] = name.removeprefix("wrapped.")
    return tags


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _runner(content: bytes, path: Path, *, last: bool) -> Runner:
    from ai_edge_litert.interpreter import Interpreter

    try:
        with silent():  # the delegate announces itself
            interpreter = Interpreter(model_content=content, num_threads=len(os.sched_getaffinity(0)))
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise _unusable(path, error) from error
    takes, gives = interpreter.get_input_details(), interpreter.get_output_details()

    def run(inputs: Arrays) -> list[NDArray[Any]]:
        arrays = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
        if len(arrays) != len(takes):
            raise ExportError(f"{path} takes {len(takes)} input(s) ({', '.join(t['name'] for t in takes)}), got {len(arrays)}.")
        fed = [_images_last(a) if last else a for a in arrays]
        batch = int(takes[0]["shape"][0]) if len(takes[0]["shape"]) else 1
        rows = [_once(slice(i, i + batch), fed) for i in range(0, len(fed[0]), batch)]
        outputs = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        return [np.ascontiguousarray(o.transpose(0, 3, 1, 2)) if last and o.ndim == 4 else o for o in outputs]

    def _once(part: slice, fed: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            for tensor, array in zip(takes, fed, strict=True):
                interpreter.set_tensor(tensor["index"], np.ascontiguousarray(array[part], dtype=tensor["dtype"]))
            interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            shapes = [a.shape for a in fed]
            raise ExportError(f"{path} does not run on inputs of shape {shapes}: {first_line(error)}.") from error
        return [interpreter.get_tensor(tensor["index"]) for tensor in gives]

    return run


def _images_last(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array


def _unusable(path: Path, error: BaseException) -> ExportError:
    return ExportError(f"{path} is not a usable TFLite file (truncated or damaged?): {first_line(error).rstrip('.')}. Export it again.")


@contextmanager
def silent() -> Iterator[None]:
    """Nothing of what native code prints reaches the terminal: the converter and the runtime write past Python's streams."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, handle in enumerate(kept, start=1):
            os.dup2(handle, number)
            os.close(handle)
        os.close(nowhere)
