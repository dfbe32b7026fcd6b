"""A task that a tiny network learns in seconds: which of the three colours of an image is the bright one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeprune.data import Data, load_data

CLASSES = 3
SIDE = 8
FACTORY = f"{__file__}:ColourNet"


class ColourNet(nn.Module):
    """Conv, a residual conv, a strided conv, linear; batch norms; dropout if asked."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.b_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c, self.c_norm = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> logits (n, 3)."""
        x = torch.relu(self.a_norm(self.a(x)))
        x = torch.relu(x + self.b_norm(self.b(x)))
        x = torch.relu(self.c_norm(self.c(x)))
        return self.head(self.dropout(x.mean(dim=(2, 3))))  # type: ignore[no-any-return]


def colour_net(dropout: float = 0.0) -> ColourNet:
    """The same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ColourNet(dropout).eval()


def images(n: int, *, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(x (n, 8, 8, 3) uint8, y (n,) int64)."""
    random = np.random.default_rng(seed)
    y = np.arange(n) % CLASSES
    x = random.integers(0, 200, (n, SIDE, SIDE, 3), dtype=np.uint8)
    x[np.arange(n), :, :, y] += 55
    return x, y


def arrays(*, train: int = 96, val: int = 30) -> dict[str, NDArray[np.generic]]:
    """What an .npz of the task holds."""
    (x_train, y_train), (x_val, y_val) = images(train, seed=1), images(val, seed=2)
    return {"x_train": x_train, "y_train": y_train, "x_val": x_val, "y_val": y_val}


def colour_data(*, train: int = 96, val: int = 30, labelled: bool = True) -> Data:
    """The same as Data, without a file."""
    a = arrays(train=train, val=val)
    y_train, y_val = (a["y_train"], a["y_val"]) if labelled else (None, None)
    return load_data(((a["x_train"], y_train), (a["x_val"], y_val)))


def write_npz(path: Path, *, train: int = 96, val: int = 30) -> Path:
    """The task as a file that --data takes."""
    np.savez(path, allow_pickle=False, **arrays(train=train, val=val))
    return path


def write_weights(path: Path) -> Path:
    """The dense network's state dict."""
    torch.save(colour_net().state_dict(), path)
    return path


def weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file."""
    found: dict[str, Tensor] = load_file(path)
    return found


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
