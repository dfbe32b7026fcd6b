"""What every format starts from, and what a converter's error means to the person who wrote the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeprune.errors import ExportError, UnsupportedOp
from edgeprune.export.fold import as_args, fold_batchnorm, frozen_copy
from edgeprune.graph.running import first_line

NETWORK_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError)  # what running or exporting somebody's network raises
_MISSING = (r"No ONNX function found for <OpOverload\(op='([^']+)'", r"Lowering not found: (\S+)")


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


def explained(error: BaseException, format: str) -> ExportError:
    """UnsupportedOp with the operation and the source line where the converter names them, else ExportError with its reason."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(str(e) for e in chain)
    lines = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.+)', text)
    where = " at {}:{} ({})".format(*(part.strip() for part in lines[-1])) if lines else ""
    missing = next((found[1] for pattern in _MISSING if (found := re.search(pattern, text))), None)
    if missing:
        return UnsupportedOp(f"{format} has no operation for {missing}{where}: replace it in the model by operations {format} has.")
    return ExportError(f"the model cannot be exported to {format}{where}: {_reason(chain[-1])}.")


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
