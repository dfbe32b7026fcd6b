from __future__ import annotations

import numpy as np
import pytest

from edgeprune.quantize.grid import grid_errors, on_grid, restored, squared_errors

WEIGHT = np.random.default_rng(0).normal(size=(5, 4, 3, 3)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_values_lie_on_the_grid_of_their_bits(bits: int) -> None:
    values, scale = on_grid(WEIGHT, [bits] * 5)
    assert values.dtype == np.int8 and scale.shape == (5,)
    low = -127 if bits == 8 else -(2 ** (bits - 1))
    assert values.min() >= low and values.max() <= 2 ** (bits - 1) - 1
    assert len(np.unique(values[0])) <= 2**bits


def test_each_channel_has_its_own_bits() -> None:
    values, _ = on_grid(WEIGHT, [2, 8, 2, 8, 2])
    assert [np.abs(v).max() > 2 for v in values] == [False, True, False, True, False]


def test_more_bits_are_closer_and_the_searched_scale_beats_the_covering_one() -> None:
    errors = grid_errors(WEIGHT, (2, 3, 4, 6, 8))
    assert (np.diff(errors, axis=1) < 0).all()
    rows = WEIGHT.reshape(5, -1)
    covering = np.abs(rows).max(axis=1, keepdims=True)  # the largest of 2 bits is 1
    plain = np.square(np.clip(np.rint(rows / covering), -2, 1) * covering - rows).sum(axis=1)
    assert (errors[:, 0] <= plain + 1e-6).all() and (errors[:, 0] < 0.9 * plain).any()


def test_a_dead_channel() -> None:
    values, scale = on_grid(np.zeros((2, 3), np.float32), [8, 4])
    assert not values.any() and (scale > 0).all()
    assert not squared_errors(np.zeros((2, 3), np.float32), values, scale).any()
    assert restored(values, scale).dtype == np.float32
