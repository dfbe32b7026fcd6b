"""One ranking over all groups: the least important channels of the whole network go first.

Steps of channels are removed one by one until the budget holds; with `per_cost` (the default) the importance a step loses is
divided by the share of the budget it saves, priced anew after every step because layers share their sizes.
Cost: one evaluation of all groups per removed step. Source: the common form of global magnitude pruning (Molchanov et al.,
ICLR 2017); pricing by cost after Shen et al., "Structural Pruning via Latency-Saliency Knapsack" (HALP), NeurIPS 2022.
"""

from __future__ import annotations

from edgeprune.allocate.search import Search
from edgeprune.criteria.probe import Probe
from edgeprune.device.cost import CostModel
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.widths import DEFAULT_RULES, WidthRules

NEEDS = ()
PAPER = "Molchanov et al., ICLR 2017; per cost after Shen et al., NeurIPS 2022"


def allocate(
    graph: ChannelGraph,
    scores: Scores,
    budget: Budget,
    cost: CostModel | None,
    probe: Probe | None,
    *,
    rules: WidthRules = DEFAULT_RULES,
    normalise: str = "auto",
    per_cost: bool = True,
) -> Plan:
    """Remove the globally least important steps until the budget holds, then fill. Raises BudgetError with the floor."""
    search = Search(graph, scores, budget, cost, rules=rules, normalise=normalise)
    search.check()
    levels = search.shrink(search.top, (lambda saved: saved) if per_cost else None)
    return search.plan(search.from_levels(search.use_up(levels)))
