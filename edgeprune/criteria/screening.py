"""Screening by class significance: the F-statistic of a channel's activity between classes, weighed with its weights' magnitude.

Formula, one feature z per channel and image, K classes of n_k images, N in all:
    F = [sum_k n_k (zbar_k - zbar)^2 / (K - 1)] / [sum_k sum_{i in k} (z_i - zbar_k)^2 / (N - K)]        (one-way ANOVA)
    s_c = alpha R(F_c) + (1 - alpha) R(||W_c||_1),  with R the rank in the layer / channels (`combine="rank"`, ties share their mean
    rank), log(1 + v) brought to [0, 1] ("log"), or v / max ("max"); or s_c = F_c^alpha ||W_c||_1^(1 - alpha) ("product").
z is the map's mean where the next layer reads it (`feature="mean"`), the mean of |map| ("abs") or its maximum ("max").
Rules: classes with fewer than 2 images are left out; fewer than 2 classes left is a DataError; F of a constant feature is 0; F of one
that varies between classes only is the largest finite F beside it (1 where there is none); values equal to 9 digits share their rank.
A layer that runs on another batch axis than the images has no labels: its F is the same for all channels and the magnitude decides.
A group of several layers: F, each divided by its layer's mean, and magnitudes are reduced first, then ranked, so that alpha = 0 orders
as l1 does.
Cost: images * channels after one forward pass; n_k, sum z and sum z^2 are kept, so memory does not grow with the images.
Source: Wang, Guo, S. Liu, Y. Liu, "Exploring Vision Neural Network Pruning via Screening Methodology", arXiv 2502.07189 (2025).
We differ in: only the abstract was readable. The F-statistic and its mix with a weight score are the paper's; the form of the mix,
alpha, the feature and the rules above are reconstructed. A magnitude is needed: F does not change when the feature is scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from edgeprune.criteria.probe import Probe, Statistic, View
from edgeprune.errors import DataError, UsageError
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Scores

NEEDS = ("weights", "pooled", "labels")
PAPER = "Wang et al., Exploring Vision Neural Network Pruning via Screening Methodology, arXiv 2502.07189 (reconstructed from its abstract)"

Floats = NDArray[np.float64]
ROUNDING = 1e-12  # spread below this share of the values is what rounding leaves of a constant
FEATURES: dict[str, Callable[[View], Tensor]] = {
    "mean": lambda view: view.pooled,
    "abs": lambda view: view.maps.abs().mean(dim=(2, 3)).double(),
    "max": lambda view: view.maps.amax(dim=(2, 3)).double(),
}
COMBINERS: dict[str, Callable[[Floats], Floats]] = {
    "rank": lambda v: rankdata([float(f"{x:.9g}") for x in v]) / len(v),
    "log": lambda v: _stretch(np.log1p(v)),
    "max": lambda v: v / max(float(v.max()), 1e-300),
    "product": lambda v: v,
}


class ClassMoments:
    """Running n_k, sum z and sum z^2 of features per class, float64: the one-way ANOVA of any number of batches.

    `add` batch by batch, in any split; then `f_statistic()` and `eta_squared()`, float64 (features,). Classes with fewer than 2
    samples count in neither. Features are shifted by the first batch's mean, which neither figure sees and which saves digits.
    """

    def __init__(self) -> None:
        self._shift: Tensor = torch.empty(0)
        self._scale: Tensor = torch.empty(0)
        self._n = torch.zeros(0, dtype=torch.float64)
        self._sums = torch.zeros(0)
        self._squares = torch.zeros(0)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """One batch: features (n, m) of any float type, labels (n,) whole numbers from 0. Raises DataError for other labels."""
        z = features.detach().double()
        k = checked_labels(labels, len(z)).to(z.device)
        if not len(self._n):
            self._shift, self._scale = z.mean(dim=0), torch.zeros_like(z[0])
            self._sums, self._squares = z.new_zeros(0, z.shape[1]), z.new_zeros(0, z.shape[1])
            self._n = self._n.to(z.device)
        if more := max(0, int(k.max()) + 1 - len(self._n)):
            self._n = torch.cat([self._n, self._n.new_zeros(more)])
            self._sums, self._squares = (torch.cat([t, t.new_zeros(more, t.shape[1])]) for t in (self._sums, self._squares))
        self._scale = torch.maximum(self._scale, z.abs().amax(dim=0))
        z = z - self._shift
        self._n.index_add_(0, k, torch.ones_like(k, dtype=torch.float64))
        self._sums.index_add_(0, k, z)
        self._squares.index_add_(0, k, z * z)

    @property
    def samples(self) -> int:
        """How many rows were added."""
        return int(self._n.sum())

    def f_statistic(self) -> Floats:
        """F of every feature, >= 0 and finite: 0 for a constant one, the largest finite F where only the classes differ."""
        between, within, n, k = self._scatter()
        with np.errstate(divide="ignore", invalid="ignore"):
            f = (between / (k - 1)) / (within / (n - k))
        f[(between == 0) & (within == 0)] = 0.0
        finite = f[np.isfinite(f)]
        f[~np.isfinite(f)] = float(finite.max(initial=0.0)) or 1.0
        return f

    def eta_squared(self) -> Floats:
        """The share of every feature's variance that lies between the classes, in [0, 1]; it does not grow with the samples."""
        between, within, _, _ = self._scatter()
        total = between + within
        share: Floats = between / np.where(total > 0, total, 1.0)
        return share

    def _scatter(self) -> tuple[Floats, Floats, int, int]:
        """(between, within, samples, classes) over the classes with at least 2 samples."""
        counts = self._n.cpu().numpy()
        used = counts >= 2
        n_k, n, k = counts[used][:, None], int(counts[used].sum()), int(used.sum())
        if k < 2:
            raise DataError(
                f"{self.samples} images of {int((counts > 0).sum())} classes are too few to tell classes apart: give at least 2 images of "
                "each of at least 2 classes."
            )
        sums, squares = self._sums.cpu().numpy()[used], self._squares.cpu().numpy()[used]
        noise = n * (ROUNDING * self._scale.cpu().numpy()) ** 2
        between = (sums**2 / n_k).sum(axis=0) - sums.sum(axis=0) ** 2 / n
        within = (squares - sums**2 / n_k).sum(axis=0)
        # what is left of a difference of sums is rounding where it is below their last digits
        floor = np.maximum(noise, 1e-14 * squares.sum(axis=0))
        return np.where(between > floor, between, 0.0), np.where(within > floor, within, 0.0), n, k


def checked_labels(labels: Tensor | None, n: int) -> Tensor:
    """The class numbers of n images as int64 (n,). Raises DataError where they are missing or are no class numbers."""
    if labels is None:
        raise DataError("this criterion compares classes, so it needs labels: give batches of (inputs, labels).")
    if labels.shape != (n,) or labels.is_floating_point() or labels.is_complex() or (n and int(labels.min()) < 0):
        raise DataError(
            f"labels must be one class number from 0 for each of {n} images, got {labels.dtype} of shape {tuple(labels.shape)}"
            f"{' with negative values' if labels.shape == (n,) else ''}: give an integer tensor of shape ({n},)."
        )
    return labels.long()


def score(graph: ChannelGraph, probe: Probe, **options: Any) -> Scores:
    """Significance and magnitude of each channel in one figure, float64, higher = keep. Shapes: maps (n, c, h, w) -> (c,)."""
    return probe.gather(statistic(graph, probe, **options))[0]


def statistic(graph: ChannelGraph, probe: Probe, *, alpha: float = 0.5, combine: str = "rank", feature: str = "mean") -> Statistic:
    """The running class sums. Raises UsageError for an alpha outside [0, 1] and unknown names."""
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha must lie in [0, 1] (0 = magnitude alone, 1 = F alone), got {alpha!r}.")
    for name, value, known in (("combine", combine, COMBINERS), ("feature", feature, FEATURES)):
        if value not in known:
            raise UsageError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    return _Screening(graph, probe, alpha, combine, feature)


class _Screening(Statistic):
    def __init__(self, graph: ChannelGraph, probe: Probe, alpha: float, combine: str, feature: str) -> None:
        self._graph, self._probe, self._alpha, self._combine = graph, probe, alpha, combine
        self._feature = FEATURES[feature]
        self._moments: dict[tuple[str, int], ClassMoments] = {}

    def update(self, view: View) -> None:
        """Add one batch's features to the sums of their classes."""
        if view.aligned:
            self._moments.setdefault(view.key, ClassMoments()).add(self._feature(view), checked_labels(view.labels, len(view.maps)))

    def scores(self, images: int) -> Scores:
        """F and magnitude, mixed."""
        alpha, scale = self._alpha, COMBINERS[self._combine]
        values = {}
        for group in self._graph.groups:
            norms = self._probe.reduced([p.double().abs().sum(dim=1).cpu().numpy() for p in self._probe.slices(group)])
            rows = [
                self._moments[key].f_statistic()
                for t in range(len(self._graph.taps[group.name]))
                if (key := (group.name, t)) in self._moments
            ]
            f = self._probe.reduced(rows, balance=True) if rows else np.ones(group.channels)
            if self._combine == "product":
                values[group.name] = f**alpha * norms ** (1 - alpha)
            else:
                values[group.name] = alpha * scale(f) + (1 - alpha) * scale(norms)
        return Scores("screening", values, {"images": images, "alpha": alpha})


def _stretch(v: Floats) -> Floats:
    width = float(v.max() - v.min())
    return (v - v.min()) / width if width > 0 else np.full_like(v, 0.5)
