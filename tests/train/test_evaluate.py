import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune.data import load_data
from edgeprune.errors import DataError, ExportError, GateError
from edgeprune.train.evaluate import accuracy_of, evaluate, recalibrate
from tests.colours import colour_data, colour_net, images, same


def test_evaluate_is_a_direct_count() -> None:
    data, model = colour_data(val=31), colour_net()
    x, y = next(iter(data.val.batches(31)))
    with torch.no_grad():
        logits = model(x).numpy().astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = y.numpy()
    found = evaluate(model, data.val, batch_size=7)
    assert found.accuracy == (logits.argmax(axis=1) == labels).mean()
    assert found.loss == pytest.approx(-np.log(shares[np.arange(31), labels]).mean(), rel=1e-5)
    assert found.images == 31


def test_evaluate_leaves_the_network_as_it_was() -> None:
    model = colour_net(dropout=0.5)
    model.train()
    model.c_norm.eval()
    before = copy.deepcopy(model.state_dict())
    assert evaluate(model, colour_data().val) == evaluate(model, colour_data().val)  # dropout was off
    assert same(model.state_dict(), before)
    assert [m.training for m in (model, model.a_norm, model.c_norm)] == [True, True, False]


def test_evaluate_refuses_what_is_no_classifier() -> None:
    data = colour_data()
    with pytest.raises(DataError, match="needs a classifier"):
        evaluate(nn.Conv2d(3, 4, 3), data.val)
    with pytest.raises(DataError, match="no labels"):
        evaluate(colour_net(), colour_data(labelled=False).val)


def test_labels_the_network_has_no_output_for() -> None:
    x, y = images(12)
    data = load_data(((x, y), (x, y + 4)))
    with pytest.raises(DataError, match=r"label 6 but the network has 3 outputs \(labels 0 to 2\)"):
        evaluate(colour_net(), data.val)


def test_outputs_that_are_not_finite() -> None:
    model = colour_net()
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    with pytest.raises(GateError, match="not finite"):
        evaluate(model, colour_data().val)


def test_accuracy_of_an_artifact_of_fixed_batch() -> None:
    data, model = colour_data(), colour_net()
    sizes: list[int] = []

    def one_at_a_time(x: NDArray[Any] | Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        assert isinstance(x, np.ndarray)
        sizes.append(len(x))
        if len(x) > 1:
            raise ExportError("this artifact takes one image")
        with torch.no_grad():
            return [model(torch.from_numpy(x)).numpy()]

    found = accuracy_of(one_at_a_time, data.val)
    expected = evaluate(model, data.val)
    assert (found.accuracy, found.images) == (expected.accuracy, expected.images)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert set(sizes) == {1, 30}


def test_an_artifact_that_fails_on_one_image_too() -> None:
    def broken(x: NDArray[Any] | Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        raise ExportError("wrong shape")

    with pytest.raises(ExportError, match="wrong shape"):
        accuracy_of(broken, colour_data().val)


class Normed(nn.Module):
    """A batch norm at the very input, so that its statistics are those of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=0.3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 3)."""
        return self.dropout(self.norm(x)).mean(dim=(2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("images_left", [0, 1])
def test_recalibrate_is_the_mean_over_batches(images_left: int) -> None:
    """One image alone in the last batch is left out."""
    split = colour_data(train=32 + images_left).train
    model = Normed()
    before = copy.deepcopy(model.state_dict())
    fresh = recalibrate(model, split, batch_size=16)
    batches = [x.double().numpy() for x, _ in split.batches(16, shuffle_seed=0)][:2]
    assert [len(b) for b in batches] == [16, 16]
    mean = np.mean([b.mean(axis=(0, 2, 3)) for b in batches], axis=0)
    variance = np.mean([b.var(axis=(0, 2, 3), ddof=1) for b in batches], axis=0)
    assert fresh.norm.running_mean.numpy() == pytest.approx(mean, rel=1e-5)  # type: ignore[union-attr, operator]
    assert fresh.norm.running_var.numpy() == pytest.approx(variance, rel=1e-5)  # type: ignore[union-attr, operator]
    assert fresh.norm.momentum == 0.3  # type: ignore[union-attr]
    assert not any(m.training for m in fresh.modules())
    assert same(model.state_dict(), before)
    assert model.training


def test_recalibrate_uses_no_more_images_than_asked() -> None:
    split, model = colour_data(train=64).train, Normed()
    few, all_of_them = recalibrate(model, split, images=16, batch_size=16), recalibrate(model, split, batch_size=16)
    first, _ = next(iter(split.batches(16, shuffle_seed=0)))
    assert torch.allclose(few.norm.running_mean, first.mean(dim=(0, 2, 3)), rtol=1e-5)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(few.norm.running_mean, all_of_them.norm.running_mean)  # type: ignore[union-attr, arg-type]


def test_recalibrate_keeps_the_statistics_where_one_image_is_all_there_is() -> None:
    split = colour_data(train=20).train.subset([3])
    model = colour_net()
    assert model.a_norm.running_mean is not None
    model.a_norm.running_mean.add_(1.0)
    assert same(recalibrate(model, split).state_dict(), model.state_dict())


def test_recalibrate_without_batch_norms() -> None:
    model = nn.Conv2d(3, 4, 3)
    fresh = recalibrate(model, colour_data().train)
    assert fresh is not model
    assert same(fresh.state_dict(), model.state_dict())
