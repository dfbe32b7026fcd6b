"""Greedy narrowing, a fixed share of the cost at a time; the layer is chosen by what its narrowing does to the network or to its DI.

Every step narrows one group by so many channels that about `share` of the dense cost is saved. Which group, `layer_choice` says:
accuracy: every group is tried, the candidate with the best validation accuracy stays (ties, and images without labels: the least loss);
    the published rule. Cost: groups * steps runs of small networks.
di_per_cost: the group that loses the least discriminant information per unit of cost saved, as a share of what the layer had:
    log R(k) - log R(k') over the cost, with R(k) = DI(best k channels) / DI(all). One pass over the data.
structure: not greedy: the widths of the largest sum of log R under the budget, by the integer program of the knapsack. It stands where the
    paper has "structure distillation", which could not be recovered: our own stand-in, not theirs.
DI is of pooled features, R of the order that the scores give (use the criterion di for the paper's); a group looked at in several places
has the mean of their curves.
Source: Hou, Kung, "A Feature-map Discriminant Perspective for Pruning Deep Neural Networks", arXiv 2005.13796, and the first author's
public code. We differ in: the order within a layer is not computed anew after every step, and there is no training between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune.allocate import knapsack
from edgeprune.allocate.judge import judge_of
from edgeprune.allocate.search import Floats, Search, Widths
from edgeprune.allocate.workers import Workers
from edgeprune.criteria.di import Moments
from edgeprune.criteria.probe import Probe, Statistic, View
from edgeprune.criteria.screening import checked_labels
from edgeprune.device.cost import CostModel
from edgeprune.errors import UsageError
from edgeprune.graph import ChannelGraph, ChannelGroup
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.train import Progress, silent
from edgeprune.widths import DEFAULT_RULES, WidthRules

NEEDS = ("images", "labels")
PAPER = "Hou and Kung, arXiv 2005.13796 (its structure distillation was not recovered; layer_choice structure is our stand-in)"
CHOICES = ("accuracy", "di_per_cost", "structure")
LEAST = 1e-6  # of its information, that a group keeps in the curves' logarithms


def allocate(
    graph: ChannelGraph,
    scores: Scores,
    budget: Budget,
    cost: CostModel | None,
    probe: Probe | None,
    *,
    rules: WidthRules = DEFAULT_RULES,
    normalise: str = "auto",
    **options: Any,
) -> Plan:
    """The plan for this one budget; other options as for `learn`."""
    return learn(Search(graph, scores, budget, cost, rules=rules, normalise=normalise), probe, **options).plan(budget, cost)


def learn(
    search: Search,
    probe: Probe | None,
    *,
    layer_choice: str = "di_per_cost",
    share: float = 0.02,
    rho: float = 1.0,
    images: int = 1024,
    recalibration_images: int = 256,
    jobs: int = 1,
    cluster: str = "",
    progress: Progress = silent,
) -> Greedy:
    """The path from the dense network down to the budget of the search; plans of milder budgets lie on it.

    `share` of the dense cost goes per step; `rho` is the ridge of DI, as a share of the mean variance of a layer's features. `images`
    at most are looked at, or judge; `recalibration_images`, `jobs`, `cluster`: for layer_choice accuracy, see judge.py and Workers.
    Raises BudgetError with the floor, UsageError for options out of range, DataError for missing images or labels.
    """
    if layer_choice not in CHOICES:
        raise UsageError(f"layer_choice must be one of {', '.join(CHOICES)}, got {layer_choice!r}.")
    if not 0 < share <= 1 or not 0 < rho < float("inf"):
        raise UsageError(f"share must be in (0, 1] and rho positive, got {share} and {rho}.")
    search.check()
    if layer_choice != "accuracy":
        search = replace(search, given=retained(search, probe, images, rho))
        return Greedy(search, layer_choice, share, None, progress)
    judge = judge_of(probe, images=images, recalibration_images=recalibration_images, loss="divergence", steps=0, recover="bn")
    return Greedy(search, layer_choice, share, Workers(judge, jobs=jobs, cluster=cluster), progress)


@dataclass(eq=False)
class Greedy:
    """The steps taken so far; goes on where a budget needs more of them."""

    search: Search
    layer_choice: str
    share: float
    workers: Workers | None
    progress: Progress
    path: list[Widths] = field(default_factory=list)
    candidates: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """How the layers were chosen, the steps, and the candidates that were run."""
        return {"layer_choice": self.layer_choice, "steps": max(0, len(self.path) - 1), "evaluations": self.candidates}

    def plan(self, budget: Budget, cost: CostModel | None = None) -> Plan:
        """The first point of the path that fits, then filled. Raises BudgetError with the floor."""
        search = replace(self.search, budget=budget, cost=cost)
        search.check()
        if self.layer_choice == "structure":
            return search.plan(search.from_levels(knapsack.best_levels(search)))
        self.path = self.path or [search.top]
        fits = search.fits(search.from_levels(np.stack(self.path)))
        if not fits.any():
            self._go_on(search)
        first = int(np.argmax(fits)) if fits.any() else len(self.path) - 1
        return search.plan(search.from_levels(search.use_up(self.path[first])))

    def _go_on(self, search: Search) -> None:
        if self.workers is None:
            self._walk(search, lambda moves, price: int(np.argmin(price)))
            return
        with self.workers as workers:

            def by_accuracy(moves: Widths, price: Floats) -> int:
                self.candidates += len(moves)
                verdicts = workers.verdicts([search.plan(search.from_levels(levels)) for levels in moves])
                return min(range(len(moves)), key=lambda i: (-np.nan_to_num(verdicts[i].accuracy), verdicts[i].loss))

            self._walk(search, by_accuracy)

    def _walk(self, search: Search, choose: Callable[[Widths, Floats], int]) -> None:
        """`choose` gets the moves, (moves, groups), and the value that each loses per share of the budget it saves."""
        levels = self.path[-1]
        use = search.use(search.from_levels(levels))[0]
        first = max(float(use.max()), 1.0)
        step = self.share * search.use(search.from_levels(search.top))[0]
        while (use > 1).any():
            moves, saved = _moves(search, levels, use, np.minimum(step, np.maximum(use - 1, 0)))
            lost = sum((v[levels[g]] - v[moves[:, g]] for g, v in enumerate(search.values)), np.zeros(len(moves)))
            levels = moves[choose(moves, lost / saved)]
            use = search.use(search.from_levels(levels))[0]
            self.path.append(levels)
            left = max(0.0, float(use.max()) - 1)
            self.progress("removing step by step", round(1000 * (first - 1 - left)), round(1000 * (first - 1)))


def _moves(search: Search, levels: Widths, use: Floats, wanted: Floats) -> tuple[Widths, Floats]:
    """One way to narrow each group: just as far as saves `wanted` (limits,), or all the way down; (moves, groups) and what each saves.

    Only the limits that are exceeded count; groups that save nothing of them are left out while there are others.
    """
    over = use > 1
    moves, saved = [], []
    for g in np.flatnonzero(levels > 0):
        narrower = np.repeat(levels[None], levels[g], axis=0)
        narrower[:, g] = np.arange(levels[g] - 1, -1, -1)
        gains = (use - search.use(search.from_levels(narrower)))[:, over]
        enough = np.flatnonzero((gains >= wanted[over]).any(axis=1))
        chosen = int(enough[0]) if len(enough) else len(narrower) - 1
        moves.append(narrower[chosen])
        saved.append(float(gains[chosen].sum()))
    useful = np.array(saved) > 1e-12 if max(saved) > 1e-12 else np.ones(len(saved), dtype=np.bool_)
    return np.stack(moves)[useful], np.maximum(np.array(saved)[useful], 1e-12)


def retained(search: Search, probe: Probe | None, images: int, rho: float) -> tuple[Floats, ...]:
    """Log R of every allowed width of every group: the logarithm of the share of DI that its best channels keep."""
    if probe is None or probe.data is None:
        raise UsageError("di_greedy looks at feature maps: give model and data to allocate, or --data.")
    curves = _Curves()
    Probe(probe.model, probe.graph, _first(probe.data, images)).gather(curves)
    found = []
    for group, allowed in zip(search.graph.groups, search.allowed, strict=True):
        order = np.argsort(-search.scores.values[group.name], kind="stable")
        kept = [curve for moments in curves.of(group) if (curve := retention(moments, order, rho)) is not None]
        share = np.mean(kept, axis=0) if kept else np.arange(1, group.channels + 1) / group.channels
        found.append(np.log(np.maximum(np.concatenate([[0.0], share])[allowed], LEAST)))
    return tuple(found)


def retention(moments: Moments, order: Widths, rho: float) -> Floats | None:
    """R(k) = DI(first k channels of `order`) / DI(all), (channels,), rising to 1; None where the layer tells no classes apart.

    All of them from one factor: with L L' = S + rho I in this order, DI of the first k is the sum of the first k rows of (L^-1 Xb'Yb)^2.
    """
    scatter, cross, _ = moments.centred()
    ridge = rho * float(scatter.diagonal().mean())
    if ridge <= 0:
        return None
    index = torch.from_numpy(np.ascontiguousarray(order))
    factor = torch.linalg.cholesky(scatter[index][:, index] + ridge * torch.eye(len(index), dtype=scatter.dtype))
    rows: Tensor = torch.linalg.solve_triangular(factor, cross[index], upper=False).square().sum(dim=1)
    total = rows.cumsum(dim=0)
    return np.asarray((total / total[-1]).numpy()) if float(total[-1]) > 0 else None


def _first(data: Iterable[Any], images: int) -> Iterator[Any]:
    """The first batches that hold `images` images together, whole."""
    for batch in data:
        yield batch
        images -= len(batch[1]) if isinstance(batch, (tuple, list)) and len(batch) > 1 else images
        if images <= 0:
            return


class _Curves(Statistic):
    """Moments of the pooled maps of every tap."""

    def __init__(self) -> None:
        self._moments: dict[tuple[str, int], Moments] = {}

    def update(self, view: View) -> None:
        """Add one batch."""
        if view.aligned:
            labels = torch.nn.functional.one_hot(checked_labels(view.labels, len(view.maps)))
            self._moments.setdefault(view.key, Moments()).add(view.pooled, labels)

    def of(self, group: ChannelGroup) -> list[Moments]:
        """Those of one group."""
        return [moments for (name, _), moments in self._moments.items() if name == group.name]

    def scores(self, images: int) -> Scores:
        """None: the moments are the result."""
        return Scores("di", {})
