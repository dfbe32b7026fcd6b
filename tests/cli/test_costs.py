from __future__ import annotations

import pytest

from edgeprune.cli.costs import print_cost
from edgeprune.device.card import device
from edgeprune.device.cost import predict_graph
from tests.device.test_kernels import tiny


def test_every_layer_with_what_bounds_it(capsys: pytest.CaptureFixture[str]) -> None:
    pi = device("rpi4")
    cost = predict_graph(tiny(), None, pi)
    print_cost(cost, pi)
    out = capsys.readouterr().out
    table = out.split("\n\n")[0].splitlines()
    assert table[0].split() == ["layer", "kind", "bound", "by", "ms", "M", "MACs", "KB", "moved", "share"]
    assert [line.split()[0] for line in table[1:5]] == ["a", "b", "silu", "fc"]
    assert all(f"{layer.kind} " in line and f" {layer.bound} " in line for line, layer in zip(table[1:5], cost.per_layer, strict=True))
    assert "rpi4 means its default profile rpi4-ort" in out
    assert "90% interval; predicted, not measured" in out
    assert "above idle" in out and "in total" in out
    assert all(note in out for note in cost.notes)
