"""What least squares need to know of a layer: the second moments of what it reads, at sampled positions, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def sampled_places(spatial: Sequence[int], count: int, seed: int) -> Tensor:
    """At most `count` positions of a map of this size, as ascending flat numbers (places,); the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(int(np.prod(spatial)), generator=generator)[:count].sort().values


def conv_patches(x: Tensor, weight: Tensor, convolution: Sequence[Sequence[int]], spatial: Sequence[int], places: Tensor) -> Tensor:
    """What a conv reads at some positions of its output: (images, places, input channels, taps of the kernel).

    x (images, channels, *size) with 1, 2 or 3 spatial axes; `convolution`: its stride, padding and dilation as lists; `spatial`: the
    size of its output, which the flat numbers `places` count through. Reads only these patches: unfolding whole maps would be
    hundreds of times the memory.
    """
    kernel = weight.shape[2:]
    stride, padding, dilation = (list(v) * len(kernel) if len(v) == 1 else list(v) for v in convolution)
    padded = F.pad(x, [p for p in reversed(padding) for _ in (0, 1)])
    starts = np.stack(np.unravel_index(places.numpy(), tuple(spatial)), axis=1) * stride
    taps = np.stack(np.unravel_index(np.arange(kernel.numel()), tuple(kernel)), axis=1) * dilation
    at = np.ravel_multi_index(tuple(np.moveaxis(starts[:, None] + taps, -1, 0)), tuple(padded.shape[2:]))
    return padded.flatten(2)[:, :, torch.from_numpy(at).to(x.device)].transpose(1, 2)


class Moments:
    """First and second moments of rows (rows, groups, columns), one set per conv group, kept in float64.

    Sums are taken about the mean of the first batch: about zero, a column whose mean is large beside its spread would lose its
    variance to rounding.
    """

    def __init__(self, groups: int, columns: int) -> None:
        self.rounding = torch.finfo(torch.float64).eps
        """Relative error of one product: that of the least precise rows added."""
        self._rows = self._images = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(groups, columns, dtype=torch.float64)
        self._squares = torch.zeros(groups, columns, columns, dtype=torch.float64)
        self._image_squares = torch.zeros(groups, columns, dtype=torch.float64)

    def add(self, rows: Tensor, images: int | None = None) -> None:
        """Products are made in the rows' own precision, float32 at least; sums of batches in float64.

        `images`: from how many images the rows come, equally many from each, one image after the other (None: one row each).
        """
        x = (rows if rows.dtype == torch.float64 else rows.float()).movedim(0, 1)
        self.rounding = max(self.rounding, torch.finfo(x.dtype).eps)
        if self._shift is None:
            self._shift = x.mean(1)
        x = x - self._shift[:, None].to(x.dtype)
        self._rows += x.shape[1]
        self._images += images or x.shape[1]
        self._image_squares += x.unflatten(1, (images or x.shape[1], -1)).mean(2).double().square().sum(1).cpu()
        self._sum += x.sum(1).double().cpu()
        self._squares += (x.transpose(1, 2) @ x).double().cpu()

    def __add__(self, other: Moments) -> Moments:
        """The moments of the rows of both, about this one's shift."""
        both = Moments(*self._sum.shape)
        both.rounding = max(self.rounding, other.rounding)
        first, second = (self, other) if self._shift is not None else (other, self)
        both._rows, both._shift = first._rows + second._rows, first._shift
        both._images = first._images + second._images
        both._sum, both._squares, both._image_squares = first._sum.clone(), first._squares.clone(), first._image_squares.clone()
        if first._shift is not None and second._shift is not None:
            apart = (second._shift.double() - first._shift.double()).cpu()
            cross = second._sum[:, :, None] * apart[:, None, :]
            both._sum += second._sum + second._rows * apart
            both._squares += second._squares + cross + cross.transpose(1, 2) + second._rows * apart[:, :, None] * apart[:, None, :]
        return both

    def independent_rows(self) -> float:
        """How many independent rows would tell as much: rows of one image are alike, by as much as means of images differ.

        The variance of a mean over m rows is that of single rows / m if they are independent, and the same if they are equal: the
        design effect of cluster sampling (Kish, "Survey Sampling", 1965), here averaged over the columns.
        """
        away = self._sum / max(1, self._rows)
        rows = self.covariance().diagonal(dim1=1, dim2=2)
        means = self._image_squares / max(1, self._images) - away.square()
        varying = rows > 1e-12 * rows.max()
        alike = float((means[varying] / rows[varying]).mean()) if varying.any() else 1.0
        return min(max(self._images / max(alike, 1e-12), self._images), self._rows)

    def covariance(self) -> Tensor:
        """Mean outer product of the rows about their mean, (groups, columns, columns)."""
        away = self._sum / max(1, self._rows)
        return self._squares / max(1, self._rows) - away[:, :, None] * away[:, None, :]

    def mean(self) -> Tensor:
        """Mean of the rows, (groups, columns)."""
        shift = torch.zeros_like(self._sum) if self._shift is None else self._shift.double().cpu()
        return shift + self._sum / max(1, self._rows)
