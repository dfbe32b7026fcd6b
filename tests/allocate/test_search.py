"""What every allocator must do; one that joins the registry is tested by being there."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.allocate import allocate
from edgeprune.allocate.search import Search
from edgeprune.criteria import NORMALISERS
from edgeprune.errors import BudgetError, UsageError
from edgeprune.graph.trace import trace
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.widths import WidthRules
from tests.allocate.problems import ALLOCATORS, COST, between, is_full, known, plan_of, problem, real_figures, stack, widths
from tests.networks import NETWORKS, traced

KINDS = ("macs", "params", "latency_ms", "energy_mj", "size_bytes", "peak_memory_bytes")
FIGURES = [(figure,) for figure in KINDS] + [("macs", "params", "latency_ms")]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ALLOCATORS)
@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_macs_of_the_slim_network_never_exceed_the_budget(method: str, name: str, fraction: float) -> None:
    _, graph, scores = problem(name)
    try:
        plan = plan_of(graph, scores, Budget(macs=fraction), method=method, round_to=1)
    except BudgetError as refused:
        assert refused.plan is not None
        assert real_figures(name, refused.plan)["macs"] > fraction * graph.macs
        return
    assert real_figures(name, plan)["macs"] <= fraction * graph.macs
    assert is_full(graph, scores, Budget(macs=fraction), plan, 1)


@pytest.mark.parametrize("name", ["residual", "mobile", "shuffle", "dense"])
@pytest.mark.parametrize("method", ALLOCATORS)
@pytest.mark.parametrize("figures", FIGURES, ids="+".join)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_every_limit_holds_on_the_slim_network(method: str, name: str, figures: tuple[str, ...], share: float) -> None:
    _, graph, scores = problem(name)
    budget = between(graph, scores, share, *figures)
    plan = plan_of(graph, scores, budget, method=method, cost=COST, round_to=1)
    real = real_figures(name, plan)
    for figure, limit in budget.absolute({"macs": graph.macs, "params": graph.params}).items():
        assert real[figure] <= limit * (1 + 1e-9), figure
    assert is_full(graph, scores, budget, plan, 1)


@pytest.mark.parametrize("round_to", [1, 2, 4, 8])
@pytest.mark.parametrize("method", ALLOCATORS)
@pytest.mark.parametrize("name", ["mobile", "shuffle", "grouped", "dense"])
def test_widths_are_allowed_and_the_best_scored_channels_stay(name: str, method: str, round_to: int) -> None:
    _, graph, scores = problem(name)
    plan = plan_of(graph, scores, between(graph, scores, 0.5, "macs", round_to=round_to), method=method, round_to=round_to)
    assert set(plan.keep) == {g.name for g in graph.groups}
    for group in graph.groups:
        kept = plan.keep[group.name]
        span = group.members[0].indices.shape[1]
        assert len(kept) >= 1 and list(kept) == sorted(set(kept))
        assert len(kept) == group.channels or len(kept) * span % round_to == 0
        values = scores.values[group.name]
        gone = np.setdiff1d(np.arange(group.channels), kept)
        assert not len(gone) or values[list(kept)].min() >= values[gone].max()


@pytest.fixture(scope="module")
def deep() -> tuple[Any, Scores]:
    model = stack()
    graph = trace(model, torch.zeros(1, 3, 16, 16))
    known(graph, model, [(torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 10)])
    rng = np.random.default_rng(0)
    return graph, Scores("random", {g.name: rng.lognormal(size=g.channels) for g in graph.groups})


@pytest.mark.parametrize("method", ALLOCATORS)
@pytest.mark.parametrize("budget", [Budget(macs=0.3), Budget(macs=0.5), Budget(macs=0.9), Budget(params=0.5), Budget(macs=0.5, params=0.4)])
@pytest.mark.parametrize("round_to", [1, 8])
def test_the_budget_is_used_to_two_percent(deep: tuple[Any, Scores], method: str, budget: Budget, round_to: int) -> None:
    graph, scores = deep
    plan = plan_of(graph, scores, budget, method=method, round_to=round_to)
    use = Search(graph, scores, budget, None).use(widths(graph, plan)[None])[0].max()
    assert 0.98 < use <= 1


@pytest.mark.parametrize("method", ALLOCATORS)
def test_a_budget_of_everything_removes_nothing(method: str) -> None:
    for name in ("residual", "shuffle"):
        _, graph, scores = problem(name)
        for budget in (Budget(macs=1.0), Budget(params=1.0), Budget(macs=10 * graph.macs)):
            assert plan_of(graph, scores, budget, method=method, round_to=1) == Plan.uniform(graph, 1.0)


@pytest.mark.parametrize("method", ALLOCATORS)
def test_what_cannot_be_reached_is_a_budget_error_with_the_floor(method: str) -> None:
    _, graph, scores = problem("residual")
    with pytest.raises(BudgetError, match=r"the floor is .* M MACs \(.* of the dense network's\).*--round-to 1 goes down to") as refused:
        plan_of(graph, scores, Budget(macs=0.001), method=method, round_to=4, max_remove=0.5)
    assert refused.value.exit_code == 3
    assert refused.value.plan is not None
    assert widths(graph, refused.value.plan).tolist() == [4, 4, 4]
    with pytest.raises(BudgetError, match=f"ms on {COST.device.profile}: the floor is"):
        plan_of(graph, scores, Budget(latency_ms=1e-6), method=method, cost=COST)
    with pytest.raises(BudgetError, match=r"MB of peak memory: the floor is .* MB of peak memory, .* held up by"):
        plan_of(graph, scores, Budget(peak_memory_bytes=10), method=method)
    with pytest.raises(BudgetError, match=r"Ask for at least .* \(1 of the dense network's\)"):
        plan_of(graph, scores, Budget(macs=0.5), method=method, max_remove=0.0)
    model = nn.Linear(3, 2)
    frozen = trace(model, torch.zeros(1, 3))
    with pytest.raises(BudgetError, match=r"M parameters .*held up by .* \d+%; and no plan reaches .* the floor is"):
        plan_of(graph, scores, Budget(params=0.001, peak_memory_bytes=10), method=method)
    with pytest.raises(BudgetError, match="everything in it is frozen"):
        known(frozen, model, [(torch.zeros(12, 3), torch.arange(12) % 2)])
        plan_of(frozen, Scores("l1", {}), Budget(macs=0.5), method=method)


@pytest.mark.parametrize("method", ALLOCATORS)
def test_no_group_loses_more_than_max_remove(method: str) -> None:
    _, graph, scores = problem("inception")
    plan = plan_of(graph, scores, Budget(macs=0.5), method=method, round_to=1, max_remove=0.5)
    assert all(2 * len(plan.keep[g.name]) >= g.channels for g in graph.groups)


@pytest.mark.parametrize("method", ALLOCATORS)
@pytest.mark.parametrize("normalise", NORMALISERS)
def test_every_normaliser_works_and_dead_groups_do_not_break_it(method: str, normalise: str) -> None:
    _, graph, scores = problem("residual")
    dead = Scores("dead", {n: np.zeros_like(v) if i else v for i, (n, v) in enumerate(scores.values.items())})
    for given in (scores, dead):
        plan = plan_of(graph, given, Budget(macs=0.5), method=method, round_to=1, normalise=normalise)
        assert real_figures("residual", plan)["macs"] <= 0.5 * graph.macs


@pytest.mark.parametrize("method", ALLOCATORS)
def test_allocation_is_deterministic_and_ignores_the_scale_of_scores(method: str) -> None:
    _, graph, scores = problem("inception")
    scaled = Scores("l1", {n: 1e6 * v for n, v in scores.values.items()})
    plans = [plan_of(graph, s, Budget(macs=0.5), method=method, round_to=1) for s in (scores, scores, scaled)]
    assert plans[0] == plans[1] == plans[2]


def test_unknown_methods_options_and_missing_devices_are_usage_errors() -> None:
    _, graph, scores = problem("residual")
    with pytest.raises(UsageError, match=r"no allocator named 'knapsak'\. Did you mean knapsack"):
        allocate(graph, scores, Budget(macs=0.5), method="knapsak")
    with pytest.raises(
        UsageError, match="uniform has no option concave; it has: keep_dense, max_remove, min_channels, normalise, round_to"
    ):
        allocate(graph, scores, Budget(macs=0.5), method="uniform", concave=True)
    with pytest.raises(UsageError, match="latency_ms needs a device"):
        allocate(graph, scores, Budget(latency_ms=1))
    for wrong in ({"round_to": 0}, {"max_remove": 1.5}, {"min_channels": -1}, {"normalise": "l7"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            allocate(graph, scores, Budget(macs=0.5), **wrong)


@pytest.mark.parametrize("name", NETWORKS)
def test_figures_of_many_choices_equal_those_of_the_real_networks(name: str) -> None:
    """At least two channels each: one channel turns a depthwise conv into a plain one, a grouped one into a depthwise one."""
    _, graph, scores = problem(name)
    rng = np.random.default_rng(0)
    search = Search(graph, scores, Budget(**dict.fromkeys(KINDS, 1)), COST, rules=WidthRules(round_to=1))
    choices = np.stack([rng.integers(2, g.channels + 1, size=3) for g in graph.groups], axis=1)
    figures = search.figures(choices)
    for row, choice in enumerate(choices):
        plan = Plan.from_widths(graph, {g.name: int(w) for g, w in zip(graph.groups, choice, strict=True)})
        for figure, value in real_figures(name, plan).items():
            assert figures[figure][row] == pytest.approx(value, rel=1e-9), figure


def test_values_are_the_importance_that_a_width_keeps() -> None:
    _, graph = traced("residual")
    scores = Scores("x", {g.name: np.arange(1.0, 9.0) for g in graph.groups})
    plain = Search(graph, scores, Budget(macs=0.5), None, rules=WidthRules(round_to=4))
    stream, inner = graph.groups[0], graph.groups[1]
    assert (stream.producing, inner.producing) == (3, 1)
    np.testing.assert_allclose(plain.values[1], [(8 + 7 + 6 + 5) / 36, 1])
    np.testing.assert_allclose(plain.values[0], 3 * plain.values[1])
    concave = Search(graph, scores, Budget(macs=0.5), None, rules=WidthRules(round_to=4), concave=True)
    np.testing.assert_allclose(concave.values[1], [np.log(26 / 36), 0], atol=1e-12)


def test_fill_and_shrink_meet_the_budget_from_both_sides() -> None:
    _, graph, scores = problem("inception")
    search = Search(graph, scores, Budget(macs=0.4), None, rules=WidthRules(round_to=1))
    small = search.shrink(search.top, lambda saved: saved)
    assert search.fits(search.from_levels(small)[None])[0]
    full = search.fill(np.zeros_like(search.top))
    assert search.fits(search.from_levels(full)[None])[0]
    assert (search.fill(full) == full).all()
    assert (search.shrink(full) == full).all()


@pytest.mark.parametrize("method", ALLOCATORS)
def test_every_allocator_honours_the_rules(method: str) -> None:
    _, graph, scores = problem("inception")
    dense = graph.groups[0].name
    rules: dict[str, Any] = {"round_to": 1, "min_channels": 3, "max_remove": 0.4, "keep_dense": [dense]}
    plan = plan_of(graph, scores, Budget(macs=0.7), method=method, **rules)
    for group, allowed in zip(graph.groups, WidthRules(**rules).allowed(graph), strict=True):
        assert len(plan.keep[group.name]) in allowed
    assert len(plan.keep[dense]) == graph.groups[0].channels
    free = plan_of(graph, scores, Budget(macs=0.7), method=method, round_to=1)
    assert free != plan
    with pytest.raises(BudgetError, match="loosen --keep-dense, --min-channels or --max-remove"):
        plan_of(graph, scores, Budget(macs=0.1), method=method, **rules)
    with pytest.raises(UsageError, match="'nowhere' matches no group"):
        plan_of(graph, scores, Budget(macs=0.7), method=method, keep_dense=["nowhere"])


@pytest.mark.parametrize("name", ["residual", "bottleneck", "mobile", "option_a"])
def test_keeping_nothing_is_worth_nothing(name: str) -> None:
    _, graph, scores = problem(name)
    search = Search(graph, scores, Budget(macs=0.5), None, rules=WidthRules(round_to=1, min_channels=0))
    for group, allowed, values in zip(graph.groups, search.allowed, search.values, strict=True):
        assert (allowed[0] == 0) == (group.name in graph.branches)
        best = np.sort(scores.values[group.name])[::-1]
        expected = [best[:width].sum() for width in allowed]
        assert values == pytest.approx(np.array(expected) * values[-1] / expected[-1])
    logs = Search(graph, scores, Budget(macs=0.5), None, rules=WidthRules(round_to=1, min_channels=0), concave=True).values
    assert all(np.isfinite(v).all() and (np.diff(v) >= 0).all() for v in logs)


@pytest.mark.parametrize("figures", [("macs",), ("latency_ms",), ("params", "size_bytes")], ids="+".join)
@pytest.mark.parametrize("name", ["residual", "bottleneck"])
@pytest.mark.parametrize("method", ALLOCATORS)
def test_every_allocator_may_drop_whole_branches_and_stays_in_the_budget(method: str, name: str, figures: tuple[str, ...]) -> None:
    """Half way between what one channel in each branch costs at least and what none does: with one left in each, nothing fits."""
    _, graph, scores = problem(name)
    rules: dict[str, Any] = {"round_to": 1, "min_channels": 0, "max_remove": 1.0}
    anything = Budget(macs=1.0, latency_ms=1e9, params=1.0, size_bytes=1e9)
    floors = []
    for least in (0, 1):
        search = Search(graph, scores, anything, COST, rules=WidthRules(**{**rules, "min_channels": least}))
        floors.append(search.figures(search.smallest[None]))
    budget = Budget(**{figure: float(floors[0][figure][0] + floors[1][figure][0]) / 2 for figure in figures})
    with pytest.raises(BudgetError):
        plan_of(graph, scores, budget, method=method, cost=COST, **{**rules, "min_channels": 1})
    plan = plan_of(graph, scores, budget, method=method, cost=COST, **rules)
    assert plan.empty and set(plan.empty) <= set(graph.branches)
    real = real_figures(name, plan)
    assert all(real[figure] <= limit for figure, limit in budget.limits().items())


def test_a_branch_that_matters_little_goes_first() -> None:
    """The most valuable of all choices, counted one by one."""
    _, graph, scores = problem("residual")
    values = {g.name: np.full(g.channels, 0.01 if g.name == "body.2.a.0" else 1.0) for g in graph.groups}
    little = Scores("made up", values, additive=True)
    for method in ("knapsack", "global"):
        plan = allocate(graph, little, Budget(macs=0.6), method=method, round_to=1, min_channels=0)
        assert plan.empty == ("body.2.a.0",), method
        assert plan.keep["body.1.a.0"] == tuple(range(8))
    even = allocate(graph, scores, Budget(macs=0.6), method="uniform", round_to=1, min_channels=0)
    assert not even.empty, "the same share of all goes, as long as that is enough"


def test_allocators_of_others_take_the_rules_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph, scores = problem("residual")
    seen: list[dict[str, Any]] = []
    any_option, one_option = types.ModuleType("any_option"), types.ModuleType("one_option")

    def anything(graph: Any, scores: Any, budget: Any, cost: Any, probe: Any, **options: Any) -> Plan:
        seen.append(options)
        return Plan.uniform(graph, 0.5)

    def rounded(graph: Any, scores: Any, budget: Any, cost: Any, probe: Any, *, round_to: int = 4) -> Plan:
        seen.append({"round_to": round_to})
        return Plan.uniform(graph, 0.5)

    vars(any_option)["allocate"], vars(one_option)["allocate"] = anything, rounded
    found = {"any_option": any_option, "one_option": one_option}
    monkeypatch.setitem(vars(sys.modules["edgeprune.allocate"]), "find", lambda folder, name, kind: found[name])
    allocate(graph, scores, Budget(macs=0.5), method="any_option", keep_dense=["fc.*"], depth=3)
    assert seen.pop() == {"round_to": 8, "min_channels": 1, "max_remove": 0.9, "keep_dense": ("fc.*",), "depth": 3}
    allocate(graph, scores, Budget(macs=0.5), method="one_option", round_to=2)
    assert seen.pop() == {"round_to": 2}
    with pytest.raises(UsageError, match="one_option has no option max_remove; it has: round_to"):
        allocate(graph, scores, Budget(macs=0.5), method="one_option", max_remove=0.2)
