from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeprune import criteria
from edgeprune.criteria import nuclear_norm
from edgeprune.criteria.nuclear_norm import nuclear_norms
from edgeprune.errors import DataError
from edgeprune.graph.trace import trace
from tests.networks import images, traced


def by_svd(maps: Tensor) -> Any:
    return np.linalg.svd(maps.double().numpy(), compute_uv=False).sum(-1)


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(h=st.integers(1, 9), w=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_gram_route_equals_singular_values(h: int, w: int, seed: int) -> None:
    x = maps(2, 3, h, w, seed=seed)
    np.testing.assert_allclose(nuclear_norms(x).numpy(), by_svd(x), rtol=1e-6, atol=1e-9)


def test_known_values() -> None:
    u, v = maps(5), maps(7, seed=1)
    rank_one = torch.outer(u, v)
    orthogonal = torch.linalg.qr(maps(6, 6)).Q
    assert float(nuclear_norms(rank_one[None, None])) == pytest.approx(float(rank_one.norm()), rel=1e-6)
    assert float(nuclear_norms(torch.full((1, 1, 4, 9), -2.5))) == pytest.approx(2.5 * 6, rel=1e-6)
    assert float(nuclear_norms(orthogonal[None, None])) == pytest.approx(6)
    assert float(nuclear_norms(torch.eye(5, dtype=torch.float64)[None, None] * 3)) == pytest.approx(15)
    assert float(nuclear_norms(torch.zeros(1, 1, 4, 4))) == 0
    assert float(nuclear_norms(torch.tensor([[[[-3.0]]]]))) == 3


def test_it_is_a_norm_between_its_bounds() -> None:
    x, y = maps(4, 6, 5, 8), maps(4, 6, 5, 8, seed=1)
    norm = nuclear_norms(x)
    frobenius = x.flatten(2).norm(dim=2)
    assert (nuclear_norms(-2.5 * x) - 2.5 * norm).abs().max() < 1e-9
    assert (nuclear_norms(x + y) <= norm + nuclear_norms(y) + 1e-9).all()
    assert (frobenius <= norm + 1e-9).all() and (norm <= 5**0.5 * frobenius + 1e-9).all()


def test_it_does_not_see_transposition_flips_and_rotations() -> None:
    x = maps(3, 4, 6, 6)
    rotation = torch.linalg.qr(maps(6, 6, seed=2)).Q
    norm = nuclear_norms(x)
    for same in (x.transpose(2, 3), x.flip(2), x.flip(3), rotation @ x, x @ rotation):
        assert (nuclear_norms(same) - norm).abs().max() < 1e-9


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = maps(5, 7, 6, 4)
    whole = nuclear_norms(x)
    monkeypatch.setattr(nuclear_norm, "CHUNK_BYTES", 8 * 24 * 3)
    assert torch.allclose(nuclear_norms(x), whole, rtol=1e-12)


class Maps(nn.Module):
    """conv -> ReLU -> conv: the scored maps are those after the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.features(x))
        return out


def scored(model: nn.Module, data: Any) -> Any:
    graph = trace(model, maps(1, 3, 9, 9))
    return criteria.score(graph, model, "nuclear_norm", data=data).values[graph.groups[0].name]


def test_scores_are_the_mean_energy_of_the_maps_the_next_layer_reads() -> None:
    model, x = Maps().double(), maps(12, 3, 9, 9)
    with torch.no_grad():
        expected = by_svd(model.features(x)).mean(0)
    np.testing.assert_allclose(scored(model, [x]), expected, rtol=1e-6)


def test_scores_do_not_depend_on_batches_or_labels() -> None:
    model, x = Maps().double(), maps(12, 3, 9, 9)
    whole = scored(model, [x])
    for batches in ([x[:5], x[5:]], [x[i : i + 1] for i in range(12)], [(x, torch.zeros(12))], [(x, torch.randperm(12))], (x,)):
        np.testing.assert_allclose(scored(model, batches), whole, rtol=1e-9)


def test_scores_follow_a_permutation_of_the_channels() -> None:
    model, x = Maps().double(), maps(6, 3, 9, 9)
    before = scored(model, [x])
    order = torch.randperm(8)
    with torch.no_grad():
        assert model.a.bias is not None
        model.a.weight.copy_(model.a.weight[order])
        model.a.bias.copy_(model.a.bias[order])
        model.b.weight.copy_(model.b.weight[:, order])
    np.testing.assert_allclose(scored(model, [x]), before[order.numpy()], rtol=1e-9)


def test_a_dead_channel_has_no_energy() -> None:
    model, x = Maps().double(), maps(6, 3, 9, 9)
    with torch.no_grad():
        assert model.a.bias is not None
        model.a.weight[3], model.a.bias[3] = 0, -1
    values = scored(model, [x])
    assert values[3] == 0 and (np.delete(values, 3) > 0).all()


def test_vectors_have_their_mean_absolute_value() -> None:
    model, graph = traced("mlp")
    x = images("mlp", 9)[0]
    values = criteria.score(graph, model, "nuclear_norm", data=[x]).values
    with torch.no_grad():
        hidden = model[:3](x)  # type: ignore[index]
    np.testing.assert_allclose(values["0"], hidden.abs().mean(0).numpy(), rtol=1e-9)


def test_channels_read_in_several_places_have_the_mean_of_their_relative_energies() -> None:
    model, graph = traced("residual")
    x = images("residual", 4)[0]
    seen: list[Any] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in (model.body[1].a[0], model.body[2].a[0])]  # type: ignore[index,union-attr]
    with torch.no_grad():
        last = model.body(x)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    energies = [by_svd(t.detach()).mean(0) for t in (*seen, last)]
    expected = np.mean([e / e.mean() for e in energies], axis=0)
    np.testing.assert_allclose(criteria.score(graph, model, "nuclear_norm", data=[x]).values["body.0.0"], expected, rtol=1e-6)


def test_bad_maps_and_data_are_refused() -> None:
    model = Maps().double()
    graph = trace(model, maps(1, 3, 9, 9))
    bad = maps(2, 3, 9, 9)
    bad[1, 0, 4, 4] = float("nan")
    with pytest.raises(DataError, match="NaN or Inf"):
        criteria.score(graph, model, "nuclear_norm", data=[bad])
    for empty in ([], [maps(0, 3, 9, 9)]):
        with pytest.raises(DataError, match="empty"):
            criteria.score(graph, model, "nuclear_norm", data=empty)
    with pytest.raises(DataError, match="looks at images"):
        criteria.score(graph, model, "nuclear_norm")
