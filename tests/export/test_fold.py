# mypy: disable-error-code="no-any-return"
# (what a module returns when called is Any to mypy)
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edgeprune.export.fold import fold_batchnorm
from tests.export.export_nets import NETS, settle


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize("name", NETS)
def test_folding_changes_nothing_but_the_norms(name: str) -> None:
    model, x = settle(NETS[name]().double()), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    folded = fold_batchnorm(model, x)

    expected = model(x)
    assert (folded(x) - expected).abs().max() < 1e-12 * expected.abs().max()
    assert norms(folded) == 0 < norms(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Kept(nn.Module):
    """conv, then its norm, used as the subclasses below say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)


class ReadByFunction(Kept):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + torch.relu(y)


class ReturnedToo(Kept):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.norm(y), y


class ChangedBetween(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).relu_())


class WeightReadElsewhere(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.mean()


class CalledTwice(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.conv(x * 2))


class NormTwice(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.other(x))


class BatchStatistics(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class StandardizedConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class OwnForward(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.conv = StandardizedConv(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Parametrized(Kept):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ChannelsFromAnotherAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 12), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x.mean(3)))


class NormWithActivation(nn.BatchNorm2d):
    """In the manner of timm: the activation is a child of the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class NormThatAdds(NormWithActivation):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_a_norm_with_its_activation_inside_leaves_the_activation() -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), NormWithActivation(4), nn.Conv2d(4, 5, 1)).double())
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    folded = fold_batchnorm(model, x)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.ReLU, nn.Conv2d]  # type: ignore[attr-defined]
    assert torch.allclose(folded(x), model(x), rtol=1e-12)


class OddNorm(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.norm = NormThatAdds(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


UNSAFE: tuple[Callable[[], nn.Module], ...] = (
    ReadByFunction,
    ReturnedToo,
    ChangedBetween,
    WeightReadElsewhere,
    CalledTwice,
    NormTwice,
    BatchStatistics,
    OwnForward,
    Parametrized,
    ChannelsFromAnotherAxis,
    OddNorm,
)


@pytest.mark.parametrize("make", UNSAFE)
def test_what_is_not_provably_a_pair_stays(make: Callable[[], nn.Module]) -> None:
    model, x = settle(make().double()), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    folded = fold_batchnorm(model, x)
    assert norms(folded) == norms(model) == 1
    for got, expected in zip(folded(x), model(x), strict=True):
        assert torch.equal(got, expected)


def test_a_linear_layer_and_several_inputs() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, affine=False)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.norm(self.linear(a + b))

    model, args = settle(TwoInputs().double()), (torch.randn(3, 5).double(), torch.randn(3, 5).double())
    folded = fold_batchnorm(model, args)
    assert norms(folded) == 0
    assert torch.allclose(folded(*args), model(*args), rtol=1e-12)


def test_leaves_no_hook_behind() -> None:
    folded = fold_batchnorm(settle(NETS["residual"]()), torch.randn(1, 3, 12, 12))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in folded.modules())


def test_a_captured_program_is_copied_and_run() -> None:
    model, x = settle(NETS["plain"]()), torch.randn(2, 3, 12, 12)
    captured = torch.export.export(model, (x,)).module()
    assert torch.allclose(fold_batchnorm(captured, x)(x), model(x), atol=1e-6)
