from __future__ import annotations

import numpy as np
import onnx
import pytest

from edgeprune.quantize.influence import Influence, influences
from edgeprune.quantize.network import Network
from edgeprune.quantize.preparation import with_constants
from edgeprune.quantize.sensitivity import divergence, measured
from tests.quantize.onnx_nets import batches, images, proto


def test_divergence_by_hand() -> None:
    one, other = np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]])
    assert divergence(one, other) == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25))
    assert divergence(one, one + 3) == pytest.approx(0)
    assert divergence(np.full((1, 2, 2), 2.0), np.full((1, 2, 2), 1.0)) == pytest.approx(0.25)


def without_point(rows: slice) -> onnx.ModelProto:
    """The network whose classifier does not read these channels of the layer "point"."""
    layer = Network(proto()).layers["fc"]
    weight = layer.weight.copy()
    weight[:, rows] = 0
    return with_constants(proto(), {layer.node.input[1]: layer.stored(weight)})


def test_what_nothing_reads_costs_nothing() -> None:
    network = without_point(slice(0, 12))
    guess = {name: Influence(np.ones(len(layer.weight)), 1.0) for name, layer in Network(network).layers.items()}
    guess["point"] = Influence(np.where(np.arange(24) < 12, 1e-6, 1.0), 1.0)  # so that the unread ones share parts
    found = measured(network, guess, [images(32)[0]])["point"].channels
    assert found[:12].max() < 1e-6 * found[12:].min()


def test_both_estimates_count_alike() -> None:
    """A layer whose DI is four times as large everywhere has twice the influence: the order of its channels, so its parts, are the same."""
    layers = Network(proto()).layers
    guess = {name: Influence(np.linspace(1.0, 2.0, len(layer.weight)), 1.0) for name, layer in layers.items()}
    once = measured(proto(), guess, [images(32)[0]])
    larger = measured(proto(), {**guess, "point": Influence(4 * guess["point"].channels, 1.0)}, [images(32)[0]])
    np.testing.assert_allclose(larger["point"].channels, 2 * once["point"].channels, rtol=1e-6)


def test_every_channel_gets_a_figure_on_one_scale_with_the_outputs() -> None:
    guess = influences(proto(), batches())
    found = measured(proto(), guess, [images(32)[0]])
    assert found.keys() == guess.keys()
    for name, layer in Network(proto()).layers.items():
        assert found[name].channels.shape == (len(layer.weight),) and (found[name].channels > 0).all()
        assert found[name].energy == guess[name].energy
