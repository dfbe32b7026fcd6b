"""The same share of every group, as large as the budget allows; what is left is filled by importance per cost.

Cost: one evaluation of a few hundred candidate shares. Source: the customary baseline.
"""

from __future__ import annotations

import numpy as np

from edgeprune.allocate.search import Search
from edgeprune.criteria.probe import Probe
from edgeprune.device.cost import CostModel
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.widths import DEFAULT_RULES, WidthRules

NEEDS = ()
PAPER = "customary baseline"


def allocate(
    graph: ChannelGraph,
    scores: Scores,
    budget: Budget,
    cost: CostModel | None,
    probe: Probe | None,
    *,
    rules: WidthRules = DEFAULT_RULES,
    normalise: str = "auto",
) -> Plan:
    """The largest share that fits, then filled. Raises BudgetError with the floor."""
    search = Search(graph, scores, budget, cost, rules=rules, normalise=normalise)
    search.check()
    shares = np.linspace(0, 1, 401)
    levels = np.stack(
        [np.searchsorted(a, shares * g.channels, side="right") - 1 for g, a in zip(graph.groups, search.allowed, strict=True)], 1
    )
    least = [int(a[0] == 0 and len(a) > 1) for a in search.allowed]  # whole branches go where no share of all groups fits
    levels = np.concatenate([np.zeros_like(levels[:1]), np.maximum(levels, least)])
    fitting = np.flatnonzero(search.fits(search.from_levels(levels)))
    return search.plan(search.from_levels(search.use_up(levels[fitting[-1]])))
