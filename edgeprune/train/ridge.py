"""Least squares for one layer: the weights that give its wanted outputs best, pulled towards weights that are known to be fair."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edgeprune.train.moments import Moments

RECTIFY_ROUNDS = 3
KEPT_BYTES = 512 << 20


class Affine(NamedTuple):
    """z = gain * y + shift, for each output; `inverse` is 1 / gain, or 0 where a norm hardly passes an output on."""

    gain: Tensor
    shift: Tensor
    inverse: Tensor


class Fit:
    """Ridge regression of a layer's wanted outputs on its inputs, pulled towards `present` (groups, outputs, values), per conv group.

    `ridge`: the strength of the pull, as a share of the mean variance of the inputs. `free`: the intercept may be anything, else it is 0.
    After `solve`: `weight` (groups, outputs, values), `intercept` (groups, outputs).
    """

    def __init__(self, present: Tensor, ridge: float, *, free: bool) -> None:
        self.free = free
        self.weight = present.double()
        self.intercept = torch.zeros(present.shape[:2], dtype=torch.float64)
        self._ridge = ridge
        self._moments = Moments(present.shape[0], present.shape[1] + present.shape[2])
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._bytes = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x (rows, groups, values), y (rows, groups, outputs); those of the first half gigabyte are kept to look at again."""
        self._moments.add(torch.cat([x, y], dim=2))
        if self._bytes < KEPT_BYTES:
            self._bytes += 4 * x.numel()
            self._seen.append((x, y))

    def solve(self) -> None:
        """The weights and the intercept that fit best."""
        second, mean = self._moments.covariance(), self._moments.mean()
        if not self.free:
            second = second + mean[:, :, None] * mean[:, None, :]
        values = self.weight.shape[2]
        xx, xy = second[:, :values, :values], second[:, :values, values:]
        pull = _pull(xx, self._ridge)
        self._factor = torch.linalg.cholesky(xx + pull * torch.eye(values, dtype=torch.float64))
        self._mean = mean[:, None, :values]
        self.weight = torch.cholesky_solve(xy + pull * self.weight.transpose(1, 2), self._factor).transpose(1, 2)
        if self.free:
            self.intercept = mean[:, values:] - (self._mean @ self.weight.transpose(1, 2))[:, 0]

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
    return (ridge * second.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12))[:, None, None]
