from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgeprune.errors import UsageError
from edgeprune.quantize.bits import CHANNEL_BITS, BitPlan
from edgeprune.quantize.channels import channel_bits, transfer_bytes
from edgeprune.quantize.grid import grid_errors
from edgeprune.quantize.influence import Influence, influences
from edgeprune.quantize.network import Network
from tests.quantize.onnx_nets import batches, proto

LAYERS = Network(proto()).layers
SHAPES = {name: layer.weight.shape for name, layer in LAYERS.items()}


def loss(bits: tuple[int, ...], layer: str, influence: Influence) -> float:
    errors = grid_errors(LAYERS[layer].weight, CHANNEL_BITS) * (influence.channels * influence.energy)[:, None]
    return float(sum(errors[c, CHANNEL_BITS.index(b)] for c, b in enumerate(bits)))


@pytest.mark.parametrize("mean", [2.0, 3.3, 4.0, 5.0, 8.0])
def test_the_budget_is_kept_and_used(mean: float) -> None:
    bits = channel_bits(proto(), influences(proto(), batches()), mean)
    reached = BitPlan(dict.fromkeys(bits, "int8"), bits).mean_bits(SHAPES)
    assert mean - 0.1 < reached <= mean
    assert {b for row in bits.values() for b in row} <= set(CHANNEL_BITS)


def test_within_layers_every_layer_keeps_the_mean() -> None:
    bits = channel_bits(proto(), influences(proto(), batches()), 4.0, within_layers=True)
    assert all(np.mean(row) <= 4 for row in bits.values())
    free = channel_bits(proto(), influences(proto(), batches()), 4.0)
    assert any(np.mean(row) > 4 for row in free.values())


def test_the_best_there_is_for_a_small_layer() -> None:
    influence = Influence(np.array([5.0, 1.0, 0.1, 0.01]), 1.0)
    found = channel_bits(proto(), {"fc": influence}, 4.0)["fc"]
    assert sum(found) <= 16 and found[0] > found[-1]
    best = min(loss(b, "fc", influence) for b in itertools.product(CHANNEL_BITS, repeat=4) if sum(b) <= 16)
    uniform = loss((4, 4, 4, 4), "fc", influence)
    assert loss(found, "fc", influence) <= best + 0.1 * (uniform - best)


def test_impossible_means_and_sizes() -> None:
    with pytest.raises(UsageError, match=r"1\.5"):
        channel_bits(proto(), {}, 1.5)
    assert transfer_bytes(b"a" * 10_000) < 500 < transfer_bytes(np.random.default_rng(0).bytes(1000))
