from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeprune.allocate import Planner, allocate
from edgeprune.allocate.di_greedy import learn, retention
from edgeprune.allocate.judge import judge_of
from edgeprune.allocate.search import Search
from edgeprune.criteria.di import Moments, information
from edgeprune.criteria.probe import Probe
from edgeprune.errors import DataError, UsageError
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.widths import WidthRules
from tests.allocate.problems import FEW, problem, widths
from tests.networks import images

RULES = WidthRules(round_to=1)


def probe(name: str, n: int = 24) -> Probe:
    model, graph, _ = problem(name)
    return Probe(model, graph, [(images(name, n), torch.arange(n) % 5)])


def test_one_factor_gives_the_di_of_every_prefix() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 7, generator=generator, dtype=torch.float64)
    y = torch.nn.functional.one_hot(torch.arange(60) % 3)
    x[:, 2] += y[:, 1]
    moments = Moments()
    moments.add(x, y)
    order = np.array([2, 5, 0, 1, 6, 4, 3])
    scatter, cross, _ = moments.centred()
    ridge = 0.5 * float(scatter.diagonal().mean())
    expected = [information(scatter[order[:k]][:, order[:k]], cross[order[:k]], ridge) for k in range(1, 8)]
    found = retention(moments, order, 0.5)
    assert found is not None
    np.testing.assert_allclose(found, np.array(expected) / expected[-1], rtol=1e-10)
    assert (np.diff(found) >= 0).all() and found[-1] == pytest.approx(1)
    dead = Moments()
    dead.add(torch.zeros(60, 7), y)
    assert retention(dead, order, 0.5) is None


@pytest.mark.parametrize("choice", ["accuracy", "di_per_cost", "structure"])
@pytest.mark.parametrize("name", ["residual", "mobile", "inception"])
def test_every_way_to_choose_meets_the_budget(choice: str, name: str) -> None:
    model, graph, scores = problem(name)
    data = probe(name).data
    plan = allocate(
        graph, scores, Budget(macs=0.5), method="di_greedy", model=model, data=data, round_to=1, layer_choice=choice, images=12, share=0.1
    )
    assert graph.macs_at(widths(graph, plan))[0] <= 0.5 * graph.macs


def test_by_accuracy_every_step_keeps_the_best_candidate() -> None:
    _, graph, scores = problem("plain")
    search = Search(graph, scores, Budget(macs=0.6), None, rules=RULES)
    found = learn(search, probe("plain"), layer_choice="accuracy", share=0.15, images=12, recalibration_images=12)
    found.plan(Budget(macs=0.6))
    judge = judge_of(probe("plain"), images=12, recalibration_images=12, loss="divergence", steps=0, recover="bn")
    for before, after in zip(found.path, found.path[1:], strict=False):
        (changed,) = np.flatnonzero(before != after)
        mine = judge(search.plan(search.from_levels(after)))
        saved = search.use(search.from_levels(np.stack([before, after])))[:, 0]
        for other in np.flatnonzero(before > 0):
            if other == changed:
                continue
            rival = before.copy()
            while rival[other] > 0 and search.use(search.from_levels(before))[0, 0] - search.use(search.from_levels(rival))[0, 0] < min(
                0.15 / 0.6, saved[0] - 1
            ):
                rival[other] -= 1
            verdict = judge(search.plan(search.from_levels(rival)))
            assert (mine.accuracy, -mine.loss) >= (verdict.accuracy, -verdict.loss)
    assert found.facts["steps"] == len(found.path) - 1 > 1
    assert found.facts["evaluations"] >= found.facts["steps"]


def test_a_group_that_tells_nothing_goes_first() -> None:
    """With a score order that agrees: the group's best channel keeps all its information, so narrowing it costs nothing."""
    _, graph, scores = problem("inception")
    given = tuple(np.log(np.linspace(0.1, 1, g.channels)) if n else np.zeros(g.channels) for n, g in enumerate(graph.groups))
    from edgeprune.allocate.di_greedy import Greedy
    from edgeprune.train import silent

    search = Search(graph, scores, Budget(macs=0.8), None, rules=RULES, given=given)
    plan = Greedy(search, "di_per_cost", 0.02, None, silent).plan(Budget(macs=0.8))
    kept = widths(graph, plan)
    assert kept[0] < graph.groups[0].channels / 2
    assert (kept[1:] >= 0.6 * graph.dense_widths[1:]).all()


def test_milder_budgets_lie_on_the_path() -> None:
    model, graph, scores = problem("inception")
    planner = Planner(graph, scores, method="di_greedy", model=model, data=probe("inception").data, rules=RULES, **FEW["di_greedy"])
    hard, mild = planner.plan(Budget(macs=0.3)), planner.plan(Budget(macs=0.6))
    steps = planner.facts["steps"]
    assert steps > 2
    assert graph.macs_at(widths(graph, hard))[0] <= 0.3 * graph.macs < graph.macs_at(widths(graph, mild))[0] <= 0.6 * graph.macs
    planner.plan(Budget(macs=0.2))
    assert planner.facts["steps"] > steps


def test_what_it_needs_is_said() -> None:
    model, graph, scores = problem("residual")
    unlabelled = [images("residual", 8)[0]]
    with pytest.raises(DataError, match="needs labels"):
        allocate(graph, scores, Budget(macs=0.5), method="di_greedy", model=model, data=unlabelled, round_to=1)
    with pytest.raises(UsageError, match="give model and data"):
        allocate(graph, scores, Budget(macs=0.5), method="di_greedy", round_to=1)
    for wrong in ({"layer_choice": "loss"}, {"share": 0.0}, {"rho": 0.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            allocate(graph, scores, Budget(macs=0.5), method="di_greedy", model=model, data=unlabelled, round_to=1, **wrong)
    everything = allocate(
        graph, Scores("x", dict(scores.values)), Budget(macs=1.0), method="di_greedy", model=model, data=probe("residual").data
    )
    assert everything == Plan.uniform(graph, 1.0)
