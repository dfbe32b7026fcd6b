from __future__ import annotations

import numpy as np
import pytest

from edgeprune.errors import DataError
from edgeprune.quantize.influence import influences
from tests.quantize.onnx_nets import CLASSES, batches, images, net, proto


def test_every_layer_has_one_figure_a_channel() -> None:
    found = influences(proto(), batches())
    assert list(found) == ["stem", "a", "b", "depthwise", "point", "fc"]
    for name, influence in found.items():
        assert influence.channels.shape == net().state_dict()[f"{name}.weight"].shape[:1]
        assert (influence.channels >= 0).all() and influence.channels.any() and influence.energy > 0
    assert found["stem"].energy == pytest.approx(float(np.square(images()[0], dtype=np.float64).mean()))


def test_it_is_the_ridge_regressions_weight_energy() -> None:
    found = influences(proto(), [next(iter(batches(32, 32)))])["stem"].channels
    import torch

    x, y = images(32)
    with torch.no_grad():
        maps = net().stem(torch.from_numpy(x)).double()
    rows = maps.flatten(1) - maps.flatten(1).mean(dim=0)
    targets = torch.nn.functional.one_hot(torch.from_numpy(y), CLASSES).double()
    targets = targets - targets.mean(dim=0)
    rho = rows.square().sum() / 32
    weights = torch.linalg.solve(rows.T @ rows + rho * torch.eye(rows.shape[1], dtype=torch.float64), rows.T @ targets)
    expected = weights.square().sum(dim=1).reshape(8, -1).sum(dim=1) * 32 / targets.square().sum()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)


def test_without_labels_the_outputs_are_the_targets() -> None:
    x, y = images()
    found = influences(proto(), [(x, np.full_like(y, -1))])
    assert all(i.channels.any() for i in found.values())
    assert not np.allclose(found["stem"].channels, influences(proto(), [(x, y)])["stem"].channels)


def test_too_few_images() -> None:
    x, y = images()
    with pytest.raises(DataError, match="at least 32 images"):
        influences(proto(), [(x[:20], y[:20])])
    with pytest.raises(DataError, match="differ"):
        influences(proto(), [(x[:40], np.zeros(40, np.int64))])
