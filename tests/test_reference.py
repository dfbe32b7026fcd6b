import pytest
import torch

import edgeprune as ep
from edgeprune.errors import UsageError
from edgeprune.reference import DigitNet, digits, reference


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_a_reference_network_is_the_same_on_every_call(name: str) -> None:
    (first, example, data), (second, _, _) = reference(name), reference(name)
    assert data is None
    with torch.no_grad():
        assert torch.equal(first(example), second(example))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.slow
def test_the_digits_network_has_learned() -> None:
    model, example, data = reference("digits")
    assert data is not None
    x, y = next(iter(data.val.batches(360)))
    with torch.no_grad():
        assert (model.eval()(x).argmax(1) == y).float().mean() > 0.6
    assert example.shape[1:] == x.shape[1:]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown reference network"):
        reference("vgg")


def test_the_digits() -> None:
    data = digits()
    assert (len(data.train), len(data.val)) == (1437, 360)
    assert data.sample_shape == (1, 1, 32, 32)
    assert set(data.val.labels) == set(data.train.labels) == set(range(10))


def test_the_network_can_be_cut_everywhere_but_at_its_ends() -> None:
    graph = ep.trace(DigitNet(), torch.zeros(1, 1, 32, 32))
    assert sorted(g.channels for g in graph.groups) == [32, 32, 64, 64, 64]
    assert list(graph.frozen) == ["head.weight[0]"]
