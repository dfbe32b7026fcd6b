from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.allocate import allocate, knapsack
from edgeprune.allocate.search import Search
from edgeprune.device.card import device
from edgeprune.device.cost import CostModel
from edgeprune.device.kernels import kernels
from edgeprune.graph import ChannelGraph
from edgeprune.graph.trace import trace
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.widths import WidthRules
from tests.allocate.problems import COST, between, problem, widths
from tests.networks import NETWORKS, traced

FEW_GROUPS = [name for name in NETWORKS if len(traced(name)[1].groups) <= 3]


def value(search: Search, graph: ChannelGraph, plan: Plan) -> float:
    levels = [list(a).index(w) for a, w in zip(search.allowed, widths(graph, plan), strict=True)]
    return float(sum(v[level] for v, level in zip(search.values, levels, strict=True)))


def best_of_all(search: Search) -> float:
    """By enumeration of every choice of widths."""
    levels = np.array(list(itertools.product(*(range(len(a)) for a in search.allowed))))
    fitting = levels[search.fits(search.from_levels(levels))]
    return max(float(sum(v[level] for v, level in zip(search.values, choice, strict=True))) for choice in fitting)


@pytest.mark.parametrize("name", FEW_GROUPS)
@pytest.mark.parametrize("figures", [("macs",), ("params",), ("latency_ms",), ("macs", "latency_ms", "peak_memory_bytes")], ids="+".join)
@pytest.mark.parametrize(("share", "round_to"), [(0.2, 1), (0.5, 1), (0.8, 2)])
def test_it_finds_the_best_of_all_choices(name: str, figures: tuple[str, ...], share: float, round_to: int) -> None:
    _, graph, scores = problem(name)
    budget = between(graph, scores, share, *figures, round_to=round_to)
    plan = allocate(graph, scores, budget, method="knapsack", cost=COST, round_to=round_to)
    search = Search(graph, scores, budget, COST, rules=WidthRules(round_to=round_to), concave=True)
    assert value(search, graph, plan) == pytest.approx(best_of_all(search), abs=1e-9)


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.65, 0.8])
@pytest.mark.parametrize("name", FEW_GROUPS)
def test_the_integer_program_and_its_repairs_come_close_to_it(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What large networks get. Costs are products of widths, so the optimum is not promised; it is, where they are sums (below)."""
    monkeypatch.setattr(knapsack, "EXHAUSTIVE", 0)
    _, graph, scores = problem(name)
    budget = between(graph, scores, share, "macs")
    search = Search(graph, scores, budget, None, rules=WidthRules(round_to=1), concave=True)
    mine, best = value(search, graph, allocate(graph, scores, budget, method="knapsack", round_to=1)), best_of_all(search)
    worst = sum(v[0] for v in search.values)
    assert mine <= best + 1e-9
    assert best - mine <= 0.1 * (best - worst)


class Branches(nn.Module):
    """Parallel branches that are added: MACs are the sum of what each branch costs."""

    def __init__(self) -> None:
        super().__init__()
        self.ins = nn.ModuleList(nn.Conv2d(3, c, k) for c, k in ((9, 1), (7, 3), (5, 5)))
        self.outs = nn.ModuleList(nn.Conv2d(c, 2, 1) for c in (9, 7, 5))

    def forward(self, x: Tensor) -> Any:
        return [b(torch.relu(a(x))) for a, b in zip(self.ins, self.outs, strict=True)]


@pytest.mark.parametrize("share", [0.15, 0.3, 0.45, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("concave", [True, False])
def test_where_costs_are_sums_the_integer_program_is_exact(share: float, concave: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "EXHAUSTIVE", 0)
    graph = trace(Branches(), torch.zeros(1, 3, 8, 8))
    rng = np.random.default_rng(3)
    scores = Scores("x", {g.name: rng.random(g.channels) for g in graph.groups})
    budget = between(graph, scores, share, "macs")
    search = Search(graph, scores, budget, None, rules=WidthRules(round_to=1), concave=concave)
    plan = allocate(graph, scores, budget, method="knapsack", round_to=1, concave=concave)
    assert value(search, graph, plan) >= best_of_all(search) - 1e-3


@pytest.mark.parametrize("name", FEW_GROUPS)
@pytest.mark.parametrize("figure", ["macs", "latency_ms"])
def test_a_larger_budget_is_never_worth_less(name: str, figure: str) -> None:
    """Exact only where all choices are tried; the integer program promises no such thing."""
    _, graph, scores = problem(name)
    worth = []
    for share in np.linspace(0.1, 1, 10):
        budget = between(graph, scores, float(share), figure)
        plan = allocate(graph, scores, budget, method="knapsack", cost=COST, round_to=1)
        worth.append(value(Search(graph, scores, budget, COST, rules=WidthRules(round_to=1), concave=True), graph, plan))
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(worth))


@pytest.mark.parametrize("name", ["inception", "bottleneck", "dense", "mobile"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_it_is_worth_at_least_what_the_others_find(name: str, share: float) -> None:
    _, graph, scores = problem(name)
    budget = between(graph, scores, share, "macs")
    search = Search(graph, scores, budget, None, rules=WidthRules(round_to=1), concave=True)
    mine, ranked, uniform = (
        value(search, graph, allocate(graph, scores, budget, method=m, round_to=1)) for m in ("knapsack", "global", "uniform")
    )
    assert mine >= max(ranked, uniform) - 1e-9


@pytest.mark.parametrize("exhaustive", [0, knapsack.EXHAUSTIVE])
def test_a_latency_budget_takes_no_half_block_of_channels(exhaustive: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "EXHAUSTIVE", exhaustive)
    graph = trace(nn.Sequential(*(nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 64), (64, 64), (64, 64)))), torch.zeros(1, 3, 32, 32))
    scores = Scores("x", {g.name: np.linspace(1, 2, g.channels) for g in graph.groups})
    plain = device("host-ort")
    whole = plain.constants.model_copy(update={"input_block": 16, "output_block": 16})
    blocks = replace(plain, card=plain.card.model_copy(update={"profiles": {"host-ort": whole}}))
    found = {}
    for name, target in (("blocks", blocks), ("plain", plain)):
        cost = CostModel(target)
        budget = Budget(latency_ms=0.55 * float(cost.total_ms(kernels(graph).at(graph.dense_widths))[0]))
        found[name] = widths(graph, allocate(graph, scores, budget, method="knapsack", cost=cost, round_to=4))
    assert all(w % 16 == 0 for w in found["blocks"]) and any(w % 16 for w in found["plain"])
