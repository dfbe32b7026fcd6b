"""What every format starts from, and what a converter's error means to the person who wrote the network."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeprune.errors import ExportError, UnsupportedOp
from edgeprune.export.fold import as_args, fold_batchnorm, frozen_copy
from edgeprune.graph.running import Observer, first_line

NETWORK_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError)  # what running or exporting somebody's network raises
_LIBRARIES = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
_MISSING = (r"No ONNX function found for <OpOverload\(op='(\w+\.[^']+)'", r"Lowering not found: (\w+\.\S+)")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network on its way into a file: `original` computes what was given, `lean` the same with folded norms; on the CPU, in eval mode."""

    original: nn.Module
    lean: nn.Module
    args: tuple[Tensor, ...]


def prepared(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> Prepared:
    """Copies of `model`, which is not changed. Raises ExportError where it does not run on the example inputs."""
    given = as_args(example_inputs)
    if odd := [type(a).__name__ for a in given if not isinstance(a, Tensor)]:
        raise ExportError(
            f"cannot export: artifacts take tensors, and the model takes a {odd[0]}: export the part of it that takes images."
        )
    args = tuple(a.detach().cpu() for a in given)
    original = frozen_copy(model).cpu()
    try:
        lean = _without_inplace(fold_batchnorm(original, args), args)
    except NETWORK_ERRORS as error:
        shapes = ", ".join(str(tuple(a.shape)) for a in args)
        raise ExportError(f"cannot export: the model does not run on the example input of shape {shapes}: {_reason(error)}.") from error
    return Prepared(original, lean, args)


def explained(error: BaseException, format: str, model: nn.Module, args: tuple[Tensor, ...]) -> ExportError:
    """UnsupportedOp with the operation where the converter names it, else ExportError with its reason; with the source line.

    A converter that does not tell the line of an operation leaves it to a run of `model`, which finds where it is called.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(str(e) for e in chain)
    lines = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.+)', text)
    where = " at {}:{} ({})".format(*(part.strip() for part in lines[-1])) if lines else ""
    missing = next((found[1] for pattern in _MISSING if (found := re.search(pattern, text))), None)
    if missing:
        where = where or _called_at(missing, model, args)
        return UnsupportedOp(f"{format} has no operation for {missing}{where}: replace it in the model by operations {format} has.")
    return ExportError(f"the model cannot be exported to {format}{where}: {_reason(chain[-1])}.")


class _Caller(Observer):
    """Notes the line of the user's code that first calls an operation whose name holds a word."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word = word
        self.where = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.where and self._word in func.__name__:
            ours = [f for f in traceback.extract_stack() if f.line and not f.filename.startswith(_LIBRARIES)]
            self.where = f" at {ours[-1].filename}:{ours[-1].lineno} ({ours[-1].line})" if ours else ""
        return func(*args, **(kwargs or {}))


def _called_at(operation: str, model: nn.Module, args: tuple[Tensor, ...]) -> str:
    """Where `model` calls an operation (namespace.name.overload) in whatever namespace; "" where it does so under another name."""
    with _Caller(operation.split(".")[1]) as caller, torch.no_grad():
        model(*(a.clone() for a in args))
    return caller.where


def _reason(error: BaseException) -> str:
    return first_line(error).rstrip(".")


def _without_inplace(model: nn.Module, args: tuple[Tensor, ...]) -> nn.Module:
    """`model` with in-place activations turned off, where that changes nothing.

    The exporter decomposes hardtanh_ (ReLU6 in place) symbolically: MobileNetV2 takes 4.5 s with it, 1.9 s without. A network that
    relies on the side effect is left alone.
    """
    inplace = [m for m in model.modules() if getattr(m, "inplace", False) is True]
    with torch.no_grad():
        before = tree_leaves(model(*(a.clone() for a in args)))
        for module in inplace:
            module.inplace = False  # type: ignore[assignment]  # torch types module attributes as tensors
        after = tree_leaves(model(*(a.clone() for a in args)))
    if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if isinstance(a, Tensor)):
        for module in inplace:
            module.inplace = True  # type: ignore[assignment]  # torch types module attributes as tensors
    return model
