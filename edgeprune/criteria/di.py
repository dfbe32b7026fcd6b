"""Discriminant information (DI): how much of the labels a ridge regression on a layer's features explains, and each channel's part of it.

Formula, features X (images, M) and targets Y (images, K) centred to Xb and Yb, scatter S = Xb'Xb:
    DI = tr((S + rho I)^-1 Xb'Yb Yb'Xb) = ||Yb||^2 - min_W (||Yb - Xb W||^2 + rho ||W||^2),   W = (S + rho I)^-1 Xb'Yb
mode="pooled" (default): one feature a channel, the mean of its map; sums over all images. order="drop": the exact loss of leaving the
channel out, ||W_c||^2 / (S + rho I)^-1_cc, all from one inverse. order="greedy": channels are removed one at a time, the least
loss first, the inverse downdated; s_c = what is lost in all when c goes, so the order of the scores is the order of removal (of two
equal channels the second is dear). order="gradient": 2 rho ||W_c||^2. rho is `rho` (1) times tr(S) / M, fixed for a layer: with much
less, features that are faint everywhere are rated as high as strong ones, though the network makes little use of them.
mode="maps": every pixel a feature, one batch at a time, mean over batches. order="gradient" (default, the published code's score, the
derivative by a factor on the channel): 2 rho ||W_c||^2 from K = Xb Xb' + rho I, in closed form. order="drop": the exact loss of
leaving the channel's block out. rho is absolute (0.1).
targets="labels": Y is one-hot; labels="unit" scales its columns to length 1 (S_B is then Fisher's between-class scatter), "onehot" does
not. targets="outputs": Y is what the dense network returns, flattened; no labels needed.
Rules: pooled, classes with fewer than 2 images have no column, and fewer than 2 columns are a DataError; maps, batches in which all
targets are equal are passed over, and it is a DataError if there is no other. A dead channel has 0, a dead layer 0 everywhere. A layer
on another batch axis than the images is worth the same everywhere. A group of several layers has the mean of their scores, each
divided by its layer's mean.
Cost: pooled images M^2 + M^3 per layer, greedy M^3; maps B^2 M + B M K per batch of B, drop C min(B, h w)^3 more. `maps` with
`outputs` keeps the maps of one batch.
Source: Hou, Kung, "A Feature-map Discriminant Perspective for Pruning Deep Neural Networks", arXiv 2005.13796 (2020), and the first
author's public code.
We differ in: features are taken where the next layer reads them, the code takes conv outputs before the batch norm; pooled features,
the exact losses, the greedy order and targets from outputs are ours. The paper's structure distillation was not recoverable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edgeprune.criteria.nuclear_norm import layers_to_groups
from edgeprune.criteria.probe import Probe, Statistic, View
from edgeprune.criteria.screening import ROUNDING, checked_labels
from edgeprune.errors import DataError, UsageError
from edgeprune.graph import ChannelGraph
from edgeprune.graph.running import tensors_in
from edgeprune.plan import Scores

NEEDS = ("maps", "labels")
PAPER = (
    "Hou and Kung, A Feature-map Discriminant Perspective for Pruning Deep Neural Networks, arXiv 2005.13796 "
    "(reconstructed from its abstract and code)"
)
Key = tuple[str, int]
CHUNK_BYTES = 32 << 20
OPTIONS = {
    "mode": ("pooled", "maps"),
    "order": ("", "drop", "greedy", "gradient"),
    "labels": ("onehot", "unit"),
    "targets": ("labels", "outputs"),
}


def score(graph: ChannelGraph, probe: Probe, **options: Any) -> Scores:
    """What DI loses with each channel, in units of the targets' energy, >= 0, higher = keep. Shapes: maps (n, c, h, w) -> (c,)."""
    return probe.gather(statistic(graph, probe, **options))[0]


def statistic(
    graph: ChannelGraph,
    probe: Probe,
    *,
    mode: str = "pooled",
    order: str = "",
    labels: str = "onehot",
    targets: str = "labels",
    rho: float = 0.0,
) -> Statistic:
    """The running sums; an empty `order` and rho = 0 take the mode's default. Raises UsageError for what does not exist."""
    for name, value in (("mode", mode), ("order", order), ("labels", labels), ("targets", targets)):
        if value not in OPTIONS[name]:
            raise UsageError(f"{name} must be one of {', '.join(filter(None, OPTIONS[name]))}, got {value!r}.")
    if not 0 <= rho < float("inf"):
        raise UsageError(f"rho must be a positive number (0: the default of the mode), got {rho!r}.")
    if mode == "pooled":
        return _Pooled(graph, probe, order=order or "drop", unit=labels == "unit", outputs=targets == "outputs", rho=rho or 1.0)
    if order == "greedy":
        raise UsageError("order greedy needs mode pooled: in mode maps every batch would have an order of its own.")
    return _Maps(graph, probe, order=order or "gradient", unit=labels == "unit", outputs=targets == "outputs", rho=rho or 0.1)


class Moments:
    """Running sums of features x (n, m) and targets y (n, k), float64; k may grow. What DI needs of any number of images."""

    def __init__(self) -> None:
        self.n = 0
        self._shift: Tensor = torch.empty(0)
        self._scale = self._x = self._y = self._yy = self._xx = self._xy = torch.empty(0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """One batch."""
        x, y = x.double(), y.double()
        if not self.n:
            self._shift = x.mean(dim=0)
            m, k = x.shape[1], y.shape[1]
            self._x, self._xx, self._xy = x.new_zeros(m), x.new_zeros(m, m), x.new_zeros(m, k)
            self._y, self._yy, self._scale = x.new_zeros(k), x.new_zeros(k), x.new_zeros(m)
        if more := y.shape[1] - len(self._y):
            self._y, self._yy, self._xy = (_wider(t, more) for t in (self._y, self._yy, self._xy))
            y = _wider(y, -more)
        self._scale = torch.maximum(self._scale, x.abs().amax(dim=0))
        x = x - self._shift  # no figure sees it; it saves digits
        self.n += len(x)
        self._x += x.sum(dim=0)
        self._y += y.sum(dim=0)
        self._yy += (y * y).sum(dim=0)
        self._xx.addmm_(x.T, x)
        self._xy.addmm_(x.T, y)

    def centred(self, *, unit: bool = False, classes: bool = True) -> tuple[Tensor, Tensor, float]:
        """(Xb'Xb, Xb'Yb, ||Yb||^2). `unit`: columns of Y brought to length 1. `classes`: Y is one-hot, columns with less than 2 go."""
        mean = self._x / self.n
        xx = self._xx - self.n * torch.outer(mean, mean)
        xy = self._xy - torch.outer(mean, self._y)
        live = (xx.diagonal() > self.n * (ROUNDING * self._scale) ** 2).double()  # else what rounding left of a constant
        xx, xy = xx * torch.outer(live, live), xy * live[:, None]
        yy = self._yy - self._y**2 / self.n
        used = self._y >= 2 if classes else self._yy > 0
        if classes and int(used.sum()) < 2:
            raise DataError(
                f"{self.n} images of {int((self._y > 0).sum())} classes are too few to tell classes apart: give at least 2 images of "
                "each of at least 2 classes."
            )
        length = self._yy[used].sqrt() if unit else torch.ones_like(self._yy[used])
        return xx, xy[:, used] / length, float((yy[used] / length**2).sum())


def information(scatter: Tensor, cross: Tensor, rho: float) -> float:
    """DI of features with scatter Xb'Xb (m, m) and cross moments Xb'Yb (m, k): the energy of the targets that ridge explains."""
    return float((cross * torch.cholesky_solve(cross, torch.linalg.cholesky(_ridged(scatter, rho)))).sum())


def drops(scatter: Tensor, cross: Tensor, rho: float) -> Tensor:
    """(m,): how much DI falls when one feature is left out, exactly, for every feature from one inverse."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_ridged(scatter, rho)))
    return (inverse @ cross).square().sum(dim=1) / inverse.diagonal()


def losses_in_order(scatter: Tensor, cross: Tensor, rho: float) -> Tensor:
    """(m,): DI lost in all when the feature goes, where features go one at a time, always the one with the least loss."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_ridged(scatter, rho)))
    weights = inverse @ cross
    left, result, lost = torch.arange(len(inverse), device=inverse.device), inverse.new_zeros(len(inverse)), 0.0
    while len(left):
        loss = weights.square().sum(dim=1) / inverse.diagonal()
        first = int(loss.argmin())
        lost += float(loss[first])
        result[left[first]] = lost
        rest = torch.arange(len(left), device=left.device) != first
        column = inverse[rest, first] / inverse[first, first]
        weights = weights[rest] - torch.outer(column, weights[first])
        inverse = inverse[rest][:, rest] - torch.outer(column, inverse[first, rest])
        left = left[rest]
    return result


def maps_gradient(maps: Tensor, targets: Tensor, rho: float) -> Tensor:
    """(c,): dDI / d(a factor on the channel) at 1, 2 rho ||W_c||^2, of one batch: maps (b, c, h, w), centred targets (b, k)."""
    x, _, a = _dual(maps, targets, rho)
    return torch.cat([(part.mT @ a).square().sum(dim=(1, 2)) for part in _chunks(x)]) * (2 * rho)


def maps_drops(maps: Tensor, targets: Tensor, rho: float) -> Tensor:
    """(c,): how much DI falls when all pixels of one channel are left out, exactly, of one batch."""
    x, kernel, a = _dual(maps, targets, rho)
    parts = []
    for part in _chunks(x):  # (channels, b, p)
        if part.shape[2] <= part.shape[1]:
            w = part.mT @ a
            eye = torch.eye(part.shape[2], dtype=part.dtype, device=part.device)
            found = w * torch.linalg.solve(eye - part.mT @ torch.linalg.solve(kernel, part), w)
        else:  # the same by the matrix of the images
            gram = part @ part.mT
            found = targets.double() * torch.linalg.solve(kernel - gram, gram @ a)
        parts.append(found.sum(dim=(1, 2)))
    return torch.cat(parts).clamp(min=0) * rho


def _ridged(scatter: Tensor, rho: float) -> Tensor:
    return scatter + rho * torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device)


def _dual(maps: Tensor, targets: Tensor, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """The centred maps (c, b, p) in their own type, K = Xb Xb' + rho I and K^-1 Yb in float64."""
    x = maps.flatten(2).transpose(0, 1)
    x = x - x.mean(dim=1, keepdim=True)
    kernel = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in _chunks(x):
        flat = part.transpose(0, 1).flatten(1)
        flat = flat - flat.mean(dim=0)  # what rounding left in the maps' own type
        kernel.addmm_(flat, flat.T)
    kernel = _ridged(kernel, rho)
    return x, kernel, torch.linalg.solve(kernel, targets.double())


def _chunks(x: Tensor) -> list[Tensor]:
    """Channels in float64, a few at a time."""
    return [part.double() for part in x.split(max(1, CHUNK_BYTES // (8 * x.shape[1] * x.shape[2])))]


def _wider(table: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(table, (0, columns)) if columns > 0 else table


class _Discriminant(Statistic):
    """What both modes share: targets of a batch, options, and how layers make groups."""

    def __init__(self, graph: ChannelGraph, probe: Probe, *, order: str, unit: bool, outputs: bool, rho: float) -> None:
        self._graph, self._probe, self._order, self._unit, self._outputs, self._rho = graph, probe, order, unit, outputs, rho

    def _targets(self, outputs: Any, labels: Tensor | None, n: int) -> Tensor:
        """(images, k) float64."""
        if not self._outputs:
            return torch.nn.functional.one_hot(checked_labels(labels, n)).double()
        found = next(tensors_in(outputs))
        if not found.ndim or len(found) != n or not bool(torch.isfinite(found.sum())):
            raise DataError(f"targets=outputs needs finite outputs for every image, got shape {tuple(found.shape)} for {n} images.")
        return found.detach().reshape(n, -1).double()

    def _scores(self, rows: Mapping[Key, Tensor], facts: dict[str, Any]) -> Scores:
        arrays = {key: row.cpu().numpy() for key, row in rows.items()}
        return layers_to_groups(self._graph, self._probe, arrays, Scores("di", {}, facts))


class _Pooled(_Discriminant):
    """Moments of pooled maps and targets over all images."""

    def __init__(self, graph: ChannelGraph, probe: Probe, **options: Any) -> None:
        super().__init__(graph, probe, **options)
        self._moments: dict[Key, Moments] = {}
        self._pooled: list[tuple[Key, Tensor, Tensor | None]] = []

    def update(self, view: View) -> None:
        """Keep the pooled maps until the outputs are known."""
        if view.aligned:
            self._pooled.append((view.key, view.pooled, view.labels))

    def finish_batch(self, outputs: Any) -> None:
        """Add the batch to the moments."""
        for key, pooled, labels in self._pooled:
            self._moments.setdefault(key, Moments()).add(pooled, self._targets(outputs, labels, len(pooled)))
        self._pooled.clear()

    def scores(self, images: int) -> Scores:
        """By the inverse of each layer's scatter."""
        rows = {}
        explained = {}
        for key, moments in self._moments.items():
            scatter, cross, energy = moments.centred(unit=self._unit, classes=not self._outputs)
            rho = self._rho * float(scatter.diagonal().mean())
            rows[key] = torch.zeros_like(scatter[0])
            explained["{}:{}".format(*key)] = 0.0
            if rho > 0:
                rows[key] = self._rows(scatter, cross, rho)
                explained["{}:{}".format(*key)] = information(scatter, cross, rho) / energy
        return self._scores(rows, {"images": images, "explained": explained})

    def _rows(self, scatter: Tensor, cross: Tensor, rho: float) -> Tensor:
        if self._order == "gradient":
            weights: Tensor = torch.linalg.solve(_ridged(scatter, rho), cross)
            return weights.square().sum(dim=1) * (2 * rho)
        return (losses_in_order if self._order == "greedy" else drops)(scatter, cross, rho)


class _Maps(_Discriminant):
    """Sums of the batches' scores of whole maps."""

    def __init__(self, graph: ChannelGraph, probe: Probe, **options: Any) -> None:
        super().__init__(graph, probe, **options)
        self._sums: dict[Key, Tensor] = {}
        self._batches: dict[Key, int] = {}
        self._kept: list[View] = []
        self._seen = False

    def update(self, view: View) -> None:
        """Add one batch; with targets from outputs, keep its maps until these are known."""
        if not view.aligned:
            return
        self._seen = True
        if self._outputs:
            self._kept.append(replace(view, maps=view.maps.clone()))  # the next operation may work in place
        else:
            self._add(view, None)

    def finish_batch(self, outputs: Any) -> None:
        """Add what was kept."""
        for view in self._kept:
            self._add(view, outputs)
        self._kept.clear()

    def _add(self, view: View, outputs: Any) -> None:
        y = self._targets(outputs, view.labels, len(view.maps))
        if self._unit:
            y = y / y.square().sum(dim=0).sqrt().clamp(min=1e-300)
        y = y - y.mean(dim=0)
        if not bool(y.any()):
            return
        found = (maps_drops if self._order == "drop" else maps_gradient)(view.maps, y, self._rho)
        self._sums[view.key] = self._sums[view.key] + found if view.key in self._sums else found
        self._batches[view.key] = self._batches.get(view.key, 0) + 1

    def scores(self, images: int) -> Scores:
        """The mean over batches."""
        if self._seen and not self._sums:
            raise DataError(
                f"in no batch of the {images} images do the {'outputs' if self._outputs else 'classes'} differ, so there is nothing to "
                "discriminate: give batches of several images of several classes, shuffled."
            )
        return self._scores({key: total / self._batches[key] for key, total in self._sums.items()}, {"images": images})
