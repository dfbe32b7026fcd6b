from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks import cifar10
from edgeprune import criteria
from edgeprune.criteria import nuclear_norm
from edgeprune.criteria.nuclear_norm import nuclear_norms
from edgeprune.data import load_data
from edgeprune.errors import DataError, UsageError
from edgeprune.graph.trace import trace
from edgeprune.load import load_model
from tests.networks import images, traced

WEIGHTS = cifar10.data_folder() / "weights" / "resnet20-12fca82f.th"


def by_svd(maps: Tensor) -> Any:
    return np.linalg.svd(maps.double().numpy(), compute_uv=False).sum(-1)


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(h=st.integers(1, 9), w=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_gram_route_equals_singular_values(h: int, w: int, seed: int) -> None:
    x = maps(2, 3, h, w, seed=seed)
    for route in ("gram", "svd"):
        np.testing.assert_allclose(nuclear_norms(x, route).numpy(), by_svd(x), rtol=1e-6, atol=1e-9)


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


def scored(model: nn.Module, data: Any, **options: Any) -> Any:
    graph = trace(model, maps(1, 3, 9, 9))
    return criteria.score(graph, model, "nuclear_norm", data=data, **options).values[graph.groups[0].name]


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


def stacked_by_svd(features: Tensor) -> Any:
    return np.linalg.svd(features.flatten(2).transpose(0, 1).double().numpy(), compute_uv=False).sum(-1)


@pytest.mark.parametrize("route", ["gram", "svd"])
def test_stacked_is_the_norm_of_all_images_rows(route: str) -> None:
    model, x = Maps().double(), maps(60, 3, 9, 9)
    with torch.no_grad():
        expected = stacked_by_svd(model.features(x))
        few = stacked_by_svd(model.features(x[:5]))
    for batches in ([x], [x[:7], x[7:]], [x[i : i + 1] for i in range(60)]):
        np.testing.assert_allclose(scored(model, batches, mode="stacked", route=route), expected, rtol=1e-6)
    np.testing.assert_allclose(scored(model, [x[:3], x[3:5]], mode="stacked", route=route), few, rtol=1e-6)


def test_stacked_vectors_have_their_length() -> None:
    model, graph = traced("mlp")
    x = images("mlp", 9)[0]
    with torch.no_grad():
        hidden = model[:3](x)  # type: ignore[index]
    for route in ("gram", "svd"):
        values = criteria.score(graph, model, "nuclear_norm", data=[x[:4], x[4:]], mode="stacked", route=route).values["0"]
        np.testing.assert_allclose(values, hidden.norm(dim=0).numpy(), rtol=1e-9)


def test_large_maps_are_averaged_over_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Maps().double(), maps(4, 3, 9, 9)
    with torch.no_grad():
        features = model.features(x)  # 7 x 7: squares of 2 leave 4 x 4, the last ones cut
        halved = torch.nn.functional.avg_pool2d(features, 2, ceil_mode=True)
        corner = features[:, :, 6, 6]
        third = torch.nn.functional.avg_pool2d(features, 3, ceil_mode=True)
    assert halved.shape[2:] == (4, 4) and torch.equal(halved[:, :, 3, 3], corner)
    np.testing.assert_allclose(scored(model, [x], max_side=4), by_svd(halved).mean(0), rtol=1e-6)
    np.testing.assert_allclose(scored(model, [x], max_side=7), by_svd(features).mean(0), rtol=1e-6)
    monkeypatch.setattr(nuclear_norm, "GRAM_BYTES", 8 * 8 * 9**2)  # 8 channels of 3 x 3
    np.testing.assert_allclose(scored(model, [x], mode="stacked"), stacked_by_svd(third), rtol=1e-6)


def test_dear_singular_values_are_taken_of_every_kth_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Maps().double(), maps(40, 3, 9, 9)
    graph = trace(model, x[:1])
    monkeypatch.setattr(nuclear_norm, "MACS_PER_ELEMENT", 300)
    every, first = nuclear_norm._thinning(graph)
    elements, macs = 8 * 7 * 7, 7 * 7 * (8 * 27 + 8 * 4)
    assert graph.macs == macs and every == -(-300 * elements // macs) and first > 40
    np.testing.assert_array_equal(scored(model, [x]), scored(model, [x], every=1))  # few maps: all of them count
    monkeypatch.setattr(nuclear_norm, "EXACT_ELEMENTS", 0)
    used = [i for i in range(40) if i < 16 or i % every == 0]
    assert 16 < len(used) < 40
    with torch.no_grad():
        expected = by_svd(model.features(x[used])).mean(0)
        third = by_svd(model.features(x[::3])).mean(0)
    for batches in ([x], [x[:17], x[17:19], x[19:]]):
        np.testing.assert_allclose(scored(model, batches), expected, rtol=1e-6)
        np.testing.assert_allclose(scored(model, batches, every=3), third, rtol=1e-6)


def test_options_are_checked() -> None:
    model, x = Maps().double(), maps(2, 3, 9, 9)
    for options in ({"mode": "rows"}, {"route": "qr"}, {"every": -1}, {"max_side": 0}):
        with pytest.raises(UsageError, match=next(iter(options))):
            scored(model, [x], **options)


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs the shared CIFAR-10 images and weights (EDGEPRUNE_DATA)")
def test_few_images_rank_the_channels_of_a_trained_network_as_many_do() -> None:
    x, y = cifar10.test_images(2)
    model = load_model(WEIGHTS, factory="benchmarks.networks:resnet20", input_shape=(1, 3, 32, 32)).model
    split = load_data((None, (x, y)), mean=cifar10.MEAN, std=cifar10.STD).val
    batches = list(split.batches(128, limit=1280))
    graph = trace(model, batches[0][0][:1])
    few, many = (criteria.score(graph, model, "nuclear_norm", data=b).values for b in (batches[:1], batches))
    agreement = [spearmanr(few[g.name], many[g.name]).statistic for g in graph.groups]
    assert min(agreement) > 0.95


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
