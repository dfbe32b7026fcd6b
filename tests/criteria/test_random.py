from __future__ import annotations

import numpy as np

from edgeprune import criteria
from tests.networks import build, traced


def test_a_seed_is_an_order_and_another_seed_another() -> None:
    model, graph = traced("residual")
    first, again, other = (criteria.score(graph, model, "random", seed=s).values for s in (3, 3, 4))
    for group in graph.groups:
        assert (first[group.name] == again[group.name]).all()
        assert (first[group.name] != other[group.name]).any()
        assert ((first[group.name] >= 0) & (first[group.name] < 1)).all()
    names = [g.name for g in graph.groups if g.channels == 8]
    assert (first[names[0]] != first[names[1]]).any(), "groups must not share their order"


def test_it_looks_at_nothing() -> None:
    _, graph = traced("plain")
    one, other = (criteria.score(graph, build("plain", seed=s), "random").values for s in (0, 1))
    assert all((one[name] == other[name]).all() for name in one)


def test_numbers_are_spread_evenly() -> None:
    _, graph = traced("attention")
    drawn = np.concatenate([criteria.score(graph, traced("attention")[0], "random", seed=s).values["up"] for s in range(100)])
    assert abs(drawn.mean() - 0.5) < 0.02 and abs(drawn.var() - 1 / 12) < 0.005
