from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cifar10
from benchmarks.networks import resnet, resnet20, resnet56
from edgeprune.data import load_data
from edgeprune.errors import DataError
from edgeprune.load import load_model

WEIGHTS = cifar10.data_folder() / "weights" / "resnet56-4bfd9763.th"


@pytest.mark.parametrize(("depth", "params"), [(20, 269_722), (56, 853_018), (110, 1_727_962)])
def test_parameters(depth: int, params: int) -> None:
    assert sum(p.numel() for p in resnet(depth).parameters()) == params


@pytest.mark.parametrize("depth", [0, 2, 21])
def test_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2 layers .* got {depth}"):
        resnet(depth)


def test_shapes_and_keys() -> None:
    model = resnet20().eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.bias"} <= model.state_dict().keys()
    assert len(resnet56().layer3) == 9


def test_absent_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEPRUNE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="EDGEPRUNE_DATA"):
        cifar10.test_images.__wrapped__()


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs the shared CIFAR-10 images and weights (EDGEPRUNE_DATA)")
def test_accuracy_on_the_first_500_test_images() -> None:
    x, y = cifar10.test_images(1)
    assert x.shape == (1000, 32, 32, 3)
    model = load_model(WEIGHTS, factory="benchmarks.networks:resnet56", input_shape=(1, 3, 32, 32)).model
    split = load_data((None, (x, y)), mean=cifar10.MEAN, std=cifar10.STD).val
    with torch.inference_mode():
        right = [(model(images).argmax(1) == labels).numpy() for images, labels in split.batches(250, limit=500)]
    assert np.concatenate(right).sum() == pytest.approx(470, abs=1)  # of 500; 9339 of all 10,000
