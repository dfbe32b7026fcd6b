"""Weights on grids: whole numbers times one scale per output channel, the scale chosen for the least squared error.

A grid of b bits has the values -2^(b-1) … 2^(b-1) - 1, of 8 bits -127 … 127 (the products of u8 and s8 then fit the kernels'
intermediate sums more often). Below 8 bits the scale that just covers the largest weight is not the best: a few large weights would
cost all others their precision, so some tenths of it are tried and the one with the least squared error is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_SHARES = np.linspace(1.0, 0.4, 25)  # of the scale that covers the largest weight
# A dead channel needs some scale, and int32 must hold the bias in units of the scale.
_LEAST_SCALE = 1e-12


def on_grid(weight: Floats, bits: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int8], Floats]:
    """(whole numbers, in the weight's shape; scales (channels,)): weight (channels, …) on grids of `bits` (channels,)."""
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    width = np.asarray(bits, dtype=np.int64)
    low, high = _ends(width)
    covering = np.maximum(np.abs(rows).max(axis=1) / high, _LEAST_SCALE)
    scale, least = covering, np.full(len(rows), np.inf)
    for share in _SHARES if (width < 8).any() else _SHARES[:1]:
        tried = np.where(width < 8, covering * share, covering)
        error = np.square(_rounded(rows, tried, low, high) * tried[:, None] - rows).sum(axis=1)
        scale, least = np.where(error < least, tried, scale), np.minimum(error, least)
    scale = scale.astype(np.float32)
    return _rounded(rows, scale.astype(np.float64), low, high).astype(np.int8).reshape(weight.shape), scale


def restored(values: NDArray[np.int8], scale: Floats) -> Floats:
    """The weights that values and scales stand for."""
    return np.asarray(values * scale.reshape(-1, *[1] * (values.ndim - 1)), dtype=np.float32)


def grid_errors(weight: Floats, widths: Sequence[int]) -> NDArray[np.float64]:
    """(channels, widths): squared error of each channel's weights on the grid of each width in bits."""
    return np.stack([squared_errors(weight, *on_grid(weight, [bits] * len(weight))) for bits in widths], axis=1)


def squared_errors(weight: Floats, values: NDArray[np.int8], scale: Floats) -> NDArray[np.float64]:
    """(channels,): sum of squared differences between weights and what stands for them."""
    difference = (restored(values, scale) - weight).astype(np.float64)
    return np.asarray(np.square(difference).reshape(len(weight), -1).sum(axis=1))


def _ends(bits: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    high = 2 ** (bits - 1) - 1
    return np.where(bits < 8, -high - 1, -high), high


def _rounded(rows: NDArray[np.float64], scale: NDArray[np.float64], low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(np.clip(np.rint(rows / scale[:, None]), low[:, None], high[:, None]))
