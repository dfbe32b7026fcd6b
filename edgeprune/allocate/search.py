"""What all allocators share: allowed widths, retained importance, what a choice of widths costs, and filling the budget.

A choice is a vector of widths, one per group; its use is every figure as a share of its limit, so a choice fits when no use is
above 1. Figures of many choices are computed at once, in closed form, without touching the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgeprune.criteria import NORMALISERS
from edgeprune.device.cost import CostModel
from edgeprune.device.kernels import Kernels, kernels
from edgeprune.errors import BudgetError, UsageError
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.widths import DEFAULT_RULES, WidthRules

Widths = NDArray[np.int64]
Floats = NDArray[np.float64]
SLACK = 0.02  # of the budget, that a plan leaves unused only where whole steps of channels leave no choice
PRICED_ANEW = 18  # groups: for each so many, one step is taken before all are priced anew
EXCHANGED = 32  # groups at most that are tried for giving up a step: pairs of groups grow with the square
HOLDERS = 3  # layers that an error about a budget names
UNITS = {  # as the command line takes them
    "latency_ms": ("ms", 1.0),
    "energy_mj": ("mJ", 1.0),
    "macs": ("M MACs", 1e-6),
    "params": ("M parameters", 1e-6),
    "size_bytes": ("MB of size", 1e-6),
    "peak_memory_bytes": ("MB of peak memory", 1e-6),
}


@dataclass(frozen=True, eq=False)
class Search:
    """One allocation problem.

    rules: the widths that groups may take. normalise: what makes the scores of groups comparable (see NORMALISERS of the criteria);
    auto leaves additive scores as they are and divides others by their sum. concave: the value of a group is log(share of its
    importance kept), per layer that writes it, instead of the importance itself, so that no group is starved. given: what each allowed
    width of each group is worth, instead of what follows from the scores.
    """

    graph: ChannelGraph
    scores: Scores
    budget: Budget
    cost: CostModel | None
    rules: WidthRules = DEFAULT_RULES
    normalise: str = "auto"
    concave: bool = False
    given: tuple[Floats, ...] | None = None

    def __post_init__(self) -> None:
        if self.normalise not in ("auto", *NORMALISERS):
            raise UsageError(f"normalise must be auto or one of {', '.join(NORMALISERS)}, got {self.normalise!r}.")
        wants = sorted({"latency_ms", "energy_mj"} & set(self.budget.limits()))
        if wants and self.cost is None:
            raise UsageError(f"a budget in {' and '.join(wants)} needs a device that it can be predicted for (cost=, --device).")

    @cached_property
    def allowed(self) -> tuple[Widths, ...]:
        """The widths each group may take, ascending."""
        return tuple(np.array(a, dtype=np.int64) for a in self.rules.allowed(self.graph))

    @cached_property
    def importance(self) -> tuple[Floats, ...]:
        """The normalised scores of each group, best first, never below 0, times the number of layers that write the group.

        Channels that a residual stream ties are the channels of many layers at once: each layer counts (the chain sum of LeGR).
        Additive scores have counted all of them already.
        """
        as_they_are = self.normalise == "auto" and self.scores.additive
        normal = NORMALISERS["none" if as_they_are else "sum" if self.normalise == "auto" else self.normalise]
        found = []
        for group in self.graph.groups:
            values = normal(np.clip(self.scores.values[group.name], 0, None))
            found.append((1 if as_they_are else group.producing) * np.sort(values - min(0.0, values.min()))[::-1])
        return tuple(found)

    @cached_property
    def values(self) -> tuple[Floats, ...]:
        """Per group, what each allowed width is worth."""
        if self.given is not None:
            return self.given
        kept = [np.cumsum([0.0, *s])[a] for s, a in zip(self.importance, self.allowed, strict=True)]
        if not self.concave:
            return tuple(kept)
        shares = [np.maximum(k / max(k[-1], 1e-300), 1e-6) for k in kept]
        return tuple(g.producing * np.log(share) for g, share in zip(self.graph.groups, shares, strict=True))

    @cached_property
    def limits(self) -> dict[str, float]:
        """Absolute limits by figure."""
        return self.budget.absolute({"macs": float(self.graph.macs), "params": float(self.graph.params)})

    def figures(self, widths: Widths) -> dict[str, Floats]:
        """Every budgeted figure of every choice: widths (choices, groups) -> (choices,) each.

        Latency is the upper end of the interval on a board that is not attached, the corrected prediction on one that is.
        """
        made = self._kernels
        found: dict[str, Floats] = {}
        for name in self.limits:
            if name == "peak_memory_bytes" and self.cost is not None:
                found[name] = self.cost.peak_memory_bytes(made, widths)
            elif name in ("macs", "params", "size_bytes", "peak_memory_bytes"):
                found[name] = getattr(made, name)(widths)
            elif self.cost is not None:
                at = made.at(widths)
                if name == "energy_mj":
                    found[name] = self.cost.energy_mj(at)
                else:
                    found[name] = self.cost.total_ms(at) if self.cost.device.attached else self.cost.interval_ms(at)[1]
        return found

    def use(self, widths: Widths) -> Floats:
        """Figures as shares of their limits, (choices, limits); a choice fits when none is above 1."""
        figures = self.figures(np.atleast_2d(widths))
        return np.stack([figures[name] / limit for name, limit in self.limits.items()], axis=1)

    def fits(self, widths: Widths) -> NDArray[np.bool_]:
        """Whether each choice meets every limit, (choices,)."""
        return np.asarray((self.use(widths) <= 1).all(axis=1))

    @property
    def prices(self) -> Floats:
        """What one channel of each group saves of the exceeded limits, as shares of them, in the dense network, (groups,); above 0."""
        dense = self.from_levels(self.top)
        narrower = np.repeat(self.top[None], len(self.top), axis=0)
        narrower[np.arange(len(self.top)), np.arange(len(self.top))] -= self.top > 0
        widths = self.from_levels(narrower)
        use = self.use(np.concatenate([dense[None], widths]))
        saved = (use[0] - use[1:])[:, use[0] > 1 if (use[0] > 1).any() else use[0] > 0].sum(axis=1)
        return np.asarray(np.maximum(saved / np.maximum((dense - widths).sum(axis=1), 1), 1e-12), dtype=np.float64)

    @property
    def smallest(self) -> Widths:
        """The smallest allowed widths. Raises BudgetError when even they do not fit."""
        return self.from_levels(np.zeros(len(self.allowed), dtype=np.int64))

    def from_levels(self, levels: Widths) -> Widths:
        """Widths from positions in `allowed`: (…, groups) -> (…, groups)."""
        return np.stack([a[levels[..., g]] for g, a in enumerate(self.allowed)], axis=-1)

    def to_levels(self, widths: Widths) -> Widths:
        """The positions in `allowed` of widths, (groups,)."""
        return np.array([int(np.searchsorted(a, w)) for a, w in zip(self.allowed, widths, strict=True)])

    @property
    def top(self) -> Widths:
        """The level of the dense width of each group."""
        return np.array([len(a) - 1 for a in self.allowed])

    def check(self) -> None:
        """Raise BudgetError, with the floor and what would help, when even the smallest allowed widths do not fit."""
        if not self.graph.groups:
            raise BudgetError("no channel of this network can be removed: everything in it is frozen (see edgeprune inspect).")
        smallest = self.smallest
        figures = self.figures(smallest[None])
        missed = [name for name, limit in self.limits.items() if figures[name][0] > limit]
        if not missed:
            return
        dense = self.figures(self.graph.dense_widths[None])
        asked = (self._worded(name, min(1.02 * float(figures[name][0]), float(dense[name][0]))) for name in missed)
        help_text = f"Ask for at least {' and '.join(asked)}"
        name = missed[0]
        if self.rules.round_to > 1:
            help_text += f", or allow widths of any number (--round-to 1 goes down to {self._floor(name, replace(self.rules, round_to=1))})"
        if self.rules != (usual := WidthRules(round_to=self.rules.round_to)):
            help_text += f", or loosen --keep-dense, --min-channels or --max-remove (without them {self._floor(name, usual)})"
        found = "; and no plan reaches ".join(self._missed(name, float(figures[name][0]), smallest) for name in missed)
        raise BudgetError(f"no plan reaches {found}. {help_text}, or use a smaller input.", self.plan(smallest))

    def _missed(self, name: str, floor: float, smallest: Widths) -> str:
        """A limit that cannot be met, its floor, and what holds it up: the layers with the largest part of it at the least widths."""
        where = f" on {self.cost.device.profile}" if self.cost and name in ("latency_ms", "energy_mj") else ""
        at = self._kernels.at(smallest[None])
        if name in ("latency_ms", "energy_mj") and self.cost is not None:
            parts = self.cost.latency_ms(at)[0]
        elif name == "peak_memory_bytes":
            parts = at.input_elements[0] + at.output_elements[0]
        else:
            parts = (at.macs if name == "macs" else at.weight_elements)[0]
        largest = np.argsort(-parts, kind="stable")[:HOLDERS]
        layers = ", ".join(f"{self._layer(int(k))} {parts[k] / max(parts.sum(), 1e-300):.0%}" for k in largest if parts[k] > 0)
        return (
            f"{self._worded(name, self.limits[name])}{where}: the floor is {self._worded(name, floor)}, with every layer at its narrowest, "
            f"and it is held up by {layers}"
        )

    def _layer(self, kernel: int) -> str:
        """The module of a kernel; one without weights by the last that has some before it."""
        made = self._kernels
        own, *_ = made.operations[kernel]
        before = (made.names[k] for k in range(kernel - 1, -1, -1) if self.graph.ops[made.operations[k][0]].weight)
        last = None if self.graph.ops[own].weight else next(before, None)
        return f"{made.names[kernel]} after {last}" if last else made.names[kernel]

    def _floor(self, name: str, rules: WidthRules) -> str:
        """The least that a figure can be under other rules, in words."""
        other = replace(self, rules=rules)
        return self._worded(name, float(other.figures(other.smallest[None])[name][0]))

    def _worded(self, name: str, value: float) -> str:
        """A figure as a user would type and read it; counts with their share of the dense network."""
        unit, scale = UNITS[name]
        dense = {"macs": self.graph.macs, "params": self.graph.params}.get(name)
        share = f" ({value / dense:.3g} of the dense network's)" if dense else ""
        return f"{value * scale:.4g} {unit}{share}"

    def fill(self, levels: Widths) -> Widths:
        """Widen group by group, most importance per share of the budget first, while the choice still fits."""
        levels = levels.copy()
        while True:
            steps = np.flatnonzero(levels < self.top)
            if not len(steps):
                return levels
            wider = np.repeat(levels[None], len(steps), axis=0)
            wider[np.arange(len(steps)), steps] += 1
            use = self.use(self.from_levels(np.concatenate([levels[None], wider])))
            fits = (use[1:] <= 1).all(axis=1)
            if not fits.any():
                return levels
            gain = np.array([self.values[g][levels[g] + 1] - self.values[g][levels[g]] for g in steps])
            price = np.maximum((use[1:] - use[0]).max(axis=1), 1e-12)
            best = int(np.argmax(np.where(fits, gain / price, -1.0)))
            levels = wider[best]

    def use_up(self, levels: Widths) -> Widths:
        """`fill`; where that leaves more than `SLACK` of the budget, exchange a step of one group for one of another, and fill again.

        Of the exchanges that use more of the budget and fit, the one that keeps the most importance.
        """
        while True:
            levels = self.fill(levels)
            used = float(self.use(self.from_levels(levels[None])).max())
            down, up = np.flatnonzero(levels > 0), np.flatnonzero(levels < self.top)
            lost = [self.values[g][levels[g]] - self.values[g][levels[g] - 1] for g in down]
            down = down[np.argsort(lost, kind="stable")[:EXCHANGED]]
            pairs = np.array([(a, b) for a in down for b in up if a != b], dtype=np.int64).reshape(-1, 2)
            if used >= 1 - SLACK or not len(pairs):
                return levels
            moved = np.repeat(levels[None], len(pairs), axis=0)
            moved[np.arange(len(pairs)), pairs[:, 0]] -= 1
            moved[np.arange(len(pairs)), pairs[:, 1]] += 1
            use = self.use(self.from_levels(moved)).max(axis=1)
            better = np.flatnonzero((use <= 1) & (use > used + 1e-9))
            if not len(better):
                return levels
            worth = sum((v[moved[better, g]] for g, v in enumerate(self.values)), np.zeros(len(better)))
            levels = moved[better[int(np.argmax(worth))]]

    def shrink(self, levels: Widths, price_of: Callable[[Floats], Floats] | None = None) -> Widths:
        """Narrow step by step, least importance lost per price first, until the choice fits.

        `price_of` turns the budget shares that each step saves, (steps,), into its price; without it all steps cost the same. Steps are
        priced anew after each; in networks of many groups after a few, of different groups, in which prices hardly change.
        """
        levels = levels.copy()
        use = self.use(self.from_levels(levels[None]))[0]
        at_once = max(1, len(levels) // PRICED_ANEW)
        while (use > 1).any():
            steps = np.flatnonzero(levels > 0)
            narrower = np.repeat(levels[None], len(steps), axis=0)
            narrower[np.arange(len(steps)), steps] -= 1
            after = self.use(self.from_levels(narrower))
            saved = np.maximum((use - after)[:, use > 1].sum(axis=1), 1e-12)
            lost = np.array([self.values[g][levels[g]] - self.values[g][levels[g] - 1] for g in steps])
            span = np.array([self.allowed[g][levels[g]] - self.allowed[g][levels[g] - 1] for g in steps])
            worth = lost / span if price_of is None else lost / price_of(saved)
            best = np.argsort(worth, kind="stable")[:at_once]
            if len(best) == 1:
                levels, use = narrower[best[0]], after[best[0]]
                continue
            path = np.repeat(levels[None], len(best), axis=0)
            for number, group in enumerate(steps[best]):
                path[number:, group] -= 1
            used = self.use(self.from_levels(path))
            fits = (used <= 1).all(axis=1)
            last = int(np.argmax(fits)) if fits.any() else len(path) - 1
            levels, use = path[last], used[last]
        return levels

    def plan(self, widths: Widths) -> Plan:
        """The best-scored channels of each group at these widths."""
        return Plan.from_widths(self.graph, {g.name: int(w) for g, w in zip(self.graph.groups, widths, strict=True)}, self.scores)

    @cached_property
    def _kernels(self) -> Kernels:
        return kernels(self.graph)
