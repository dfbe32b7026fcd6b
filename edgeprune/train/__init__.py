"""Getting the accuracy back: reconstruction, BN recalibration, fine-tuning, distillation. This file imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeprune.errors import UsageError

Progress = Callable[[str, int, int], None]
"""Called as progress(what is being done, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """The progress report of library use: none."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a slim network is trained: warm-up, then a cosine to zero over all epochs.

    optimizer: sgd (with Nesterov momentum) or adamw. distill: learn from the dense network too, loss = distill_weight * temperature² *
    KL(dense || slim) + (1 - distill_weight) * cross-entropy (Hinton, Vinyals, Dean 2015); without labels the dense network's answers
    alone. feature_weight: of the feature maps where everything passes (train/distill.py), relative errors far below 1 (0: off). flip,
    crop_padding (None: an eighth of the image side), mixup, cutmix (the alpha of their Beta distribution, 0: off): augmentation.
    ema_decay: the result is the moving average of the weights with this decay (0: off). norms: batch norms in training use the
    statistics of the batch, or stay frozen as they are. clip_norm: gradients are never longer than this (0: off). precision: auto is
    bf16 where the hardware has it (a step of ResNet-56 takes 0.6 of the time with AVX-512 BF16), fp32 elsewhere. choose: the result is
    that of the epoch that is best on held-out training images, or the last.
    Raises UsageError for values out of range.
    """

    epochs: int = 3
    optimizer: str = "sgd"
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_share: float = 0.05
    distill: bool = True
    temperature: float = 4.0
    distill_weight: float = 0.7
    feature_weight: float = 0.0
    label_smoothing: float = 0.0
    flip: bool = True
    crop_padding: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float = 0.0
    norms: str = "batch"
    clip_norm: float = 0.0
    precision: str = "auto"
    choose: str = "best"

    def __post_init__(self) -> None:
        checks = {
            "epochs": self.epochs >= 0,
            "optimizer": self.optimizer in ("sgd", "adamw"),
            "lr": 0 < self.lr < math.inf,
            "batch_size": self.batch_size >= 2,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "warmup_share": 0 <= self.warmup_share < 1,
            "temperature": 0 < self.temperature < math.inf,
            "distill_weight": 0 <= self.distill_weight <= 1,
            "feature_weight": 0 <= self.feature_weight < math.inf,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "crop_padding": self.crop_padding is None or self.crop_padding >= 0,
            "mixup": 0 <= self.mixup < math.inf,
            "cutmix": 0 <= self.cutmix < math.inf,
            "ema_decay": 0 <= self.ema_decay < 1,
            "norms": self.norms in ("batch", "frozen"),
            "clip_norm": 0 <= self.clip_norm < math.inf,
            "precision": self.precision in ("auto", "fp32", "bf16"),
            "choose": self.choose in ("best", "last"),
        }
        for name, good in checks.items():
            if not good:
                raise UsageError(f"the recipe's {name} cannot be {getattr(self, name)!r}.")

    @staticmethod
    def preset(name: str, **changes: Any) -> Recipe:
        """The recipe of a name in PRESETS, with some of its values changed. Raises UsageError for other names."""
        if name not in PRESETS:
            raise UsageError(f"unknown preset {name!r}; there is: {', '.join(PRESETS)}.")
        return Recipe(**{**PRESETS[name], **changes})

    def to_json(self) -> dict[str, Any]:
        """Plain values, for run.json."""
        return asdict(self)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"epochs": 3, "feature_weight": 100.0},
    "standard": {"epochs": 40, "lr": 0.02},
    "long": {"epochs": 150, "lr": 0.05, "ema_decay": 0.999},
}
"""What --preset takes. The values of standard and long are conventional, not measured here; those of quick are by benchmarks/unseen.py
and benchmarks/accuracy.py. Without feature maps an epoch took a ResNet-56 at half its MACs from 91.70% on test images to 92.37 at a
learning rate of 0.01, to 91.29 at 0.03 and to 91.97 at 0.003. With them it comes much nearer to the dense network, the nearer the more
they weigh, up to 400 at least; at 1000 a ResNet-20 diverged."""

STRUCTURE: Mapping[str, Any] = {"criterion": "di", "allocate": "di_greedy", "search": {"layer_choice": "structure"}}
"""Options of `compress` with which the dense network also decides the widths before it teaches (with `distill`): those that keep the
largest sum over the layers of log DI retained, under the budget (allocate/di_greedy.py). Our stand-in for the structure distillation that
arXiv 2005.13796 names, whose text could not be recovered."""


@dataclass(frozen=True)
class Epoch:
    """One epoch's figures; the validation figures are of images held out from the training set, None without labels.

    `chosen` marks the epoch whose weights are the result, once training is over.
    """

    epoch: int
    train_loss: float
    val_loss: float | None
    val_accuracy: float | None
    lr: float
    seconds: float
    chosen: bool = False
