"""Small networks as ONNX, and images for them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune.data import Data, load_data
from edgeprune.export import export
from edgeprune.quantize.calibrate import Batch

SIDE = 12
CLASSES = 4


class Net(nn.Module):
    """Stem, a residual block with a padded strided shortcut, a depthwise pair, global mean, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 16, 3, 2, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 24, 1)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, CLASSES)."""
        x = torch.relu(self.stem(x))
        shortcut = torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = torch.relu(self.b(torch.relu(self.a(x))) + shortcut)
        x = torch.relu(self.depthwise(x))
        x = torch.nn.functional.hardswish(self.point(x))
        out: Tensor = self.fc(x.mean(dim=(2, 3)))
        return out


@cache
def net() -> Net:
    """The same weights always."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


@cache
def proto() -> onnx.ModelProto:
    """`net` as export writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export(net(), torch.zeros(1, 3, SIDE, SIDE), path)
        return onnx.load(path)


@cache
def images(n: int = 64) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Blobs of a brightness that tells the class."""
    random = np.random.default_rng(0)
    labels = np.arange(n) % CLASSES
    x = random.normal(size=(n, 3, SIDE, SIDE)) + labels[:, None, None, None] - 1.5
    return x.astype(np.float32), labels


def batches(n: int = 64, size: int = 24) -> Iterator[Batch]:
    """In unequal parts."""
    x, y = images(n)
    for start in range(0, n, size):
        yield x[start : start + size], y[start : start + size]


def data() -> Data:
    """The same images for training and validation."""
    return load_data((images(), images(32)))


def run(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first output."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def sqnr_db(model: onnx.ModelProto, reference: onnx.ModelProto) -> float:
    """How close two networks are on the images."""
    x, _ = images()
    expected = run(reference, x)
    return float(10 * np.log10(np.square(expected).sum() / max(float(np.square(run(model, x) - expected).sum()), 1e-12)))
