"""How much of each layer stays: one file per way to turn scores and a budget into a plan, this folder is the registry.

An allocator file has `NEEDS` (a tuple: what beyond scores and a budget), `PAPER` (one line) and
`allocate(graph, scores, budget, cost, probe, **options) -> Plan`. All of them keep the best-scored channels of a group and choose
widths; all end within the budget and fill what is left of it. Outsiders add some through `edgeprune.allocators`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from edgeprune.errors import UsageError
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.registry import find

if TYPE_CHECKING:
    from edgeprune.criteria.probe import Probe
    from edgeprune.device.cost import CostModel
    from edgeprune.graph import ChannelGraph


def allocate(
    graph: ChannelGraph,
    scores: Scores,
    budget: Budget,
    *,
    method: str = "knapsack",
    cost: CostModel | None = None,
    probe: Probe | None = None,
    **options: Any,
) -> Plan:
    """A plan that meets every limit of the budget; never above it, and as close below as whole steps of channels allow.

    `cost` predicts latency and energy on a device; without it only macs, params, size_bytes and peak_memory_bytes can be asked.
    Common options: round_to (8) makes widths multiples of it, min_keep (0.1) is the smallest share of a group. Raises BudgetError
    with the floor when no plan meets the budget, UsageError for unknown methods and options.
    """
    module = find("allocate", method, "allocator")
    known = [p.name for p in inspect.signature(module.allocate).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(f"the allocator {method} has no option {', '.join(unknown)}; it has: {', '.join(known)}.")
    plan: Plan = module.allocate(graph, scores, budget, cost, probe, **options)
    return plan
