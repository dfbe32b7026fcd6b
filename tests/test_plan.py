from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import UsageError
from edgeprune.plan import Budget, Plan, Scores
from tests.networks import NETWORKS, traced


def test_a_budget_holds_the_limits_that_are_set() -> None:
    assert Budget(macs=0.5, latency_ms=30).limits() == {"latency_ms": 30.0, "macs": 0.5}
    assert all(isinstance(v, float) for v in Budget(params=1_000_000).limits().values())


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -0.5])
@pytest.mark.parametrize("name", ["latency_ms", "energy_mj", "macs", "params", "size_bytes", "peak_memory_bytes"])
def test_a_limit_is_a_positive_number(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} must be a positive number, got"):
        Budget(**{name: value})


def test_a_budget_needs_a_limit() -> None:
    with pytest.raises(UsageError, match="no budget given: set at least one of latency_ms"):
        Budget()


def test_fractions_of_macs_and_params_become_counts_and_nothing_else_does() -> None:
    dense = {"macs": 200.0, "params": 50.0}
    assert Budget(macs=0.25, params=1.0, latency_ms=0.5).absolute(dense) == {"macs": 50.0, "params": 50.0, "latency_ms": 0.5}
    assert Budget(macs=120, size_bytes=0.5).absolute(dense) == {"macs": 120.0, "size_bytes": 0.5}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 1.0])
def test_uniform_plans_keep_their_share_of_every_group(name: str, keep: float) -> None:
    graph = traced(name)[1]
    plan = Plan.uniform(graph, keep)
    assert set(plan.keep) == {g.name for g in graph.groups}
    for group in graph.groups:
        kept = plan.keep[group.name]
        assert kept == tuple(range(len(kept)))
        assert len(kept) == max(1, len(kept)) and abs(len(kept) - keep * group.channels) <= 1


def test_uniform_plans_round_and_follow_scores() -> None:
    graph = traced("plain")[1]
    plan = Plan.uniform(graph, 0.6, round_to=4)
    assert [len(plan.keep[g.name]) for g in graph.groups] == [4, 8, 4]
    scores = Scores("x", {g.name: -np.arange(g.channels, dtype=np.float64) % 3 for g in graph.groups})
    plan = Plan.uniform(graph, 0.5, scores)
    assert plan.keep["body.0.0"] == (1, 2, 4, 7)  # scores 0 2 1 0 2 1 0 2: the 2s, then the first 1
    for bad in (0, -0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match="keep must be a fraction"):
            Plan.uniform(graph, bad)


def test_ties_keep_the_lower_number_and_unnamed_groups_stay_whole() -> None:
    graph = traced("plain")[1]
    flat = Scores("x", {g.name: np.ones(g.channels) for g in graph.groups})
    assert Plan.from_widths(graph, {"body.0.0": 3, "body.2.0": 2, "body.3.0": 1}, flat).keep == {
        "body.0.0": (0, 1, 2),
        "body.2.0": (0, 1),
        "body.3.0": (0,),
    }


keeps = st.dictionaries(st.text(max_size=8), st.sets(st.integers(0, 999), min_size=1).map(lambda s: tuple(sorted(s))), max_size=6)


@settings(deadline=None, derandomize=True)
@given(keep=keeps)
def test_plans_survive_json_and_hash_by_content(keep: dict[str, tuple[int, ...]]) -> None:
    plan = Plan(keep)
    back = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back == plan and back.sha256 == plan.sha256
    assert Plan(dict(reversed(keep.items()))).sha256 == plan.sha256, "the order of the groups does not matter"
    other: dict[str, Any] = {**keep, "another group": (0,)}
    assert Plan(other).sha256 != plan.sha256


def test_plans_of_numpy_integers_can_be_written() -> None:
    graph = traced("plain")[1]
    scores = Scores("x", {g.name: np.random.default_rng(0).random(g.channels) for g in graph.groups})
    plan = Plan.uniform(graph, 0.5, scores)
    assert json.loads(json.dumps(plan.to_json()))["keep"].keys() == plan.keep.keys()
    assert all(type(c) is int for kept in plan.keep.values() for c in kept)
