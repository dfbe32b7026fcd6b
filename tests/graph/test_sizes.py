from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from edgeprune.graph.exported import Exported, aten, exported, operation
from edgeprune.graph.sizes import Stuck, rewrite
from edgeprune.graph.slim import slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan


class Numbers(nn.Module):
    """One conv of 11 channels, and every way to write a number of channels behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.deep, self.read = nn.Conv2d(3, 11, 1), nn.Conv2d(11, 11, 1, groups=11), nn.Conv2d(11, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat(self.deep(self.make(x)).split([9, 2], 1), 1)
        h = torch.cat(h.split(5, 1), 1)
        h = torch.cat(h.chunk(3, 1), 1)
        h = torch.cat([h[:, :4], h[:, 4:-2], h.narrow(1, 9, 2)], 1)
        h = h + torch.zeros(1, 11, 1, 1)
        h = h.view(-1, 11, 4, 4).reshape(x.shape[0], 11, 16).view(x.shape[0] * 11, 16).view(x.shape[0], 11, 4, 4)
        out: Tensor = self.read(h)
        return out


X = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
KEPT = (0, 2, 3, 4, 5, 8, 10)


@pytest.fixture(scope="module")
def small() -> Any:
    model = Numbers().eval()
    graph = trace(model, X)
    assert [(g.name, g.channels) for g in graph.groups] == [("make", 11)]
    return slim(model, graph, Plan({"make": KEPT}))


def arguments(network: Any, name: str) -> list[Any]:
    return [n.args[1:] for n in network.graph.nodes if operation(n) == name]


def test_every_number_becomes_what_stays(small: Any) -> None:
    """By hand: of channels 0 to 10 stay 0 2 3 4 5 8 10."""
    assert [list(sizes) for sizes, _ in arguments(small, "split_with_sizes")] == [
        [6, 1],  # 0 to 8, 9 and 10
        [4, 2, 1],  # 0 to 4, 5 to 9, 10
        [3, 2, 2],  # 0 to 3, 4 to 7, 8 to 10
    ]
    assert [cut for cut in arguments(small, "slice") if cut[0] == 1] == [(1, 0, 3), (1, 3, 6)]  # 0 to 3, 4 to 8
    assert arguments(small, "narrow") == [(1, 6, 1)]  # 9 and 10
    assert next(n for n in small.graph.nodes if operation(n) == "zeros").args[0] == [1, 7, 1, 1]
    assert [n for n in small.graph.nodes if operation(n) == "conv2d"][1].args[6] == 7
    shapes = [list(sizes) for (sizes,) in arguments(small, "reshape")]
    assert [s[1:] for s in shapes] == [[7, 4, 4], [7, 16], [16], [7, 4, 4]]
    assert shapes[2][0] == -1, "a product with the batch is left to torch"


def test_only_numbers_of_channels_are_rewritten(small: Any) -> None:
    dense = exported(Numbers().eval(), (X,))
    pairs = list(zip(dense.graph.nodes, small.graph.nodes, strict=True))
    assert all(a.name == b.name for a, b in pairs), "nodes keep their names"
    changed = {operation(a) for a, b in pairs if str(a.args) != str(b.args)}
    assert changed == {"split", "split_with_sizes", "chunk", "slice", "narrow", "zeros", "conv2d", "reshape"}


def test_a_size_that_cannot_be_said_is_reported() -> None:
    """Two sizes that are computed: only one can be left to torch."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    batch = graph.call_function(aten.sym_size.int, (x, 0))
    node = graph.call_function(aten.reshape.default, (x, [-1, batch]))
    graph.output(node)
    with pytest.raises(Stuck) as caught:
        rewrite(Exported({}, graph), {(node.name, 1): np.array([True, False, True])})
    assert (caught.value.node, caught.value.target) == (node.name, "aten.reshape.default")


def test_what_stays_whole_is_left_as_it_is() -> None:
    graph = fx.Graph()
    node = graph.call_function(aten.slice.Tensor, (graph.placeholder("x"), 1, -2))
    graph.output(node)
    network = Exported({}, graph)
    node = next(n for n in network.graph.nodes if operation(n))
    rewrite(network, {(node.name, 1): np.ones(3, dtype=bool)})
    assert node.args[1:] == (1, -2)
    rewrite(network, {(node.name, 1): np.array([True, False, True])})
    assert torch.equal(network(X[:, [0, 2]]), X[:, 2:])
