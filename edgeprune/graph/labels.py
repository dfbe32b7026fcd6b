"""Integer labels for channels, the ties between them, and the reasons why some must stay.

A label tensor has the shape of the tensor it describes; along dimensions where all positions share a label it is expanded
(stride 0), so that a feature map costs one label per channel. Label 0 is neutral: it names nothing and ties to nothing. Ties are
collected while the network runs and resolved once at the end by connected components, so the whole costs linear time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEUTRAL = 0
_PIECE = 2**20


class Mixed(NamedTuple):
    """An operation over the set of channels: channels.Mixing, with the labels (positions,) of each (argument, axis) it reads."""

    op: str
    ordinal: int
    reads: tuple[tuple[int, int, Tensor], ...]
    output_axes: tuple[int, ...]


class Place(NamedTuple):
    """Where an operation cuts, pads, splits or fills an axis with channels, and the code may hold a number for it.

    `labels`: (n,) along `axis` of what it reads, or makes where it pads or fills; `bounds`: the positions on it. `silent`: a wrong
    number could go unnoticed, because the sizes may agree all the same.
    """

    op: str
    ordinal: int
    axis: int
    labels: Tensor
    bounds: tuple[int, ...]
    silent: bool

    @property
    def key(self) -> str:
        """Names the operation: its name, and how many of this name ran before it."""
        return f"{self.op} {self.ordinal}"


class Labels:
    """Hands out labels and collects what is tied, what is frozen, and which operations compute over the set of channels.

    `may_cut`: whether a cut through channels takes its channels with it or freezes them.
    """

    def __init__(self, *, may_cut: bool = True) -> None:
        self.may_cut = may_cut
        self.places: list[Place] = []
        self.mixed: list[Mixed] = []
        self._count = 1
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._reasons: dict[int, str] = {}
        self._equal: list[tuple[Tensor, ...]] = []

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
        if a.numel() == 0:  # no boxes were found, say: nothing meets
            return
        for d in range(a.ndim - 1, -1, -1):
            if (a.stride(d) == 0 and b.stride(d) == 0) or a.shape[d] == 1:
                a, b = a.select(d, 0), b.select(d, 0)
        a, b = a.reshape(-1), b.reshape(-1)
        if a.numel() > 4096:
            # One number per pair: sorting rows of two takes thirty times as long. Piece by piece, because sorting takes memory.
            pieces = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
            pairs = [torch.unique(x * self._count + y) for x, y in pieces]
            met = torch.unique(torch.cat(pairs)) if len(pairs) > 1 else pairs[0]
            a, b = met // self._count, met % self._count
        self._left.append(a)
        self._right.append(b)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """These channels stay."""
        self.tie(labels, self.frozen((), reason))

    def balance(self, parts: Sequence[Tensor]) -> None:
        """As many channels of every part, (n,) each, must stay; which of them is free."""
        self._equal.append(tuple(parts))

    def resolve(self) -> tuple[NDArray[np.int64], dict[int, str]]:
        """The class of every label, (labels,), and the reason of every class that is frozen (the first one given)."""
        left = torch.cat(self._left).numpy() if self._left else np.zeros(0, dtype=np.int64)
        right = torch.cat(self._right).numpy() if self._right else np.zeros(0, dtype=np.int64)
        real = (left != NEUTRAL) & (right != NEUTRAL)
        left, right = left[real], right[real]
        classes = _components(left, right, self._count)
        for parts in self._equal:
            blocked = np.unique(classes[[NEUTRAL, *self._reasons]])
            more = _balancing([classes[p.numpy()] for p in parts], blocked)
            if len(more):
                classes = _components(more[:, 0], more[:, 1], int(classes.max()) + 1)[classes]
        reasons: dict[int, str] = {}
        for label, reason in self._reasons.items():
            reasons.setdefault(int(classes[label]), reason)
        reasons[int(classes[NEUTRAL])] = "single position"
        return classes, reasons


def _components(left: NDArray[np.int64], right: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The connected component of each of `n` labels, (n,), counted from 0: roots hook onto smaller ones until every tie joins equals.

    SciPy has this too, but importing it takes as long as tracing a ResNet.
    """
    root = np.arange(n)
    while (apart := root[left] != root[right]).any():
        left, right = root[left[apart]], root[right[apart]]
        np.minimum.at(root, np.maximum(left, right), np.minimum(left, right))
        while (up := root[root]).tobytes() != root.tobytes():
            root = up
    classes: NDArray[np.int64] = np.unique(root, return_inverse=True)[1]
    return classes


def _balancing(parts: list[NDArray[np.int64]], blocked: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs of classes to merge, (pairs, 2), until every class has as many positions in each part; what is left over meets a blocked one.

    For two parts classes with opposite surpluses are merged first, then runs whose surpluses cancel. More parts meet position by position.
    """
    if len(parts) != 2:
        return np.concatenate([np.stack([parts[0], p], 1) for p in parts[1:]])
    everything = np.concatenate(parts)
    order = list(dict.fromkeys(everything[~np.isin(everything, blocked)].tolist()))
    n = int(everything.max()) + 1
    surplus = np.bincount(parts[0], minlength=n) - np.bincount(parts[1], minlength=n)
    waiting: dict[int, list[int]] = {}
    pairs: list[tuple[int, int]] = []
    for c in (c for c in order if surplus[c]):
        opposite = waiting.get(-int(surplus[c]))
        if opposite:
            pairs.append((opposite.pop(0), c))
        else:
            waiting.setdefault(int(surplus[c]), []).append(c)
    rest = sorted((c for cs in waiting.values() for c in cs), key=order.index)
    ahead, behind = [c for c in rest if surplus[c] > 0], [c for c in rest if surplus[c] < 0]
    run: list[int] = []
    total = 0
    while ahead or behind:
        more = ahead if (total <= 0 and ahead) or not behind else behind
        run.append(more.pop(0))
        total += int(surplus[run[-1]])
        if total == 0:
            pairs += pairwise(run)
            run = []
    pairs += [(c, int(blocked[0])) for c in run]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


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


def counted(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels that occur, (n,), and how often, in memory for the largest label instead of for all positions."""
    counts = torch.bincount(labels)
    found = counts.nonzero()[:, 0]
    return found, counts[found]


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
