# mypy: disable-error-code="no-any-return"
# (what a module returns when called is Any to mypy)
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import ExportError, UnsupportedOp
from edgeprune.export.prepare import explained, prepared
from tests.export.export_nets import Plain, settle

X = torch.rand(2, 3, 12, 12)


def test_original_and_lean_compute_the_same() -> None:
    model = settle(Plain()).train()
    network = prepared(model, X)
    assert model.training and not any(m.training for m in network.original.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.original.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.lean.modules())
    assert not any(getattr(m, "inplace", False) for m in network.lean.modules())
    assert torch.allclose(network.lean(X), network.original(X), atol=1e-5)
    assert network.args[0] is not X or network.args == (X,)


class TakesAList(nn.Module):
    def forward(self, images: list[Tensor]) -> Tensor:
        return images[0]


def test_inputs_that_cannot_be_exported() -> None:
    with pytest.raises(ExportError, match="takes a list"):
        prepared(TakesAList(), ([X[0]],))  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"\(1, 4, 12, 12\)"):
        prepared(settle(Plain()), torch.rand(1, 4, 12, 12))


def caused(text: str, cause: str) -> BaseException:
    try:
        raise RuntimeError(text) from ValueError(cause)
    except RuntimeError as error:
        return error


TRACE = """While executing
Original traceback:
File "outer.py", line 3, in forward
    self.body(x)
File "net.py", line 24, in forward
    odd(x)"""


@pytest.mark.parametrize(
    "text", ["Lowering not found: aten.odd.default", "No ONNX function found for <OpOverload(op='aten.odd.default', overload"]
)
def test_a_missing_operation_is_named_with_its_line(text: str) -> None:
    error = explained(caused("conversion failed", f"{text}\n{TRACE}"), "TFLite", nn.Identity(), ())
    assert isinstance(error, UnsupportedOp)
    assert str(error).startswith("TFLite has no operation for aten.odd.default at net.py:24 (odd(x)): ")


def test_any_other_reason_is_one_line() -> None:
    error: Any = explained(caused("conversion failed", f"a shape is odd.\n{TRACE}"), "ONNX", nn.Identity(), ())
    assert type(error) is ExportError
    assert str(error) == "the model cannot be exported to ONNX at net.py:24 (odd(x)): a shape is odd."


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return torch.special.bessel_j0(y)


@pytest.mark.parametrize(
    "text", ["Lowering not found: prims.bessel_j0.default", "No ONNX function found for <OpOverload(op='prims.bessel_j0', "]
)
def test_a_line_that_the_converter_does_not_tell_is_found(text: str) -> None:
    error = explained(caused("conversion failed", text), "ONNX", Odd(), (torch.rand(2),))
    line = next(n for n, words in enumerate(Path(__file__).read_text().splitlines(), 1) if "bessel_j0(y)" in words)
    assert f"at {__file__}:{line} (return torch.special.bessel_j0(y))" in str(error)
    other = explained(caused("conversion failed", text), "ONNX", nn.ReLU(), (torch.rand(2),))
    assert isinstance(other, UnsupportedOp) and " at " not in str(other)
