from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune.train.moments import Moments, conv_patches, sampled_places


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CONVS: list[tuple[Any, ...]] = [
    (F.conv1d, (2, 4, 17), (5, 4, 3), ([2], [1], [2])),
    (F.conv2d, (2, 4, 9, 7), (5, 4, 3, 2), ([2, 1], [1, 0], [1, 3])),
    (F.conv2d, (2, 4, 6, 6), (5, 4, 1, 1), ([1], [0], [1])),
    (F.conv3d, (2, 3, 5, 6, 4), (2, 3, 2, 3, 1), ([1, 2, 1], [1, 1, 0], [1, 1, 1])),
]


@pytest.mark.parametrize(("function", "size", "shape", "convolution"), CONVS)
def test_patches_times_weights_are_what_the_conv_computes(
    function: Any, size: tuple[int, ...], shape: tuple[int, ...], convolution: tuple[list[int], list[int], list[int]]
) -> None:
    x, weight = noise(*size), noise(*shape, seed=1)
    out = function(x, weight, None, *convolution)
    places = sampled_places(out.shape[2:], 7, seed=3)
    patches = conv_patches(x, weight, convolution, out.shape[2:], places)
    assert patches.shape == (2, len(places), shape[1], weight[0, 0].numel())
    computed = torch.einsum("npck,ock->nop", patches, weight.flatten(2))
    assert torch.allclose(computed, out.flatten(2)[:, :, places], atol=1e-12)


def test_places_are_a_sample_without_repetition() -> None:
    places = sampled_places((8, 8), 16, seed=1)
    assert len(set(places.tolist())) == 16 and places.tolist() == sorted(places.tolist()) and int(places.max()) < 64
    assert torch.equal(places, sampled_places((8, 8), 16, seed=1)) and not torch.equal(places, sampled_places((8, 8), 16, seed=2))
    assert sampled_places((2, 3), 16, seed=0).tolist() == list(range(6))


def test_moments_are_those_of_numpy_however_the_rows_are_cut() -> None:
    rows = noise(50, 2, 5) + 3
    moments = Moments(2, 5)
    for part in rows.split(17):
        moments.add(part)
    for group in range(2):
        x = rows[:, group].numpy()
        np.testing.assert_allclose(moments.covariance()[group], np.cov(x.T, bias=True), atol=1e-12)
        np.testing.assert_allclose(moments.mean()[group], x.mean(axis=0), rtol=1e-12)
    assert (Moments(1, 3).covariance() == 0).all() and (Moments(1, 3).mean() == 0).all()


def test_a_large_mean_does_not_drown_a_small_variance() -> None:
    rows = 1e-3 * noise(4000, 1, 6) + 5
    moments = Moments(1, 6)
    for part in rows.float().split(500):
        moments.add(part)
    np.testing.assert_allclose(moments.covariance()[0], np.cov(rows[:, 0].T.numpy(), bias=True), atol=1e-8)
    assert moments.rounding == torch.finfo(torch.float32).eps


def test_two_sets_of_moments_add_up_to_those_of_all_rows() -> None:
    rows = noise(60, 2, 5) + torch.arange(60)[:, None, None] / 10
    parts = [Moments(2, 5) for _ in range(3)]
    for moments, part in zip(parts, (rows[:25], rows[25:], rows), strict=True):
        moments.add(part, images=5)
    for both in (parts[0] + parts[1], parts[0] + parts[1] + Moments(2, 5), Moments(2, 5) + parts[2]):
        assert torch.allclose(both.covariance(), parts[2].covariance(), atol=1e-12)
        assert torch.allclose(both.mean(), parts[2].mean(), atol=1e-12)


def test_rows_of_one_image_count_by_how_much_they_differ() -> None:
    def counted(share: float, parts: int = 1) -> float:
        """Of 400 images with 16 rows each, whose images make up so much of the variance."""
        images = noise(400, 1, 1, 6).expand(400, 16, 1, 6) * share**0.5 + noise(400, 16, 1, 6, seed=1) * (1 - share) ** 0.5
        moments = Moments(1, 6)
        for part in images.chunk(parts):
            moments.add(part.flatten(0, 1) + 3, images=len(part))
        return moments.independent_rows()

    assert counted(1) == 400
    assert counted(0) == pytest.approx(6400, rel=0.1)
    assert counted(0.2) == pytest.approx(6400 / (1 + 15 * 0.2), rel=0.1)  # Kish's design effect
    assert counted(0.2, parts=7) == pytest.approx(counted(0.2), rel=1e-9)
    one_each = Moments(1, 6)
    one_each.add(noise(50, 1, 6))
    assert one_each.independent_rows() == 50
