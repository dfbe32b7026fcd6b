"""A learned global ranking: each group's importance is shifted (LcP) or scaled and shifted (LeGR), then one threshold cuts all.

    rank = scale * importance + shift,   steps of channels go in ascending rank until the budget holds

Scales and shifts come from regularised evolution: a population of 64, parents the best of 16 drawn with replacement, offspring that
change a tenth of the groups, the oldest dies. They are learned once, at the smallest of several budgets, and serve all of them: at
each, the best six of all that were ever judged, plain global ranking (the identity individual) and the plans that the search started
from are judged once more, on more images, and the best of these comes back: it is never worse, to that judge, than plain ranking.
form="additive": rank = importance + shift. Published (LcP): one latent scalar per layer; how it was found is reconstructed as the search
of LeGR. form="affine": scale > 0 too (LeGR).
We differ in: one pair per group instead of per layer, because scores are per group (a residual stream is one group whose importance
counts once per layer that writes it); `per_cost` divides the importance by the share of the budget that a channel of the dense network
saves, which scales then need not learn (False: as published); `start` adds the plans of other allocators, as compensations that give
these plans, to the first generation (empty: as published); the last look is ours; offspring are born `batch` at a time, so that they
can be judged in parallel (1: as published); fitness is the divergence from the dense network's answers unless `loss` asks for
cross-entropy; candidates are reconstructed before they are judged (`recover`: "bn" recalibrates their batch norms, as is usual; "none": as
published).
Cost: `evaluations` refits and runs of small networks on `images` + `recalibration_images` images.
Source: Chin et al., "Layer-compensated Pruning for Resource-constrained Convolutional Neural Networks", arXiv 1810.00518; "Towards
Efficient Model Compression via Learned Global Ranking", CVPR 2020; evolution after Real et al., "Regularized Evolution for Image
Classifier Architecture Search", AAAI 2019.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from edgeprune.allocate.judge import ROWS, judge_of
from edgeprune.allocate.search import Floats, Search, Widths
from edgeprune.allocate.workers import Workers
from edgeprune.criteria.probe import Probe
from edgeprune.device.cost import CostModel
from edgeprune.errors import UsageError
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.registry import find
from edgeprune.train import Progress, silent
from edgeprune.widths import DEFAULT_RULES, WidthRules

NEEDS = ("images",)
PAPER = "Chin et al., arXiv 1810.00518 (LcP; its search is reconstructed) and CVPR 2020 (LeGR)"
FORMS = ("affine", "additive")
BEST = 6  # individuals that the last look chooses among
CLOSER = 4  # times as many images as the search has, to judge by and to recover on, are looked at last


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
    """The plan of a ranking learned for this one budget; other options as for `learn`."""
    return learn(Search(graph, scores, budget, cost, rules=rules, normalise=normalise), probe, **options).plan(budget, cost)


def learn(
    search: Search,
    probe: Probe | None,
    *,
    form: str = "affine",
    per_cost: bool = True,
    start: Sequence[str] = ("knapsack", "global"),
    population: int = 64,
    samples: int = 16,
    mutation: float = 0.1,
    evaluations: int = 400,
    batch: int = 8,
    images: int = 256,
    recalibration_images: int = 256,
    loss: str = "divergence",
    recover: str = "reconstruct",
    steps: int = 0,
    masked: bool = False,
    seed: int = 0,
    search_minutes: float = math.inf,
    jobs: int = 1,
    cluster: str = "",
    progress: Progress = silent,
) -> Compensation:
    """The compensation that lost least at the budget of `search`. Reproducible from the seed, unless `search_minutes` cut it short.

    `images` judge a candidate that was recovered on `recalibration_images` others; how (`recover`) and by which `loss`: see judge.py.
    `steps`: training steps of every candidate before it is judged. `jobs`, `cluster`: see Workers; results do not depend on them.
    Raises BudgetError with the floor, UsageError for options out of range, DataError for missing images.
    """
    began = time.monotonic()
    search.check()
    settings = Evolution(form, population, samples, mutation, evaluations, batch, seed, 60 * search_minutes)
    how: dict[str, Any] = {"loss": loss, "recover": recover, "steps": steps, "masked": masked}
    judge, closer = (
        judge_of(probe, images=n * images, recalibration_images=n * recalibration_images, rows=n * ROWS, **how) for n in (1, CLOSER)
    )
    ranking = Ranking.of(search, per_cost=per_cost)
    first = [ranking.giving(search.to_levels(_widths_of(name, search)), form) for name in start]
    last_look = CLOSER * (BEST + 1 + len(first)) / batch
    with Workers(judge, jobs=jobs, cluster=cluster) as workers:

        def lost(candidates: Sequence[Individual]) -> list[float]:
            return [v.loss for v in workers.verdicts([search.plan(ranking.widths(search, c)) for c in candidates])]

        best, facts = settings.run(ranking, first, lost, progress, began=began, reserve=last_look)
    about = {
        "form": form,
        "loss": loss,
        "recover": recover,
        "images": len(judge.held[1]),
        "recalibration_images": len(judge.spare[1]),
        "start": list(start),
    }
    about |= {"dense_accuracy": judge.dense.accuracy, "last_look_images": len(closer.held[1])}
    return Compensation(search, ranking, best, tuple(start), Workers(closer, jobs=jobs, cluster=cluster), about | facts)


@dataclass(frozen=True, eq=False)
class Individual:
    """What is added to the importance of each group and what it is multiplied by, (groups,) each."""

    scale: Floats
    shift: Floats


@dataclass(frozen=True, eq=False)
class Ranking:
    """`importance[g]`: of each step of a group, from the least width up, descending; importance per channel, per cost or not."""

    importance: tuple[Floats, ...]

    @staticmethod
    def of(search: Search, *, per_cost: bool) -> Ranking:
        """The mean importance of the channels in every step between two allowed widths."""
        prices = search.prices if per_cost else np.ones(len(search.allowed))
        steps = [np.diff(v) / np.diff(a) for v, a in zip(search.values, search.allowed, strict=True)]
        return Ranking(tuple(s / price for s, price in zip(steps, prices, strict=True)))

    @property
    def spread(self) -> Floats:
        """The standard deviation of each group's importance, (groups,)."""
        return np.array([s.std() if len(s) else 0.0 for s in self.importance])

    @property
    def identity(self) -> Individual:
        """Plain global ranking."""
        return Individual(np.ones(len(self.importance)), np.zeros(len(self.importance)))

    def order(self, individual: Individual) -> Widths:
        """The group of every step in the order in which steps go, (steps,). Within a group the widest goes first, whatever its rank."""
        ranks = [a * s + b for s, a, b in zip(self.importance, individual.scale, individual.shift, strict=True)]
        group = np.repeat(np.arange(len(ranks)), [len(r) for r in ranks])
        level = np.concatenate([np.arange(len(r)) for r in ranks])
        return np.asarray(group[np.lexsort((-level, group, np.concatenate(ranks)))])

    def widths(self, search: Search, individual: Individual) -> Widths:
        """The widths that the threshold leaves at the search's budget, and what still fits beside them, (groups,)."""
        order, groups = self.order(individual), len(self.importance)

        def after(removed: int) -> Widths:
            return search.top - np.bincount(order[:removed], minlength=groups)

        low, high = 0, len(order)  # the least number of steps that fits; costs fall with every step
        while low < high:
            tried = np.unique(np.linspace(low, high - 1, 32).astype(np.int64))
            fits = search.fits(search.from_levels(np.stack([after(int(k)) for k in tried])))
            first = int(np.argmax(fits)) if fits.any() else len(tried)
            high = int(tried[first]) if first < len(tried) else high
            low = int(tried[first - 1]) + 1 if first else low
        return search.from_levels(search.use_up(after(low)))

    def giving(self, levels: Widths, form: str) -> Individual:
        """An individual whose threshold leaves exactly these levels: 1 for the affine form, 0 for the additive one."""
        cut = np.array([_between(s, int(level)) for s, level in zip(self.importance, levels, strict=True)])
        if form == "additive":
            return Individual(np.ones(len(cut)), -cut)
        positive = cut > 0
        middle = float(np.median(cut[positive])) if positive.any() else 1.0  # keeps ranks in the units of importance
        scale = np.where(positive, middle / np.where(positive, cut, 1.0), 1.0)
        return Individual(scale, np.where(positive, 0.0, middle - cut))


def _between(steps: Floats, level: int) -> float:
    """A threshold that keeps the first `level` steps."""
    if not len(steps):
        return 0.0
    if level == 0:
        return float(1.1 * steps[0])
    return float((steps[level - 1] + (steps[level] if level < len(steps) else 0.9 * steps[-1])) / 2)


@dataclass(frozen=True, eq=False)
class Compensation:
    """What was learned; reads plans for any budget. `best`: the best individuals of the search; `start`: see `learn`.

    `facts`: evaluations, seconds, and the best loss so far after each evaluation.
    """

    search: Search
    ranking: Ranking
    best: tuple[Individual, ...]
    start: tuple[str, ...]
    workers: Workers
    facts: dict[str, Any]
    _chosen: dict[Budget, int] = field(default_factory=dict)

    def plan(self, budget: Budget, cost: CostModel | None = None) -> Plan:
        """The plan at this budget, chosen once on more images than the search looked at. Raises BudgetError with the floor.

        Candidates are the best individuals, plain global ranking, and the plans of `start` at this budget.
        """
        search = replace(self.search, budget=budget, cost=cost)
        search.check()
        makers: list[Callable[[], Widths]] = [partial(self.ranking.widths, search, one) for one in (*self.best, self.ranking.identity)]
        makers += [partial(_widths_of, name, search) for name in self.start]
        if budget not in self._chosen:
            with self.workers:
                verdicts = self.workers.verdicts([search.plan(make()) for make in makers])
            self._chosen[budget] = min(range(len(makers)), key=lambda number: verdicts[number].loss)
        return search.plan(makers[self._chosen[budget]]())


@dataclass(frozen=True)
class Evolution:
    """Regularised evolution with its settings; raises UsageError for those out of range."""

    form: str
    population: int
    samples: int
    mutation: float
    evaluations: int
    batch: int
    seed: int
    seconds: float

    def __post_init__(self) -> None:
        good = {"form": self.form in FORMS, "mutation": 0 < self.mutation <= 1, "seconds": self.seconds > 0, "seed": self.seed >= 0}
        good |= {name: getattr(self, name) >= 1 for name in ("population", "samples", "evaluations", "batch")}
        if wrong := [name for name, fine in good.items() if not fine]:
            raise UsageError(f"layer_compensated cannot search with {wrong[0]} = {getattr(self, wrong[0])!r} (forms: {', '.join(FORMS)}).")

    def run(
        self,
        ranking: Ranking,
        first: Sequence[Individual],
        lost: Callable[[Sequence[Individual]], list[float]],
        progress: Progress,
        *,
        began: float | None = None,
        reserve: float = 0.0,
    ) -> tuple[tuple[Individual, ...], dict[str, Any]]:
        """The `BEST` of all individuals ever judged, and what the search says of itself.

        The identity is the youngest of the first generation, the given ones come before it; these are judged first, so that a search
        that is cut short has them. `began`: when the time that the search may take began, now without it; `reserve`: of the
        time, as many batches' worth are left over.
        """
        started = time.monotonic() if began is None else began
        rng = np.random.default_rng(self.seed)
        alive: deque[tuple[float, Individual]] = deque(maxlen=self.population)
        best: list[tuple[float, Individual]] = []
        curve: list[tuple[int, float]] = []
        done, judged = 0, 0.0
        for newborn in self._generations(ranking, first, alive, rng):
            spent = time.monotonic() - started
            if done and spent + (1 + reserve) * judged > self.seconds:
                break
            losses = lost(newborn)
            judged = max(judged, time.monotonic() - started - spent)
            for loss, individual in zip(losses, newborn, strict=True):
                done += 1
                if all(loss != other for other, _ in best):  # equal losses: the same plan
                    best = sorted([*best, (loss, individual)], key=lambda pair: pair[0])[:BEST]
                if best[0][0] < (curve[-1][1] if curve else math.inf):
                    curve.append((done, best[0][0]))
            join = alive.extendleft if done <= self.population else alive.extend  # the first generation: the youngest are judged first
            join(zip(losses, newborn, strict=True))
            progress("searching layer by layer", done, self.evaluations)
        seconds = time.monotonic() - started
        facts = {"evaluations": done, "seconds": round(seconds, 1), "per_second": round(done / seconds, 2), "best_so_far": curve}
        return tuple(individual for _, individual in best), facts | {"cut_short": done < self.evaluations}

    def _generations(
        self, ranking: Ranking, first: Sequence[Individual], alive: deque[tuple[float, Individual]], rng: np.random.Generator
    ) -> Iterator[list[Individual]]:
        """Individuals to judge, a batch at a time: the first generation, youngest first, then offspring of those alive by then."""
        size = min(self.population, self.evaluations)
        random = [self._random(ranking, rng) for _ in range(max(0, size - 1 - len(first)))]
        generation = [ranking.identity, *first, *random][:size]
        for begin in range(0, size, self.batch):
            yield generation[begin : begin + self.batch]
        for born in range(size, self.evaluations, self.batch):
            numbers = range(born, min(born + self.batch, self.evaluations))
            yield [self._mutated(self._parent(alive, rng), ranking, number, rng) for number in numbers]

    def _random(self, ranking: Ranking, rng: np.random.Generator) -> Individual:
        groups = len(ranking.importance)
        scale = np.exp(rng.normal(size=groups)) if self.form == "affine" else np.ones(groups)
        return Individual(scale, rng.normal(size=groups) * ranking.spread)

    def _parent(self, alive: deque[tuple[float, Individual]], rng: np.random.Generator) -> Individual:
        drawn = rng.integers(len(alive), size=self.samples)
        return min((alive[i] for i in drawn), key=lambda pair: pair[0])[1]

    def _mutated(self, parent: Individual, ranking: Ranking, number: int, rng: np.random.Generator) -> Individual:
        """A tenth of the groups, drawn with replacement; scales move less and less as the search goes on."""
        groups = len(ranking.importance)
        step = 1 - number / (1.25 * self.evaluations)
        scale, shift = parent.scale.copy(), parent.shift.copy()
        for g in rng.integers(groups, size=max(1, round(self.mutation * groups))):
            if self.form == "affine":
                scale[g] *= math.exp(rng.normal() * step)
            shift[g] += rng.normal() * ranking.spread[g]
        return Individual(scale, shift)


def _widths_of(name: str, search: Search) -> Widths:
    """The widths that another allocator, which needs no images, chooses."""
    module = find("allocate", name, "allocator")
    plan: Plan = module.allocate(
        search.graph, search.scores, search.budget, search.cost, None, rules=search.rules, normalise=search.normalise
    )
    return plan.widths(search.graph)
