"""The main job on what ships with the installation: scikit-learn's digits and a small residual CNN trained on them here.

Nothing is downloaded and nothing is prepared: the data are 1,797 images of 8x8 pixels inside the scikit-learn wheel, shown to the
network at 32x32 so that it has work that is worth saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.api import compress, predict
from edgeprune.data import Data, load_data
from edgeprune.device.card import device
from edgeprune.device.measure import QUICK, measure
from edgeprune.export import export
from edgeprune.plan import Budget
from edgeprune.report import headline
from edgeprune.result import Result
from edgeprune.train import Progress, Recipe
from edgeprune.train.finetune import finetune

TRAINING = Recipe(epochs=4, lr=0.1, batch_size=32, distill=False, flip=False, crop_padding=1)
RECOVERY = Recipe(epochs=2, lr=0.05, batch_size=32, flip=False, crop_padding=1)
SHARE = 0.7  # of the dense network's latency is what the demo asks for


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


def run_demo(out: Path, progress: Progress) -> tuple[Result, Result]:
    """Train the network, then compress it for rpi4 and for this machine, both to 70% of the dense network's latency."""
    data = digits()
    torch.manual_seed(0)
    example = torch.zeros(1, 1, 32, 32)
    model, _ = finetune(DigitNet(), None, data.train, None, TRAINING, progress=lambda _, d, t: progress("training the demo network", d, t))
    out.mkdir(parents=True, exist_ok=True)
    dense = export(model, example, out / "dense.onnx")
    budgets = {
        "rpi4": SHARE * predict(model, example, "rpi4").latency_ms.high,
        "host": SHARE * measure(dense.path, device("host"), **QUICK).latency_ms,
    }
    results = [
        compress(
            model,
            example,
            budget=Budget(latency_ms=float(f"{limit:.3g}")),
            device=name,
            data=data,
            recipe=RECOVERY,
            out=_free(out / name),
            name="digits",
            command=["edgeprune", "demo"],
            progress=lambda w, d, t, name=name: progress(f"{name}: {w}", d, t),  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        )
        for name, limit in budgets.items()
    ]
    return results[0], results[1]


def summary(results: Sequence[Result]) -> str:
    """Three lines: what was asked and reached on each device, and where the reports are."""
    lines = [f"{result.facts['title']}: {headline(result.facts)}" for result in results]
    return "\n".join([*lines, f"Reports: {' and '.join(str(result.folder / 'report.html') for result in results)}"])


def _free(folder: Path) -> Path:
    number = 1
    while (chosen := folder if number == 1 else folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return chosen
