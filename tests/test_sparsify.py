from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgeprune as ep
from edgeprune.errors import DataError, ModelError, UsageError
from edgeprune.sparsify import Sparse, kept_after, load_sparse, save_sparse, sparsify
from tests.networks import Head, conv_bn

RECIPE = ep.Recipe(lr=0.05, batch_size=32, flip=False, crop_padding=0)


def planted(n: int = 120) -> Any:
    """Images of 4x4 whose first pixel row says the class; the rest is noise."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 3
    x = rng.normal(size=(n, 1, 4, 4)).astype(np.float32)
    x[:, 0, 0] += 3 * (y[:, None] - 1)
    return ep.load_data(((x, y), (x[:30], y[:30])))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def cnn() -> nn.Module:
    return Head(nn.Sequential(conv_bn(1, 8), conv_bn(8, 8, groups=2), conv_bn(8, 6, 1)), 6)


def run(model: nn.Module, **options: Any) -> Sparse:
    return sparsify(model, data=planted(), **{"epochs": 0, "recipe": RECIPE, "images": 100, **options})


@pytest.mark.parametrize(("epochs", "speed"), [(10, 1.0), (7, 0.0), (1, 3.0), (4, 20.0), (0, 1.0)])
def test_the_schedule_falls_from_all_to_what_is_asked_by_the_middle(epochs: int, speed: float) -> None:
    kept = [kept_after(e, epochs, 1000, 80, speed) for e in range(epochs + 1)]
    assert kept[0] == (1000 if epochs else 80) and kept[-1] == 80
    assert all(a >= b for a, b in pairwise(kept))
    assert all(k == 80 for e, k in enumerate(kept) if 2 * e >= epochs)
    by_hand = [80 + 920 * max(0, (epochs - 2 * e) / (2 * e * speed + epochs)) if epochs else 80 for e in range(epochs + 1)]
    assert all(abs(k - h) <= 0.5 for k, h in zip(kept, by_hand, strict=True))


@pytest.mark.parametrize("combine", ["rank", "product"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_without_significance_it_is_magnitude_pruning(scope: str, combine: str) -> None:
    model = mlp()
    result = run(model, alpha=0.0, keep=0.25, scope=scope, combine=combine)
    names = ["1.weight", "3.weight"]
    sizes = {n: model.state_dict()[n].abs() for n in names}
    pools = [[n] for n in names] if scope == "layer" else [names]
    for pool in pools:
        flat = torch.cat([sizes[n].flatten() for n in pool])
        threshold = flat.sort(descending=True).values[round(0.25 * len(flat)) - 1]
        for n in pool:
            assert torch.equal(result.masks[n], sizes[n] >= threshold)
    state = result.model.state_dict()
    for name in names:
        assert torch.equal(state[name], torch.where(result.masks[name], model.state_dict()[name], 0.0))
    assert set(state) == set(model.state_dict())


def test_significance_alone_keeps_or_drops_all_that_leaves_an_input() -> None:
    result = run(mlp(), alpha=1.0, keep=0.25)
    kept = result.masks["1.weight"].sum(dim=0)
    assert kept.tolist() == [12] * 4 + [0] * 12  # the four planted pixels: 4 of 16 inputs at a quarter


@pytest.mark.parametrize("combine", ["rank", "product"])
def test_the_planted_inputs_are_kept_when_nine_tenths_go(combine: str) -> None:
    with torch.no_grad():
        model = mlp()
        weight: Tensor = model[1].weight  # type: ignore[index]
        weight[:, :4] = 0.02  # light, but they say the class: magnitude alone would drop them
    assert not run(model, alpha=0.0, keep=0.1).masks["1.weight"][:, :4].any()
    assert not run(model, alpha=0.9, keep=0.1, combine=combine).masks["1.weight"][:, 4:].any()


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_removed_weights_are_exact_zeros_through_training(make: Any, scope: str) -> None:
    model = make()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    result = run(model, keep=0.2, epochs=4, scope=scope)
    kept = {name: int(m.sum()) for name, m in result.masks.items()}
    totals = [m.numel() for m in result.masks.values()] if scope == "layer" else [result.connections]
    wanted = [sum(kept_after(e, 4, t, max(1, round(0.2 * t)), 1.0) for t in totals) for e in (1, 2, 3, 4)]
    assert [s.kept for s in result.steps] == wanted
    assert result.steps[-1].layers == kept and result.kept == sum(kept.values())
    state = result.model.state_dict()
    assert list(state) == list(before)
    for name, m in result.masks.items():
        assert (state[name][~m] == 0).all() and not torch.signbit(state[name][~m]).any()
        assert (state[name][m] != before[name][m]).any(), "it was trained"
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(s.val_accuracy is not None for s in result.steps)


def test_training_recovers_what_the_data_say_and_equal_seeds_agree() -> None:
    one, two = (run(mlp(), keep=0.3, epochs=8, seed=3) for _ in range(2))
    assert one.steps[-1].val_accuracy is not None and one.steps[-1].val_accuracy > 0.8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        a = mlp()
    b = mlp()
    b.load_state_dict(a.state_dict())
    first, second = run(a, epochs=2), run(b, epochs=2)
    assert all(torch.equal(t, second.model.state_dict()[k]) for k, t in first.model.state_dict().items())
    assert two.steps[0].kept == one.steps[0].kept


class Shared(nn.Module):
    """One weight in two layers, and a layer that sees tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.b(torch.relu(self.a(x.flatten(0, 1)))).mean(1))
        return out


def test_a_shared_weight_is_one_weight() -> None:
    result = run(Shared(), keep=0.5, epochs=2)
    assert set(result.masks) == {"a.weight", "fc.weight"} and result.connections == 16 + 12
    assert result.model.a.weight is result.model.b.weight  # type: ignore[union-attr]
    assert int((result.model.a.weight != 0).sum()) == 8  # type: ignore[union-attr]


def test_files_come_back_bit_for_bit_and_are_small(tmp_path: Path) -> None:
    result = run(nn.Sequential(nn.Flatten(), nn.Linear(16, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 3)), keep=0.05)
    odd = result.model[1].bias  # type: ignore[index]
    with torch.no_grad():
        odd.zero_()
        odd[3], odd[5] = -0.0, float("nan")
    path = save_sparse(result.model, tmp_path / "m.safetensors")
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(16, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 3))
    loaded = load_sparse(path, model=fresh)
    for (name, a), b in zip(result.model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes(), name
    dense = ep.save(result.model, tmp_path / "dense.safetensors")
    assert path.stat().st_size < 0.4 * dense.stat().st_size


def test_files_that_are_not_ours_or_damaged_are_refused(tmp_path: Path) -> None:
    result = run(mlp(), keep=0.1)
    path = save_sparse(result.model, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match=r"does not belong to this Sequential: 1\.weight differ"):
        load_sparse(path, model=nn.Sequential(nn.Flatten(), nn.Linear(15, 12), nn.ReLU(), nn.Linear(12, 3)))
    with pytest.raises(ModelError, match="not written by save_sparse"):
        load_sparse(ep.save(result.model, tmp_path / "d.safetensors"), model=mlp())
    (tmp_path / "cut").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        load_sparse(tmp_path / "cut", model=mlp())
    raw = bytearray(path.read_bytes())
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        bits = file.get_tensor("1.weight/bits").numpy().tobytes()
    at = bytes(raw).index(bits)
    raw[at + 4] ^= 0xFF
    (tmp_path / "flipped").write_bytes(raw)
    with pytest.raises(ModelError, match="damaged"):
        load_sparse(tmp_path / "flipped", model=mlp())


def test_what_makes_no_sense_is_refused() -> None:
    for bad in ({"keep": 0.0}, {"alpha": 1.5}, {"epochs": -1}, {"speed": -1.0}, {"images": 1}, {"scope": "group"}, {"combine": "sum"}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            run(mlp(), **bad)
    with pytest.raises(ModelError, match="no connections"):
        run(nn.Flatten())
    images = np.zeros((20, 1, 4, 4), np.float32)
    with pytest.raises(DataError, match="labels"):
        sparsify(mlp(), data=ep.load_data(((images, None), (images, None))))
