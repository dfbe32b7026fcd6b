"""Least squares for one layer, against direct transcriptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from edgeprune.train.ridge import Affine, Fit, substituted


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(("images", "strongest"), [(24, True), (2000, False)])
def test_images_aside_choose_how_hard_the_weights_are_pulled(images: int, strongest: bool, free: bool) -> None:
    """Few images and noisy outputs: the present weights, which were right, serve new ones best. Many: what is fitted to them does."""
    random = torch.Generator().manual_seed(1)
    x, noise = torch.randn(images, 1, 40, generator=random), torch.randn(images, 1, 3, generator=random)
    present, true = torch.randn(1, 3, 40, generator=random), torch.randn(1, 3, 40, generator=random)
    y = x @ (present if strongest else true).transpose(1, 2)[0] + noise
    fits = {ridges: Fit(present, ridges, torch.ones(1, 3), free=free) for ridges in ((1e-3, 0.1, 100.0), (1e-3,), (100.0,))}
    for fit in fits.values():
        for part in (slice(0, images // 3), slice(images // 3, images)):
            fit.add(x[part], y[part], places=1)
        fit.solve()
    chosen, least, most = (fit.weight for fit in fits.values())
    assert torch.equal(chosen, most if strongest else least)


@pytest.mark.parametrize("free", [True, False])
def test_the_solution_is_ridge_regression(free: bool) -> None:
    random = np.random.default_rng(0)
    x, y, present = random.normal(1, 1, (200, 6)), random.normal(size=(200, 3)), random.normal(size=(3, 6))
    fit = Fit(torch.from_numpy(present)[None], (0.1,), torch.ones(1, 3), free=free)
    for part in (slice(0, 70), slice(70, 200)):
        fit.add(torch.from_numpy(x[part])[:, None], torch.from_numpy(y[part])[:, None], places=10)
    fit.solve()
    mean_x, mean_y = (x.mean(0), y.mean(0)) if free else (np.zeros(6), np.zeros(3))
    a, b = x - mean_x, y - mean_y
    pull = 0.1 * np.trace(a.T @ a / 200) / 6
    expected = np.linalg.solve(a.T @ a / 200 + pull * np.eye(6), a.T @ b / 200 + pull * present.T).T
    np.testing.assert_allclose(fit.weight[0].numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(fit.intercept[0].numpy(), mean_y - expected @ mean_x, atol=1e-10)


@pytest.mark.parametrize("summed", [False, True])
def test_behind_a_relu_only_what_passes_it_is_fitted(summed: bool) -> None:
    """The error behind the ReLU gets smaller than plain least squares leave it; the convex error that is minimised falls all the way."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 1, 5, generator=random, dtype=torch.float64)
    hidden = torch.randn(3000, 1, 4, generator=random, dtype=torch.float64)
    y = torch.cat([x, hidden], 2) @ torch.randn(9, 3, generator=random, dtype=torch.float64)
    gain, shift = torch.tensor([2.0, -1.0, 0.5]).double(), torch.tensor([-1.0, 0.3, 0.2]).double()
    beside = torch.randn(3000, 3, generator=random, dtype=torch.float64) if summed else None

    def before(values: Tensor) -> Tensor:
        return values * gain + shift + (0 if beside is None else beside)

    fit = Fit(torch.zeros(1, 3, 5), (1e-9,), torch.ones(1, 3), free=True)
    fit.add(x, y, places=1)
    fit.solve()
    behind, convex, wanted = [], [], before(y[:, 0])
    for _ in range(4):
        found = before(x[:, 0] @ fit.weight[0].T + fit.intercept[0])
        behind.append(float((found.relu() - wanted.relu()).square().mean()))
        convex.append(float((torch.where(wanted > 0, found - wanted, found.relu())).square().mean()))
        fit.rectify(Affine(gain, shift, 1 / gain), beside)
    assert behind[-1] < 0.97 * behind[0]
    assert convex == sorted(convex, reverse=True) and convex[1] < 0.95 * convex[0]


def test_inputs_that_stay_stand_in_for_those_that_go() -> None:
    """Exactly for an input that is the sum of two others, and by least squares for the rest."""
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 5)) @ random.normal(size=(5, 5))
    x[:, 4] = x[:, 0] + x[:, 2]
    weight, kept, second = random.normal(size=(3, 5)), np.array([True, True, True, False, False]), torch.from_numpy(x.T @ x / 500)
    found = substituted(torch.from_numpy(weight), second, torch.from_numpy(kept), ridge=1e-12).numpy()
    expected = np.linalg.lstsq(x[:, kept], x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, atol=1e-6)
    only_the_sum = weight * np.array([1, 1, 1, 0, 1])
    found = substituted(torch.from_numpy(only_the_sum), second, torch.from_numpy(kept), ridge=1e-12).numpy()
    np.testing.assert_allclose(x[:, kept] @ found.T, x @ only_the_sum.T, atol=1e-6)
