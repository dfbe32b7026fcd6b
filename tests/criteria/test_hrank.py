from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgeprune import criteria
from edgeprune.criteria.hrank import ranks
from edgeprune.errors import UsageError
from tests.networks import images, traced


def of_rank(r: int, h: int, w: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*s, generator=noise, dtype=torch.float64) for s in ((h, r), (r, w)))
    return (a @ b).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("h", "w"), [(6, 6), (5, 9), (9, 5), (1, 4), (1, 1)])
def test_planted_ranks_are_found(h: int, w: int, dtype: torch.dtype) -> None:
    planted = list(range(min(h, w) + 1))
    maps = torch.stack([of_rank(r, h, w, seed=r, dtype=dtype) for r in planted])[None]
    assert ranks(maps)[0].tolist() == planted
    assert ranks(maps * 1e-6)[0].tolist() == ranks(maps * -1e6)[0].tolist() == planted


def test_it_is_numpys_rank_of_float32_maps() -> None:
    maps = torch.relu(torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0)) - 1)  # sparse, some ranks fall short
    expected = np.linalg.matrix_rank(maps.numpy())
    assert len(set(expected.ravel().tolist())) > 2
    np.testing.assert_array_equal(ranks(maps).numpy(), expected)


def test_the_tolerance_is_relative_to_the_largest_singular_value() -> None:
    maps = torch.diag(torch.tensor([10.0, 1.0, 0.1, 1e-9]))[None, None]
    assert [float(ranks(maps, t)) for t in (0.0, 1e-3, 0.05, 0.5)] == [3, 3, 2, 1]


def test_scores_are_the_mean_over_images() -> None:
    model, graph = traced("plain")
    x = images("plain", 9)[0]
    body: Any = model.body
    with torch.no_grad():
        seen = body[2](body[1](body[0](x)))
    expected = np.linalg.matrix_rank(seen.numpy(), rtol=8 * np.finfo(np.float32).eps)
    for batches in ([x], [x[:2], x[2:]], [(x, torch.zeros(9))]):
        found = criteria.score(graph, model, "hrank", data=batches).values["body.2.0"]
        np.testing.assert_allclose(found, expected.mean(axis=0), rtol=1e-12)


def test_vectors_have_the_share_of_images_on_which_they_are_not_zero() -> None:
    model, graph = traced("mlp")
    x = images("mlp", 12)[0]
    with torch.no_grad():
        hidden = model[:3](x)  # type: ignore[index]
    found = criteria.score(graph, model, "hrank", data=[x]).values["0"]
    np.testing.assert_allclose(found, (hidden != 0).double().mean(dim=0).numpy())


def test_options_are_checked() -> None:
    model, graph = traced("plain")
    for options in ({"tolerance": 1e-9}, {"tolerance": 1.0}, {"every": -1}, {"max_side": 0}):
        with pytest.raises(UsageError, match=next(iter(options))):
            criteria.score(graph, model, "hrank", data=[images("plain", 2)[0]], **options)
