"""One plan for networks that were slimmed twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import edgeprune as ep
from edgeprune.graph.slim import named_tensors, slim
from edgeprune.origin import Origin
from tests.colours import SIDE, colour_net, same
from tests.networks import images, traced

EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)


def test_two_plans_after_each_other_are_one() -> None:
    """Random plans: slimming twice gives the tensors of slimming once by the composed plan, value by value."""
    model, random = colour_net(), np.random.default_rng(0)
    graph = ep.trace(model, EXAMPLE)

    def draw(g: ep.ChannelGraph) -> ep.Plan:
        keep = {group.name: random.choice(group.channels, random.integers(1, group.channels + 1), replace=False) for group in g.groups}
        return ep.Plan({name: tuple(sorted(int(c) for c in channels)) for name, channels in keep.items()})

    for _ in range(5):
        first = draw(graph)
        small = slim(model, graph, first)
        later = ep.trace(small, EXAMPLE)
        second = draw(later)
        twice = slim(small, later, second)
        once = slim(model, graph, Origin(model, graph, first).then(later, second))
        assert same(dict(named_tensors(twice)), dict(named_tensors(once)))


@pytest.mark.parametrize("name", ["residual", "bottleneck", "option_a"])
def test_branches_that_went_in_either_plan_are_gone_in_the_one(name: str) -> None:
    model, graph = traced(name)
    half = ep.Plan.uniform(graph, 0.5).keep
    none = dict.fromkeys(graph.branches, ())
    for first in ({**half, **none}, half):
        small = slim(model, graph, ep.Plan(first))
        later = ep.trace(small, images(name))
        second = ep.Plan({**ep.Plan.uniform(later, 0.5).keep, **dict.fromkeys(later.branches, ())})
        one = Origin(model, graph, ep.Plan(first)).then(later, second)
        assert set(one.empty) == set(graph.branches)
        assert same(dict(named_tensors(slim(small, later, second))), dict(named_tensors(slim(model, graph, one))))
