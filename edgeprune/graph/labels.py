"""Integer labels for channels, the ties between them, and the reasons why some must stay.

A label tensor has the shape of the tensor it describes; along dimensions where all positions share a label it is expanded
(stride 0), so that a feature map costs one label per channel. Label 0 is neutral: it names nothing and ties to nothing. Ties are
collected while the network runs and resolved once at the end by connected components, so the whole costs linear time.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

NEUTRAL = 0


class Labels:
    """Hands out labels and collects what is tied and what is frozen.

    `may_cut`: whether a cut through channels takes its channels with it or freezes them. `cuts`: the labels of what was cut.
    """

    def __init__(self, *, may_cut: bool = True) -> None:
        self.may_cut = may_cut
        self.cuts: list[Tensor] = []
        self._count = 1
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._reasons: dict[int, str] = {}

    def fresh(self, n: int) -> Tensor:
        """`n` new labels, or the neutral one where an axis has a single position (it can never go)."""
        if n == 1:
            return torch.zeros(1, dtype=torch.long)
        start, self._count = self._count, self._count + n
        return torch.arange(start, start + n)

    def frozen(self, shape: tuple[int, ...], reason: str) -> Tensor:
        """Labels of a tensor that must keep its size, for a reason a user can read."""
        label = self._count
        self._count += 1
        self._reasons[label] = reason
        return torch.tensor(label).expand(shape)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """From now on the labels that meet at the same position stand for the same channel. Shapes broadcast."""
        a, b = torch.broadcast_tensors(a, b)
        if a.numel() == 0:
            return
        for d in range(a.ndim - 1, -1, -1):
            if (a.stride(d) == 0 and b.stride(d) == 0) or a.shape[d] == 1:
                a, b = a.select(d, 0), b.select(d, 0)
        a, b = a.reshape(-1), b.reshape(-1)
        if a.numel() > 4096:
            # One number per pair: sorting rows of two takes thirty times as long.
            pairs = torch.unique(a * self._count + b)
            a, b = pairs // self._count, pairs % self._count
        self._left.append(a)
        self._right.append(b)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """These channels stay."""
        self.tie(labels, self.frozen((), reason))

    def cuts_removable(self) -> bool:
        """Whether anything was cut that can go."""
        if not self.cuts:
            return False
        classes, reasons = self.resolve()
        return not np.isin(classes[torch.cat(self.cuts).numpy()], list(reasons)).all()

    def resolve(self) -> tuple[NDArray[np.int64], dict[int, str]]:
        """The class of every label, (labels,), and the reason of every class that is frozen (the first one given)."""
        left = torch.cat(self._left).numpy() if self._left else np.zeros(0, dtype=np.int64)
        right = torch.cat(self._right).numpy() if self._right else np.zeros(0, dtype=np.int64)
        real = (left != NEUTRAL) & (right != NEUTRAL)
        left, right = left[real], right[real]
        ties = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(self._count, self._count))
        classes = connected_components(ties, directed=False)[1].astype(np.int64)
        reasons: dict[int, str] = {}
        for label, reason in self._reasons.items():
            reasons.setdefault(int(classes[label]), reason)
        reasons[int(classes[NEUTRAL])] = "single position"
        return classes, reasons


def varies(labels: Tensor, dim: int) -> bool:
    """Whether positions along `dim` carry labels of their own."""
    return labels.shape[dim] > 1 and labels.stride(dim) != 0


def core(labels: Tensor) -> tuple[Tensor, int]:
    """The labels without their stride-0 dimensions, flat, and how often each of them stands."""
    repeat = 1
    if labels.numel() == 0:
        return labels.reshape(-1), 1
    for d in range(labels.ndim - 1, -1, -1):
        if not varies(labels, d):
            repeat *= labels.shape[d]
            labels = labels.select(d, 0)
    return labels.reshape(-1), repeat


def compact(labels: Tensor) -> Tensor:
    """The same labels with stride 0 along every dimension in which they do not change (a copy by reshape loses that)."""
    if labels.numel() == 0:
        return labels
    for d in range(labels.ndim):
        if varies(labels, d):
            first = labels.narrow(d, 0, 1)
            if bool((labels == first).all()):
                labels = first.expand(labels.shape)
    return labels
