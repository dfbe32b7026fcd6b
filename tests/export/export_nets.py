"""Tiny networks for (n, 3, 12, 12) inputs, every norm of which follows a conv or a linear layer."""
# mypy: disable-error-code="no-any-return"
# (what a module returns when called is Any to mypy)

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(outputs))  # type: ignore[arg-type]


class Headed(nn.Module):
    """A body, a global pool by view, and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, 5)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y.mean((2, 3)).view(y.size(0), -1))


class Plain(Headed):
    def __init__(self) -> None:
        super().__init__(8)
        self.layers = nn.Sequential(conv_bn(3, 8), nn.ReLU(inplace=True), conv_bn(8, 8, stride=2), nn.ReLU6(inplace=True))

    def body(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Residual(Headed):
    def __init__(self) -> None:
        super().__init__(8)
        self.stem, self.first, self.second = conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Depthwise(Headed):
    def __init__(self) -> None:
        super().__init__(12)
        self.layers = nn.Sequential(
            conv_bn(3, 8, 1), nn.ReLU6(), conv_bn(8, 8, groups=8), nn.ReLU6(), conv_bn(8, 12, groups=4), nn.Hardswish()
        )

    def body(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Squeeze(Headed):
    def __init__(self) -> None:
        super().__init__(8)
        self.stem, self.gate = conv_bn(3, 8), nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1), nn.Hardsigmoid())

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return x * self.gate(nn.functional.adaptive_avg_pool2d(x, 1))


class Concat(Headed):
    def __init__(self) -> None:
        super().__init__(10)
        self.left, self.right = conv_bn(3, 4), conv_bn(3, 6, 1)

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(torch.cat([self.left(x), self.right(x)], 1))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "depthwise": Depthwise,
    "squeeze": Squeeze,
    "concat": Concat,
}


def settle(model: nn.Module) -> nn.Module:
    """In eval mode, with norms that do something: fresh ones are the identity and would hide errors."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor)
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 2)
    return model.eval()
