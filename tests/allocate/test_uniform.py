from __future__ import annotations

import numpy as np

from edgeprune.allocate import allocate
from edgeprune.device.kernels import kernels
from edgeprune.plan import Budget, Scores
from tests.allocate.problems import between, problem, widths


def test_groups_keep_the_same_share_but_for_one_filling_step_each() -> None:
    _, graph, scores = problem("plain")
    for share in (0.2, 0.5, 0.8):
        plan = allocate(graph, scores, between(graph, scores, share, "macs"), method="uniform", round_to=1)
        kept = widths(graph, plan) / graph.dense_widths
        assert kept.max() - kept.min() < 0.35
        assert kept.max() < 1 or share == 0.8


def test_shares_do_not_depend_on_scores_where_nothing_is_left_to_fill() -> None:
    """All groups are 8 wide: a budget that half of each meets exactly leaves nothing over."""
    _, graph, scores = problem("residual")
    budget = Budget(macs=float(kernels(graph).macs(np.array([4, 4, 4]))[0]))
    other = Scores("x", {n: v[::-1] * 3 for n, v in scores.values.items()})
    for given in (scores, other):
        assert widths(graph, allocate(graph, given, budget, method="uniform", round_to=1)).tolist() == [4, 4, 4]
