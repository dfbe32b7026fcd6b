"""How much of each layer stays: one file per way to turn scores and a budget into a plan, this folder is the registry.

An allocator file has `NEEDS` (a tuple: what beyond scores and a budget), `PAPER` (one line) and
`allocate(graph, scores, budget, cost, probe, **options) -> Plan`. All of them keep the best-scored channels of a group and choose
widths that the option `rules` (WidthRules) allows; all end within the budget and fill what is left of it. One that learns something
that serves several budgets also has `learn(search, probe, **options)`: it learns at the budget of a Search, and returns an object with
`plan(budget, cost) -> Plan` and `facts` (plain values about what it did). Outsiders add some through `edgeprune.allocators`; theirs may
name single rules instead, such as round_to.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgeprune.errors import UsageError
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.registry import find
from edgeprune.widths import DEFAULT_RULES, WidthRules

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocate.search import Search
    from edgeprune.device.cost import CostModel
    from edgeprune.graph import ChannelGraph

SEARCHED = ("rules", "normalise")  # options that make the problem, whatever method solves it
RULES = {f.name: getattr(DEFAULT_RULES, f.name) for f in fields(WidthRules)}


def allocate(
    graph: ChannelGraph,
    scores: Scores,
    budget: Budget,
    *,
    method: str = "knapsack",
    cost: CostModel | None = None,
    model: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    round_to: int = DEFAULT_RULES.round_to,
    min_channels: int = DEFAULT_RULES.min_channels,
    max_remove: float = DEFAULT_RULES.max_remove,
    keep_dense: Sequence[str] = DEFAULT_RULES.keep_dense,
    **options: Any,
) -> Plan:
    """A plan that meets every limit of the budget; never above it, and as close below as whole steps of channels allow.

    `cost` predicts latency and energy on a device; without it only macs, params, size_bytes and peak_memory_bytes can be asked.
    `model` and `data`, an iterable of (inputs, labels) batches, are for methods that look at the network (see `edgeprune allocators`).
    round_to, min_channels, max_remove, keep_dense: which widths any method may choose, see WidthRules. Raises BudgetError with the
    floor when no plan meets the budget, UsageError for unknown methods and options and for patterns that match nothing.
    """
    rules = WidthRules(round_to=round_to, min_channels=min_channels, max_remove=max_remove, keep_dense=keep_dense)
    return Planner(graph, scores, method=method, model=model, data=data, rules=rules, **options).plan(budget, cost)


def options_of(method: str) -> frozenset[str]:
    """The names of the options that a method has. Raises UsageError for unknown methods."""
    return _options(find("allocate", method, "allocator"))[0]


def check_options(method: str, options: Iterable[str], rules: WidthRules = DEFAULT_RULES) -> None:
    """Raises UsageError for an unknown method, and for options and rules that it does not take."""
    known, anything = _options(find("allocate", method, "allocator"))
    takes = known - {"rules"} | (RULES.keys() if "rules" in known else set())
    asked = {name for name, value in RULES.items() if getattr(rules, name) != value} | set(options)
    if not anything and (unknown := sorted(asked - takes)):
        raise UsageError(f"the allocator {method} has no option {', '.join(unknown)}; it has: {', '.join(sorted(takes))}.")


def _options(module: ModuleType) -> tuple[frozenset[str], bool]:
    """The options' names, and whether any other is taken too."""
    makers = [module.allocate, *([module.learn] if hasattr(module, "learn") else [])]
    found = [list(inspect.signature(maker).parameters.values()) for maker in makers]
    names = frozenset(p.name for parameters in found for p in parameters if p.kind is p.KEYWORD_ONLY)
    return names, any(p.kind is p.VAR_KEYWORD for p in found[-1])


class Planner:
    """Plans of one method for one network and its scores; what the method learns, it learns once, at the first budget.

    Raises UsageError for unknown methods and options.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        scores: Scores,
        *,
        method: str,
        model: nn.Module | None = None,
        data: Iterable[Any] | None = None,
        rules: WidthRules = DEFAULT_RULES,
        **options: Any,
    ) -> None:
        self._module = find("allocate", method, "allocator")
        self._learns = hasattr(self._module, "learn")
        check_options(method, options, rules)
        known, anything = _options(self._module)
        single = {name: getattr(rules, name) for name in RULES if anything or name in known}
        self._options = ({"rules": rules} if "rules" in known else single) | options
        self._graph, self._scores, self._model, self._data, self._rules = graph, scores, model, data, rules
        self._learned: Any = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the method says about its search; empty for methods that do not learn, and before the first plan."""
        return getattr(self._learned, "facts", {})

    def plan(self, budget: Budget, cost: CostModel | None = None) -> Plan:
        """The plan at one budget."""
        if not self._learns:
            plan: Plan = self._module.allocate(self._graph, self._scores, budget, cost, self._probe(), **self._options)
            return plan
        if self._learned is None:
            options = {name: value for name, value in self._options.items() if name not in SEARCHED}
            self._learned = self._module.learn(self._search(budget, cost), self._probe(), **options)
        plan = self._learned.plan(budget, cost)
        return plan

    def hardest_first(self, budgets: Sequence[Budget], cost: CostModel | None = None) -> tuple[int, ...]:
        """The numbers of the budgets, the one that leaves plain global ranking the fewest MACs first: the one to learn at."""
        return tuple(sorted(range(len(budgets)), key=lambda number: self._macs(budgets[number], cost)) if len(budgets) > 1 else [0])

    def _probe(self) -> Any:
        if self._model is None:
            return None
        from edgeprune.criteria.probe import Probe

        return Probe(self._model, self._graph, self._data)

    def _search(self, budget: Budget, cost: CostModel | None) -> Search:
        from edgeprune.allocate.search import Search

        normalise = self._options.get("normalise", "auto")
        return Search(self._graph, self._scores, budget, cost, rules=self._rules, normalise=normalise)

    def _macs(self, budget: Budget, cost: CostModel | None) -> float:
        search = self._search(budget, cost)
        search.check()
        return float(self._graph.macs_at(search.from_levels(search.shrink(search.top, lambda saved: saved)))[0])
