"""Which groups may vanish, and what goes with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.graph.branches import End, left
from edgeprune.graph.trace import trace
from tests.networks import NETWORKS, Residual, conv_bn, traced

EXPECTED = {
    "residual": {"body.1.a.0", "body.2.a.0"},
    "bottleneck": {"body.1.b.0", "body.2.b.0"},
    "grouped": {"body.1.b.0"},
    "option_a": {"body.a.0"},
    "mobile": {"body.1.a.0", "body.2.a.0"},
    "sum_and_slice": {"body.free.0"},
    "attention": {"up"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_inner_widths_of_residual_branches_may_vanish_and_no_others(name: str) -> None:
    assert set(traced(name)[1].branches) == EXPECTED.get(name, set())


class Sum(nn.Module):
    """A stem and two branches of two convs each; how they are put together is each test's own."""

    def __init__(self, put: Callable[[Sum, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.a, self.b = conv_bn(8, 6), conv_bn(6, 8, act=False)
        self.c, self.d = conv_bn(8, 5), conv_bn(5, 8, act=False)
        self.last = nn.Conv2d(8, 4, 1)
        self._put = put

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self._put(self, self.stem(x)))
        return out


def may_vanish(put: Callable[[Sum, Tensor], Tensor]) -> set[str]:
    return set(trace(Sum(put).eval(), torch.randn(1, 3, 8, 8)).branches)


@pytest.mark.parametrize(
    ("put", "expected"),
    [
        (lambda n, x: x + n.b(n.a(x)), {"a.0"}),
        (lambda n, x: n.b(n.a(x)) + x + n.d(n.c(x)), {"a.0", "c.0"}),
        (lambda n, x: n.b(n.a(x)) + n.d(n.c(x)), set()),  # nothing would be left of the sum
        (lambda n, x: x + n.b(n.a(x)) + n.d(n.a(x)[:, :5]), set()),  # half of it is read elsewhere
        (lambda n, x: x + F.relu(n.b(n.a(x))), set()),
        (lambda n, x: x * n.b(n.a(x)), set()),
        (lambda n, x: x - n.b(n.a(x)), set()),
        (lambda n, x: x + n.b(n.a(x)).mean((2, 3), keepdim=True), set()),
        (lambda n, x: n.stem[1](x) + n.b(n.a(F.max_pool2d(x, 8))), set()),  # the branch is the one that is broadcast
        (lambda n, x: (y := n.b(n.a(x))) + x * y.mean(), set()),  # its result is read twice
        (lambda n, x: x + n.b(n.a(x)) + n.b(n.a(2 * x)), set()),  # its layers run twice
        (lambda n, x: n.b(n.a(x)), set()),
    ],
)
def test_a_branch_must_end_in_a_sum_that_outlives_it(put: Callable[[Sum, Tensor], Tensor], expected: set[str]) -> None:
    assert may_vanish(put) == expected


def test_what_goes_with_a_branch_and_what_makes_its_constant() -> None:
    graph = traced("bottleneck")[1]
    branch = graph.branches["body.2.b.0"]
    (end,) = branch.ends
    assert end == End("body.2.c.0.weight", None, "body.2.c.1.", 1e-5, 2)
    kinds = [graph.ops[number].kind for number in sorted(branch.ops)]
    assert kinds == ["conv", "norm", "activation"] * 2 + ["conv", "norm"], "all three convs, though one reads the stream"
    assert {name.rpartition(".")[0] for name in branch.tensors} == {f"body.2.{layer}" for layer in ("a.0", "a.1", "b.0", "b.1", "c.0")}
    assert not branch.tensors & set(end.held)


def test_a_layer_norm_in_front_of_a_branch_goes_with_it() -> None:
    branch = traced("attention")[1].branches["up"]
    assert branch.tensors == {"norm2.weight", "norm2.bias", "up.weight", "up.bias", "down.weight"}
    assert branch.ends == (End("down.weight", "down.bias", None, 0.0, 0),)


class Shared(Residual):
    """What the branch reads first is read by the sum too."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(x))
        out: Tensor = y + self.b(self.a(y))
        return out


def test_what_others_need_stays() -> None:
    graph = trace(nn.Sequential(conv_bn(3, 8), Shared(8), nn.Conv2d(8, 2, 1)).eval(), torch.randn(1, 3, 8, 8))
    (branch,) = graph.branches.values()
    assert not any(name.startswith("1.norm") for name in branch.tensors)


def test_left_counts_by_plan() -> None:
    graph = traced("residual")[1]
    first = [g.name for g in graph.groups].index("body.1.a.0")
    widths = np.ones((3, len(graph.groups)))
    assert left(graph, widths, 2, lambda name: [0]).tolist() == [[1, 1]]
    widths[1, first] = 0
    assert left(graph, widths, 2, lambda name: [0] if name == "body.1.a.0" else [1]).tolist() == [[1, 1], [0, 1], [1, 1]]
