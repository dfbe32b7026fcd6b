from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.criteria.reaction import effect, reactions

ENOUGH = 1 << 40


class Small(nn.Module):
    """A conv by module, a conv and a linear by function, a branch that the outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Parameter(torch.randn(5, 4, 1, 1))
        self.last = nn.Parameter(torch.randn(3, 5))
        self.unused = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(torch.tanh(self.first(x)), self.second).mean((2, 3))
        self.unused(y)
        return F.linear(y, self.last)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.ndim > 1}


def estimate(model: nn.Module, x: Tensor, bytes_per_image: int = 1) -> dict[str, Tensor]:
    return reactions(model, (x,), weights(model), generator=torch.Generator().manual_seed(0), bytes_per_image=bytes_per_image)


def test_it_is_the_diagonal_of_the_squared_jacobian() -> None:
    torch.manual_seed(0)
    model: Any = Small().double()
    image = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    found = estimate(model, image.expand(8000, -1, -1, -1))
    hidden = model.first(image)

    def rest(h: Tensor) -> Tensor:
        return F.linear(F.conv2d(torch.tanh(h), model.second).mean((2, 3)), model.last)

    jacobian = torch.autograd.functional.jacobian(rest, hidden)[0, :, 0].flatten(2)  # (outputs, channels, positions)
    alone, together = found["first.weight"][:2] / 8000
    assert torch.allclose(alone, jacobian.square().sum((0, 2)), rtol=0.1)
    assert torch.allclose(together, jacobian.sum(2).square().sum(0), rtol=0.1)
    assert torch.allclose(found["last"][:2] / 8000, torch.ones(2, 3, dtype=torch.float64), rtol=0.1)
    assert found["second"].shape == (6, 5) and "unused.weight" in found and not found["unused.weight"][:2].any()


def test_the_effect_mixes_errors_that_differ_and_that_are_the_same_everywhere() -> None:
    """Errors with the spread of the layer's own outputs change what comes behind, a mean, by what the effect says."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 1, bias=False).double()
    with torch.no_grad():
        conv.weight[:] = 1.0

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Any:
            return self.conv(x).mean((2, 3))

    model, per_image = Mean(), torch.randn(6000, 1, 1, 1, dtype=torch.float64)
    for share in (0.0, 0.5, 1.0):
        x = share**0.5 * per_image + (1 - share) ** 0.5 * torch.randn(6000, 1, 4, 4, dtype=torch.float64)
        found = effect(estimate(model, x)["conv.weight"], 6000)
        changed = (share + (1 - share) / 16) * torch.ones(2, dtype=torch.float64)  # the variance of the mean of 16 such errors
        assert torch.allclose(found, changed, rtol=0.15)


def test_parts_of_a_batch_add_up_and_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model = Small().double().requires_grad_(False)
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    whole, parts = estimate(model, x), estimate(model, x, 1 << 29)
    assert whole.keys() == parts.keys() and all(p.grad is None for p in model.parameters()) and not x.requires_grad
    for name in ("first.weight", "second"):
        assert (whole[name][:2] > 0).all() and torch.allclose(whole[name], parts[name], rtol=1e-9)


@pytest.mark.parametrize("rows", [1, 4])
def test_tokens_are_positions(rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    found = reactions(linear, (torch.randn(500, rows, 3),), weights(linear), generator=torch.Generator().manual_seed(1), bytes_per_image=1)
    alone, together = found["weight"][:2] / 500
    assert torch.allclose(alone, torch.full((2,), float(rows), dtype=torch.float64), rtol=0.2)
    assert torch.allclose(together, torch.full((2,), float(rows), dtype=torch.float64), rtol=0.3)  # directions of tokens are independent


def test_outputs_that_cannot_be_differentiated_give_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Threshold(0.0, 1.0))

    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Any:
            return self.net(x).argmax(1)

    choice = Choice()
    assert (
        reactions(choice, (torch.randn(4, 3),), weights(choice), generator=torch.Generator().manual_seed(0), bytes_per_image=ENOUGH) == {}
    )
