from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgeprune import criteria
from edgeprune.criteria import chip
from edgeprune.criteria.chip import deletions, gradients
from edgeprune.errors import UsageError
from tests.networks import images, traced

SHAPES = [(3, 5, 3, 4), (2, 9, 2, 2), (3, 4, 1, 1), (2, 6, 2, 3)]  # more pixels than channels, fewer, one, the same


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norms(a: Any) -> Any:
    return np.linalg.svd(a, compute_uv=False).sum(-1)


def by_svd(x: Tensor) -> Any:
    """One SVD per image and channel, as the definition says."""
    a = x.flatten(2).numpy()
    dropped = []
    for c in range(a.shape[1]):
        less = a.copy()
        less[:, c] = 0
        dropped.append(norms(a) - norms(less))
    return np.stack(dropped, axis=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_deletion_is_the_definition(shape: tuple[int, ...]) -> None:
    np.testing.assert_allclose(deletions(maps(*shape)).numpy(), by_svd(maps(*shape)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_that_of_autograd(shape: tuple[int, ...]) -> None:
    x = maps(*shape)
    expected = []
    for image in x.flatten(2):
        mask = torch.ones(shape[1], dtype=torch.float64, requires_grad=True)
        u, s, vh = torch.linalg.svd(image, full_matrices=False)  # the derivative of ||A||_* by A is u vh
        assert float(s.min()) > 1e-6
        slope = torch.autograd.grad((mask[:, None] * image * (u @ vh)).sum(), mask)[0]
        expected.append(slope.numpy())
    np.testing.assert_allclose(gradients(x).numpy(), expected, rtol=1e-8)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(c=st.integers(1, 7), h=st.integers(1, 4), w=st.integers(1, 4), seed=st.integers(0, 99))
def test_gradients_sum_to_the_norm_and_bound_the_deletions(c: int, h: int, w: int, seed: int) -> None:
    x = maps(2, c, h, w, seed=seed)
    slopes, dropped = gradients(x).numpy(), deletions(x).numpy()
    np.testing.assert_allclose(slopes.sum(axis=1), norms(x.flatten(2).numpy()), rtol=1e-7)
    assert (dropped <= slopes + 1e-7).all() and (dropped >= 0).all()


@pytest.mark.parametrize("shape", [(3, 5, 3, 4), (2, 9, 2, 2)])
def test_dead_and_dependent_channels(shape: tuple[int, ...]) -> None:
    x = maps(*shape)
    x[:, 2] = 0
    x[:, 3] = x[:, 1]
    slopes, dropped = gradients(x), deletions(x)
    assert (slopes[:, 2] == 0).all() and (dropped[:, 2] == 0).all()
    assert torch.allclose(slopes[:, 3], slopes[:, 1]) and torch.allclose(dropped[:, 3], dropped[:, 1])
    assert (gradients(x * 0) == 0).all() and (deletions(x * 0) == 0).all()


def test_a_copy_is_less_independent_than_an_original() -> None:
    q = torch.linalg.qr(maps(12, 12)).Q[:5].reshape(1, 5, 3, 4)
    copied = q.clone()
    copied[:, 4] = copied[:, 0]
    for figure in (gradients, deletions):
        assert torch.allclose(figure(q), torch.ones(1, 5, dtype=torch.float64))
        found = figure(copied)[0]
        assert found[0] == pytest.approx(float(found[4])) and found[0] < found[1] - 0.2


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = maps(5, 7, 3, 2)
    whole = gradients(x), deletions(x)
    monkeypatch.setattr(chip, "CHUNK_BYTES", 1)
    assert torch.allclose(gradients(x), whole[0], rtol=1e-12) and torch.allclose(deletions(x), whole[1], rtol=1e-9)


@pytest.mark.parametrize("form", ["gradient", "deletion"])
def test_scores_are_the_mean_over_images(form: str) -> None:
    model, graph = traced("plain")
    x = images("plain", 8)[0]
    body: Any = model.body
    with torch.no_grad():
        seen = body[2](body[1](body[0](x)))
    expected = by_svd(seen) if form == "deletion" else gradients(seen).numpy()
    for batches in ([x], [x[:3], x[3:]], [(x, torch.zeros(8))]):
        found = criteria.score(graph, model, "chip", data=batches, form=form).values["body.2.0"]
        np.testing.assert_allclose(found, expected.mean(axis=0), rtol=1e-6)
    found = criteria.score(graph, model, "chip", data=[x[:3], x[3:]], form=form, every=3).values["body.2.0"]
    np.testing.assert_allclose(found, expected[::3].mean(axis=0), rtol=1e-6)


def test_options_are_checked() -> None:
    model, graph = traced("plain")
    for options in ({"form": "x"}, {"every": 0}):
        with pytest.raises(UsageError, match=next(iter(options))):
            criteria.score(graph, model, "chip", data=[images("plain", 2)[0]], **options)
