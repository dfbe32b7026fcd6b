"""How much of each layer stays: one file per way to turn scores and a budget into a plan, this folder is the registry.

An allocator file has `NEEDS` (a tuple: what beyond scores and a budget), `PAPER` (one line) and
`allocate(graph, scores, budget, cost, probe, **options) -> Plan`. All of them keep the best-scored channels of a group and choose
widths that the option `rules` (WidthRules) allows; all end within the budget and fill what is left of it. Outsiders add some through
`edgeprune.allocators`; theirs may name single rules instead, such as round_to.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from edgeprune.errors import UsageError
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.registry import find
from edgeprune.widths import DEFAULT_RULES, WidthRules

if TYPE_CHECKING:
    from edgeprune.criteria.probe import Probe
    from edgeprune.device.cost import CostModel
    from edgeprune.graph import ChannelGraph

RULES = {f.name: getattr(DEFAULT_RULES, f.name) for f in fields(WidthRules)}


def allocate(
    graph: ChannelGraph,
    scores: Scores,
    budget: Budget,
    *,
    method: str = "knapsack",
    cost: CostModel | None = None,
    probe: Probe | None = None,
    round_to: int = DEFAULT_RULES.round_to,
    min_channels: int = DEFAULT_RULES.min_channels,
    max_remove: float = DEFAULT_RULES.max_remove,
    keep_dense: Sequence[str] = DEFAULT_RULES.keep_dense,
    **options: Any,
) -> Plan:
    """A plan that meets every limit of the budget; never above it, and as close below as whole steps of channels allow.

    `cost` predicts latency and energy on a device; without it only macs, params, size_bytes and peak_memory_bytes can be asked.
    round_to, min_channels, max_remove, keep_dense: which widths any method may choose, see WidthRules. Raises BudgetError with the
    floor when no plan meets the budget, UsageError for unknown methods and options and for patterns that match nothing.
    """
    module = find("allocate", method, "allocator")
    rules = WidthRules(round_to=round_to, min_channels=min_channels, max_remove=max_remove, keep_dense=keep_dense)
    parameters = inspect.signature(module.allocate).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    takes = known - {"rules"} | (RULES.keys() if "rules" in known else set())
    asked = {name for name, value in RULES.items() if getattr(rules, name) != value} | options.keys()
    if not anything and (unknown := sorted(asked - takes)):
        raise UsageError(f"the allocator {method} has no option {', '.join(unknown)}; it has: {', '.join(sorted(takes))}.")
    single = {name: getattr(rules, name) for name in RULES if anything or name in known}
    plan: Plan = module.allocate(graph, scores, budget, cost, probe, **({"rules": rules} if "rules" in known else single), **options)
    return plan
