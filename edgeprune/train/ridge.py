"""Least squares for one layer: the weights that give its wanted outputs best, pulled towards weights that are known to be fair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgeprune.train.moments import Moments

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
ASIDE = 4  # one image in so many judges the ridges
RECTIFY_ROUNDS = 3
KEPT_BYTES = 512 << 20


class Affine(NamedTuple):
    """z = gain * y + shift, for each output; `inverse` is 1 / gain, or 0 where a norm hardly passes an output on."""

    gain: Tensor
    shift: Tensor
    inverse: Tensor


class Fit:
    """Ridge regression of a layer's wanted outputs on its inputs, pulled towards `present` (groups, outputs, values), per conv group.

    How hard, of `ridges` (shares of the mean variance of the inputs), every fourth image decides: the one whose fit to the others errs
    least on these. `gain` (groups, outputs): by how much an output's error counts. `free`: the intercept may be anything, else it is 0.
    After `solve`: `weight` (groups, outputs, values), `intercept` (groups, outputs).
    """

    def __init__(self, present: Tensor, ridges: Sequence[float], gain: Tensor, *, free: bool) -> None:
        self.free = free
        self.weight = self._present = present.double()
        self.intercept = torch.zeros(present.shape[:2], dtype=torch.float64)
        self._ridges, self._gain = ridges, gain
        self._others, self._aside = (Moments(present.shape[0], present.shape[1] + present.shape[2]) for _ in range(2))
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._bytes = self._images = 0

    def add(self, x: Tensor, y: Tensor, places: int) -> None:
        """Rows x (rows, groups, values), y (rows, groups, outputs), `places` of each image; the first half gigabyte is kept to rectify."""
        images = torch.arange(self._images, self._images + len(x) // places)
        aside = (images % ASIDE == ASIDE - 1).repeat_interleave(places)
        self._images += len(images)
        rows = torch.cat([x, y], dim=2)
        for moments, theirs in ((self._others, rows[~aside]), (self._aside, rows[aside])):
            if len(theirs):
                moments.add(theirs)
        if self._bytes < KEPT_BYTES:
            self._bytes += 4 * x.numel()
            self._seen.append((x, y))

    def solve(self) -> None:
        """The weights and the intercept that fit best."""
        every = self._normal(self._others + self._aside)
        self.weight, self.intercept, self._factor = every.solved(self._ridge())
        self._mean = every.mean[:, None, : every.values]

    def _ridge(self) -> float:
        if len(self._ridges) == 1 or self._images < ASIDE:
            return self._ridges[-1]
        others, aside = self._normal(self._others), self._normal(self._aside)
        errors = [aside.error(*others.solved(ridge)[:2], self._gain) for ridge in self._ridges]
        return self._ridges[int(np.argmin(errors))]

    def _normal(self, moments: Moments) -> _Normal:
        second, mean = moments.covariance(), moments.mean()
        return _Normal(second if self.free else second + mean[:, :, None] * mean[:, None, :], mean, self._present, self.free)

    def rectify(self, affine: Affine, beside: Tensor | None, *, rounds: int = RECTIFY_ROUNDS) -> None:
        """Refit to what passes a ReLU behind z = gain * y + shift (+ beside, (rows, outputs)); layers without conv groups."""
        x, y = (torch.cat(parts)[:, 0] for parts in zip(*self._seen, strict=True))
        offset = affine.shift if beside is None else affine.shift + beside[: len(x)]
        wanted = y * affine.gain + offset
        for _ in range(rounds):
            present = (x @ self.weight[0].T.to(x.dtype) + self.intercept[0].to(x.dtype)) * affine.gain + offset
            rest = (torch.where(wanted > 0, wanted, present.clamp(max=0)) - present) * affine.inverse
            mean = rest.mean(dim=0).double()
            cross = (x.T @ rest).double() / len(x) - self._mean[0].T * mean
            step = torch.cholesky_solve(cross, self._factor[0])
            self.weight = self.weight + step.T
            self.intercept = self.intercept + mean - self._mean[0] @ step


class _Normal(NamedTuple):
    """The normal equations of a fit: second moments of inputs and wanted outputs (about the mean where the intercept is free), means."""

    second: Tensor
    mean: Tensor
    present: Tensor
    free: bool

    @property
    def values(self) -> int:
        """The number of inputs, which come before the outputs."""
        return self.present.shape[2]

    def solved(self, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (groups, outputs, values), intercepts (groups, outputs), and the Cholesky factor of what was solved."""
        n = self.values
        xx, xy = self.second[:, :n, :n], self.second[:, :n, n:]
        pull = _pull(xx, ridge)
        factor = torch.linalg.cholesky(xx + pull * torch.eye(n, dtype=torch.float64))
        weight = torch.cholesky_solve(xy + pull * self.present.transpose(1, 2), factor).transpose(1, 2)
        if self.free:
            return weight, self.mean[:, n:] - self._given(weight), factor
        return weight, torch.zeros(weight.shape[:2], dtype=torch.float64), factor

    def error(self, weight: Tensor, intercept: Tensor, gain: Tensor) -> float:
        """The squared error of such a fit on the rows of these moments, of each output times its gain; the mean over rows."""
        n = self.values
        xx, xy, yy = self.second[:, :n, :n], self.second[:, :n, n:], self.second[:, n:, n:].diagonal(dim1=1, dim2=2)
        errors = yy - 2 * (weight * xy.transpose(1, 2)).sum(2) + ((weight @ xx) * weight).sum(2)
        if self.free:
            errors = errors + (self.mean[:, n:] - self._given(weight) - intercept).square()
        return float((gain.square() * errors).sum())

    def _given(self, weight: Tensor) -> Tensor:
        """What the weights give at the mean of the inputs, (groups, outputs)."""
        return (self.mean[:, None, : self.values] @ weight.transpose(1, 2))[:, 0]


def substituted(weight: Tensor, second: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The weights of the inputs that stay, (outputs, kept), changed so that they stand in best for those that go.

    `weight` (outputs, values) of the dense layer, `second` (values, values) the second moments of its inputs, `kept` (values,) bool.
    The outputs' change is the least that any weights reach, but for a pull towards the weights as they were.
    """
    xx = second[kept][:, kept]
    factor = torch.linalg.cholesky(xx + _pull(xx[None], ridge)[0] * torch.eye(len(xx), dtype=xx.dtype))
    gain = torch.cholesky_solve(second[kept][:, ~kept], factor)
    dense = weight.double()
    return dense[:, kept] + dense[:, ~kept] @ gain.T


def _pull(second: Tensor, ridge: float) -> Tensor:
    """What is added to the diagonals, (groups, 1, 1)."""
    variance = second.diagonal(dim1=1, dim2=2).sum(1) / max(1, second.shape[1])
    return (ridge * variance.clamp(min=1e-12))[:, None, None]
