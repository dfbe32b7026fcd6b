"""Fixed networks for the regression gate: what they are must not change, or baselines lose their meaning.

`digits` is a small residual CNN trained for two epochs on scikit-learn's digits, 1,797 images of 8x8 pixels inside its wheel, shown at
32x32 so that there is work worth saving. It is the only one with accuracy, and, trained for longer, the demonstration's network.
`residual` and `mobile` have seeded weights: they stand for the two families whose speed on boards differs most (dense 3x3 convs with
shortcuts; depthwise convs with squeeze-and-excitation and hard-swish).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.data import Data, load_data
from edgeprune.errors import UsageError
from edgeprune.train import Recipe
from edgeprune.train.finetune import finetune

TRAINING = Recipe(epochs=4, lr=0.1, batch_size=32, distill=False, flip=False, crop_padding=1)


class Residual(nn.Module):
    """Two 3x3 convs around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> the same shape."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class DigitNet(nn.Module):
    """A small residual CNN: stem, two stages, linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.stage1 = Residual(32)
        self.down = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.stage2 = nn.Sequential(Residual(64), Residual(64))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 32, 32) -> logits (n, 10)."""
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]  # nn.Module calls return Any


def digits() -> Data:
    """scikit-learn's digits as grey 32x32 images, every fifth one for validation."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = np.repeat(np.repeat((bunch.images * 255 / 16).astype(np.uint8), 4, axis=1), 4, axis=2)[..., None]
    val = np.arange(len(x)) % 5 == 0
    y = bunch.target.astype(np.int64)
    return load_data(((x[~val], y[~val]), (x[val], y[val])))


class ResidualNet(nn.Module):
    """Three stages of two residual blocks at 16, 32 and 64 channels, strided convs between them."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for stage, wide in enumerate((16, 32, 64)):
            layers += [nn.Conv2d(width, wide, 3, stride=1 + (stage > 0), padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            layers += [Residual(wide), Residual(wide)]
            width = wide
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) -> logits (n, 10)."""
        return self.head(self.features(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]  # nn.Module calls return Any


class Inverted(nn.Module):
    """Pointwise expansion by four, depthwise 3x3, squeeze-and-excitation, pointwise projection."""

    def __init__(self, narrow: int, wide: int, *, stride: int) -> None:
        super().__init__()
        inner = 4 * narrow
        self.expand = nn.Sequential(nn.Conv2d(narrow, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.Hardswish()
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, narrow, 1), nn.ReLU(), nn.Conv2d(narrow, inner, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(inner, wide, 1, bias=False), nn.BatchNorm2d(wide))
        self.shortcut = stride == 1 and narrow == wide

    def forward(self, x: Tensor) -> Tensor:
        """(n, narrow, h, w) -> (n, wide, h / stride, w / stride)."""
        y: Tensor = self.depthwise(self.expand(x))
        y = self.project(y * self.gate(y))
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """A stem, six inverted residuals and a classifier, for 64x64 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        shapes = ((16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 80, 2), (80, 80, 1))
        self.blocks = nn.Sequential(*(Inverted(narrow, wide, stride=stride) for narrow, wide, stride in shapes))
        self.head = nn.Linear(80, 100)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 64, 64) -> logits (n, 100)."""
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]  # nn.Module calls return Any


def reference(name: str) -> tuple[nn.Module, Tensor, Data | None]:
    """(network, example input, its data or None), the same on every call; leaves torch's generator where a seed put it."""
    torch.manual_seed(0)
    if name == "digits":
        data = digits()
        model, _ = finetune(DigitNet(), None, data.train, None, replace(TRAINING, epochs=2))
        return model, torch.zeros(1, 1, 32, 32), data
    if name == "residual":
        return ResidualNet().eval(), torch.zeros(1, 3, 32, 32), None
    if name == "mobile":
        return MobileNet().eval(), torch.zeros(1, 3, 64, 64), None
    raise UsageError(f"unknown reference network {name!r}.")
