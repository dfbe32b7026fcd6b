from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeprune.allocate import allocate
from edgeprune.allocate.search import Search
from edgeprune.graph.trace import trace
from edgeprune.plan import Budget, Scores
from edgeprune.widths import WidthRules
from tests.allocate.problems import COST, between, problem, stack, widths


def test_without_prices_and_normalisation_it_is_one_ranking_of_all_channels() -> None:
    """Plain global pruning: the channels that stay are the best of the whole network, up to what filling adds."""
    _, graph, _ = problem("plain")
    rng = np.random.default_rng(1)
    scores = Scores("x", {g.name: rng.random(g.channels) for g in graph.groups})
    budget = between(graph, scores, 0.5, "macs")
    search = Search(graph, scores, budget, None, rules=WidthRules(round_to=1), normalise="none")
    levels = search.shrink(search.top)
    kept = search.from_levels(levels)
    ranked = [np.sort(scores.values[g.name])[::-1] for g in graph.groups]
    lowest_kept = min(r[w - 1] for r, w, a in zip(ranked, kept, search.allowed, strict=True) if w > a[0])
    highest_gone = max(r[w] for r, w in zip(ranked, kept, strict=True) if w < len(r))
    assert highest_gone < lowest_kept
    plan = allocate(graph, scores, budget, method="global", round_to=1, normalise="none", per_cost=False)
    assert (widths(graph, plan) >= kept).all()


def test_an_important_group_is_spared_and_a_useless_one_cut_to_its_floor() -> None:
    _, graph, _ = problem("plain")
    flat = {g.name: np.linspace(1, 2, g.channels) for g in graph.groups}
    first = graph.groups[0].name
    budget = between(graph, Scores("x", flat), 0.5, "macs")
    spared = allocate(graph, Scores("x", {**flat, first: flat[first] * 1e6}), budget, method="global", round_to=1, normalise="none")
    cut = allocate(graph, Scores("x", {**flat, first: flat[first] * 1e-6}), budget, method="global", round_to=1, normalise="none")
    assert widths(graph, spared)[0] == 8
    assert widths(graph, cut)[0] < 8


@pytest.mark.parametrize("factor", [0.5, 7.0])
def test_one_factor_for_all_scores_changes_nothing(factor: float) -> None:
    _, graph, scores = problem("inception")
    scaled = Scores("x", {n: factor * v for n, v in scores.values.items()})
    for normalise in ("none", "sum"):
        plans = [allocate(graph, s, Budget(macs=0.5), method="global", round_to=1, normalise=normalise) for s in (scores, scaled)]
        assert plans[0] == plans[1]


def test_before_filling_harsher_budgets_keep_a_subset() -> None:
    _, graph, scores = problem("inception")
    shrunk = []
    for fraction in (0.8, 0.5, 0.3):
        search = Search(graph, scores, Budget(macs=fraction), None, rules=WidthRules(round_to=1))
        shrunk.append(search.from_levels(search.shrink(search.top, lambda saved: saved)))
    assert (shrunk[0] >= shrunk[1]).all() and (shrunk[1] >= shrunk[2]).all()


@pytest.mark.parametrize("figure", ["macs", "params", "size_bytes", "latency_ms", "energy_mj", "peak_memory_bytes"])
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_every_figure_is_met_to_two_percent_and_never_exceeded(figure: str, round_to: int, share: float) -> None:
    graph = trace(stack(), torch.zeros(1, 3, 32, 32))
    rng = np.random.default_rng(0)
    scores = Scores("random", {g.name: rng.lognormal(size=g.channels) for g in graph.groups})
    budget = between(graph, scores, share, figure, round_to=round_to)
    plan = allocate(graph, scores, budget, method="global", cost=COST, round_to=round_to)
    use = float(Search(graph, scores, budget, COST).use(widths(graph, plan)[None])[0, 0])
    assert 0.98 < use <= 1
