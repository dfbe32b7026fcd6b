from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.criteria.reaction import reactions

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

    exact = torch.autograd.functional.jacobian(rest, hidden).square().sum((0, 1, 2, 4, 5))
    assert torch.allclose(found["first.weight"] / 8000, exact, rtol=0.1)
    assert torch.allclose(found["last"] / 8000, torch.ones(3, dtype=torch.float64), rtol=0.1)
    assert found["second"].shape == (5,) and "unused.weight" in found and not found["unused.weight"].any()


def test_parts_of_a_batch_add_up_and_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model = Small().double().requires_grad_(False)
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    whole, parts = estimate(model, x), estimate(model, x, 1 << 29)
    assert whole.keys() == parts.keys() and all(p.grad is None for p in model.parameters()) and not x.requires_grad
    for name in ("first.weight", "second"):
        assert (whole[name] > 0).all() and torch.allclose(whole[name], parts[name], rtol=1e-9)


@pytest.mark.parametrize("rows", [1, 4])
def test_tokens_are_positions(rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    found = reactions(linear, (torch.randn(500, rows, 3),), weights(linear), generator=torch.Generator().manual_seed(1), bytes_per_image=1)
    assert torch.allclose(found["weight"] / 500, torch.full((2,), float(rows), dtype=torch.float64), rtol=0.2)


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
