"""Getting the accuracy back: BN recalibration, fine-tuning, distillation. This file imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from edgeprune.errors import UsageError

Progress = Callable[[str, int, int], None]
"""Called as progress(what is being done, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """The progress report of library use: none."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a slim network is trained: SGD with momentum, warm-up, then a cosine to zero over all epochs.

    distill: learn from the dense network too, loss = distill_weight * temperature² * KL(dense || slim) + (1 - distill_weight) *
    cross-entropy (Hinton, Vinyals, Dean 2015); without labels the dense network's answers alone. flip, crop_padding: augmentation
    (crop_padding None: an eighth of the image side). Raises UsageError for values out of range.
    """

    epochs: int = 3
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_share: float = 0.05
    distill: bool = True
    temperature: float = 4.0
    distill_weight: float = 0.7
    label_smoothing: float = 0.0
    flip: bool = True
    crop_padding: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "epochs": self.epochs >= 0,
            "lr": 0 < self.lr < math.inf,
            "batch_size": self.batch_size >= 2,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "warmup_share": 0 <= self.warmup_share < 1,
            "temperature": 0 < self.temperature < math.inf,
            "distill_weight": 0 <= self.distill_weight <= 1,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "crop_padding": self.crop_padding is None or self.crop_padding >= 0,
        }
        for name, good in checks.items():
            if not good:
                raise UsageError(f"the recipe's {name} cannot be {getattr(self, name)!r}.")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for run.json."""
        return asdict(self)


@dataclass(frozen=True)
class Epoch:
    """One epoch's figures; the validation figures are of images held out from the training set, None without labels."""

    epoch: int
    train_loss: float
    val_loss: float | None
    val_accuracy: float | None
    lr: float
    seconds: float
