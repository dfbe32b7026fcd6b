from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.allocate import Planner, allocate
from edgeprune.allocate.judge import ROWS, judge_of
from edgeprune.allocate.layer_compensated import BEST, Compensation, Evolution, Individual, Ranking, learn
from edgeprune.allocate.search import Search
from edgeprune.criteria.probe import Probe
from edgeprune.errors import BudgetError, UsageError
from edgeprune.plan import Budget, Scores
from edgeprune.train import silent
from edgeprune.widths import WidthRules
from tests.allocate.problems import COST, between, problem, widths
from tests.networks import images

RULES = WidthRules(round_to=1)


def searching(name: str = "inception", budget: Budget | None = None, *, n: int = 24, **options: Any) -> Compensation:
    model, graph, scores = problem(name)
    probe = Probe(model, graph, [(images(name, n), torch.arange(n) % 5)])
    given: dict[str, Any] = {"evaluations": 24, "population": 8, "samples": 4, "images": 16, "recalibration_images": 8, **options}
    search = Search(graph, scores, budget or Budget(macs=0.5), None, rules=RULES)
    return learn(search, probe, **given)


def ranking(search: Search, *, per_cost: bool = False) -> Ranking:
    return Ranking.of(search, per_cost=per_cost)


@pytest.mark.parametrize("name", ["plain", "residual", "inception", "mobile"])
@pytest.mark.parametrize("macs", [0.35, 0.6, 0.85])
def test_the_identity_is_plain_global_ranking(name: str, macs: float) -> None:
    _, graph, scores = problem(name)
    search = Search(graph, scores, Budget(macs=macs), None, rules=RULES)
    try:
        expected = allocate(graph, scores, Budget(macs=macs), method="global", round_to=1, per_cost=False)
    except BudgetError:
        pytest.skip("this network does not get so small")
    own = ranking(search)
    assert search.plan(own.widths(search, own.identity)) == expected


def test_a_shift_protects_a_layer_or_cuts_it_to_its_floor() -> None:
    _, graph, scores = problem("inception")
    search = Search(graph, scores, Budget(macs=0.6), None, rules=RULES)
    own = ranking(search)
    for g in range(len(graph.groups)):
        shift = np.zeros(len(graph.groups))
        shift[g] = 1e9
        raised = own.order(Individual(np.ones_like(shift), shift))
        lowered = own.order(Individual(np.ones_like(shift), -shift))
        steps = len(own.importance[g])
        assert (raised[-steps:] == g).all() and (lowered[:steps] == g).all()


def test_factors_and_shifts_for_all_leave_the_plan_as_it_is() -> None:
    _, graph, scores = problem("inception")
    search = Search(graph, scores, Budget(macs=0.5), None, rules=RULES)
    own = ranking(search)
    rng = np.random.default_rng(0)
    one = Individual(np.exp(rng.normal(size=len(graph.groups))), rng.normal(size=len(graph.groups)) * own.spread)
    same = [one, Individual(3 * one.scale, 3 * one.shift), Individual(one.scale, one.shift + 0.7)]
    plans = [own.widths(search, each).tolist() for each in same]
    assert plans[0] == plans[1] == plans[2] != own.widths(search, own.identity).tolist()


def test_a_compensation_can_give_any_plan() -> None:
    """Whatever another allocator chose, in both forms."""
    _, graph, scores = problem("inception")
    search = Search(graph, scores, Budget(macs=0.5), None, rules=RULES)
    rng = np.random.default_rng(1)
    for per_cost, form in itertools.product((True, False), ("affine", "additive")):
        own = ranking(search, per_cost=per_cost)
        for _ in range(10):
            levels = rng.integers(0, search.top + 1)
            individual = own.giving(levels, form)
            removed = int((search.top - levels).sum())
            order = own.order(individual)
            assert (search.top - np.bincount(order[:removed], minlength=len(levels)) == levels).all()
            assert (individual.scale > 0).all() and (form == "affine" or (individual.scale == 1).all())


def test_harsher_budgets_keep_a_subset() -> None:
    """Of the same ranking, before what is left of a budget is filled."""
    _, graph, scores = problem("inception")
    search = Search(graph, scores, Budget(macs=0.5), None, rules=RULES)
    own = ranking(search)
    rng = np.random.default_rng(2)
    order = own.order(Individual(np.exp(rng.normal(size=len(graph.groups))), rng.normal(size=len(graph.groups)) * own.spread))
    left = [search.top - np.bincount(order[:k], minlength=len(graph.groups)) for k in range(len(order) + 1)]
    assert all((a >= b).all() for a, b in itertools.pairwise(left))
    for macs in (0.3, 0.5, 0.8):
        at = replace(search, budget=Budget(macs=macs))
        fits = at.fits(at.from_levels(np.stack(left)))
        cut = at.from_levels(left[int(np.argmax(fits))])
        individual = Individual(np.ones(len(graph.groups)), np.zeros(len(graph.groups)))
        assert (own.widths(at, individual) >= 1).all() and at.fits(cut[None])[0]


def test_the_best_so_far_falls_and_is_no_worse_than_the_identity_and_the_given_plans() -> None:
    found = searching(start=("knapsack", "global", "uniform"), recover="bn")  # the last look, on the same images, judges as the search
    steps, losses = zip(*found.facts["best_so_far"], strict=True)
    assert list(steps) == sorted(set(steps)) and steps[0] == 1
    assert list(losses) == sorted(losses, reverse=True)
    assert found.facts["evaluations"] == 24 and not found.facts["cut_short"]
    model, graph, scores = problem("inception")
    judge = judge_of(
        Probe(model, graph, [(images("inception", 24), torch.arange(24) % 5)]),
        images=16,
        recalibration_images=8,
        loss="divergence",
        steps=0,
        recover="bn",
    )
    mine = judge(found.plan(Budget(macs=0.5))).loss
    assert mine == pytest.approx(losses[-1], rel=1e-9)
    search = Search(graph, scores, Budget(macs=0.5), None, rules=RULES)
    for method in ("global", "knapsack", "uniform"):
        kept = widths(graph, allocate(graph, scores, Budget(macs=0.5), method=method, round_to=1))
        levels = np.array([int(np.searchsorted(a, w)) for a, w in zip(search.allowed, kept, strict=True)])
        assert mine <= judge(search.plan(search.from_levels(search.use_up(levels)))).loss + 1e-9
    assert found.facts["last_look_images"] == 16  # no more are there
    plain = searching(start=(), per_cost=False, evaluations=1)
    assert plain.plan(Budget(macs=0.5)) == allocate(graph, scores, Budget(macs=0.5), method="global", per_cost=False, round_to=1)


@pytest.mark.parametrize("form", ["affine", "additive"])
def test_seeds_decide_everything(form: str) -> None:
    runs = [searching(seed=seed, form=form, start=()) for seed in (1, 1, 2)]
    assert (runs[0].best[0].scale == runs[1].best[0].scale).all() and (runs[0].best[0].shift == runs[1].best[0].shift).all()
    assert runs[0].facts["best_so_far"] == runs[1].facts["best_so_far"] != runs[2].facts["best_so_far"]
    assert form == "affine" or (runs[0].best[0].scale == 1).all()


def test_one_search_serves_several_budgets() -> None:
    found = searching(budget=Budget(macs=0.3))
    _, graph, scores = problem("inception")
    for budget in (Budget(macs=0.3), Budget(macs=0.6), Budget(params=0.5), between(graph, scores, 0.5, "latency_ms")):
        plan = found.plan(budget, COST)
        use = Search(graph, scores, budget, COST, rules=RULES).use(widths(graph, plan)[None])[0].max()
        assert 0.9 < use <= 1
    with pytest.raises(BudgetError, match="the floor is"):
        found.plan(Budget(macs=0.001))


def test_at_another_budget_it_is_no_worse_than_what_it_started_from() -> None:
    found = searching(budget=Budget(macs=0.3))
    model, graph, scores = problem("inception")
    judge = judge_of(
        Probe(model, graph, [(images("inception", 24), torch.arange(24) % 5)]),
        images=16,
        recalibration_images=8,
        loss="divergence",
        steps=0,
        recover="reconstruct",
        rows=4 * ROWS,
    )
    for budget in (Budget(macs=0.5), Budget(macs=0.7)):
        mine = judge(found.plan(budget)).loss
        for method in found.start:
            assert mine <= judge(allocate(graph, scores, budget, method=method, round_to=1)).loss + 1e-9


def test_it_learns_to_distrust_a_layer_that_shouts() -> None:
    """One group's scores are inflated a thousandfold: plain ranking cuts all others instead, and the search must find better."""
    model, graph, _ = problem("inception")
    rng = np.random.default_rng(0)
    scores = Scores("x", {g.name: (1000.0 if n == 1 else 1.0) * (1 + rng.random(g.channels)) for n, g in enumerate(graph.groups)})
    probe = Probe(model, graph, [(images("inception", 32), torch.arange(32) % 5)])
    options: dict[str, Any] = {"per_cost": False, "start": (), "images": 24, "recalibration_images": 8}
    search = Search(graph, scores, Budget(macs=0.4), None, rules=RULES, normalise="none")
    found = learn(search, probe, evaluations=80, population=16, samples=8, **options)
    losses = [loss for _, loss in found.facts["best_so_far"]]
    kept = widths(graph, found.plan(Budget(macs=0.4)))
    plain = widths(graph, allocate(graph, scores, Budget(macs=0.4), method="global", per_cost=False, round_to=1, normalise="none"))
    assert losses[-1] < 0.9 * losses[0]
    assert plain[1] == graph.groups[1].channels and (kept != plain).any()


def test_the_oldest_dies_and_the_first_generation_ages_as_published() -> None:
    """Random individuals first, the identity last, though it is judged first."""
    _, graph, scores = problem("plain")
    own = ranking(Search(graph, scores, Budget(macs=0.5), None, rules=RULES))
    seen: list[Individual] = []
    alive: list[list[int]] = []

    class Watched(Evolution):
        def _parent(self, pool: Any, rng: np.random.Generator) -> Individual:
            alive.append([next(i for i, s in enumerate(seen) if s is individual) for _, individual in pool])
            return super()._parent(pool, rng)

    def lost(newborn: Any) -> list[float]:
        seen.extend(newborn)
        return [float(len(seen) + i) for i in range(len(newborn))]

    settings = Watched("affine", 4, 2, 0.1, 9, 1, 0, float("inf"))
    best, facts = settings.run(own, [], lost, silent)
    assert len(seen) == facts["evaluations"] == 9
    assert (seen[0].scale == 1).all() and (seen[0].shift == 0).all()
    assert alive[0] == [3, 2, 1, 0]
    assert alive[1:] == [[2, 1, 0, 4], [1, 0, 4, 5], [0, 4, 5, 6], [4, 5, 6, 7]]
    assert best[0] is seen[0] and len(best) == BEST


def test_a_short_search_stops_in_time_and_has_the_identity() -> None:
    found = searching(evaluations=10_000, search_minutes=1e-6, start=())
    assert found.facts["cut_short"] and found.facts["evaluations"] == 8
    assert found.facts["best_so_far"][0][0] == 1


def test_budgets_are_learned_at_the_hardest() -> None:
    model, graph, scores = problem("inception")
    planner = Planner(
        graph, scores, method="layer_compensated", model=model, data=[(images("inception", 12), torch.arange(12) % 5)], rules=RULES,
        evaluations=2, images=8, recalibration_images=4,
    )  # fmt: skip
    assert planner.facts == {}
    assert planner.hardest_first([Budget(macs=0.8), Budget(macs=0.3), Budget(params=0.5)])[0] == 1
    assert planner.plan(Budget(macs=0.3)) != planner.plan(Budget(macs=0.8))
    assert planner.facts["evaluations"] == 2


def test_options_out_of_range_are_refused() -> None:
    for wrong in ({"form": "cubic"}, {"population": 0}, {"samples": 0}, {"mutation": 0.0}, {"evaluations": 0}, {"batch": 0}, {"seed": -1}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            searching(**wrong)
    with pytest.raises(UsageError, match="no allocator named 'knapsak'"):
        searching(start=("knapsak",))
