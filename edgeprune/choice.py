"""Which plan a run takes: by prediction, or with a board attached by its measurements; for one budget or for several from one search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.allocate import Planner, options_of
from edgeprune.data import Split
from edgeprune.device.cost import CostModel, predict_graph
from edgeprune.errors import BudgetError
from edgeprune.graph import ChannelGraph
from edgeprune.graph.slim import slim
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.quantize.size import float32_limit

if TYPE_CHECKING:
    from edgeprune.pipeline import Pipeline

ROUNDS = 5
HEADROOM = 0.97  # of the asked latency: what a measurement a few minutes later must still meet
CLOSE_ENOUGH = 0.93  # of the asked latency: a plan that uses this much of it is not worth another round


@dataclass(frozen=True)
class Round:
    """One turn of the closed loop: what was predicted, what the board said, and the factor for the next prediction."""

    round: int
    predicted_ms: float
    measured_ms: float
    low_ms: float
    high_ms: float
    correction: float


@dataclass(frozen=True, eq=False)
class Choice:
    """The plan, the correction it was predicted with, and how the loop came to it (empty without a board)."""

    plan: Plan
    correction: float
    rounds: tuple[Round, ...]
    search: Mapping[str, Any] = field(default_factory=dict)  # what the allocator says of its search

    def facts(self) -> dict[str, Any]:
        """All but the plan, as plain values."""
        return {"correction": self.correction, "rounds": [asdict(r) for r in self.rounds], "search": dict(self.search)}

    @staticmethod
    def of(facts: Mapping[str, Any], plan: Mapping[str, Any]) -> Choice:
        """The inverse of `facts`, and of the plan's `to_json`."""
        return Choice(Plan.from_json(plan), facts["correction"], tuple(Round(**r) for r in facts["rounds"]), facts["search"])


class Chooser:
    """Chooses plans for the job of a pipeline; what the allocator learns, it learns once."""

    def __init__(self, stages: Pipeline, scores: Scores) -> None:
        job = stages.job
        known = {"progress": stages.progress, "seed": job.seed}
        self._stages = stages
        self._planner = Planner(
            stages.graph,
            scores,
            method=job.allocator,
            model=job.model,
            data=Images(stages.held_split, stages.train_split, job.seed) if stages.train_split else None,
            rules=job.rules,
            **{name: value for name, value in known.items() if name in options_of(job.allocator)},
            **job.search,
        )

    def choose(self, budget: Budget) -> Choice:
        """The plan at one budget; a size is that of the file as delivered. Raises BudgetError when none meets it."""
        way, asked = self._stages.job.quantize, budget.size_bytes
        if asked is None or way == "none":
            return self._choose(budget)
        floats = float32_limit(asked, way, self._stages.graph)
        try:
            return self._choose(replace(budget, size_bytes=floats))
        except BudgetError as error:
            told = f"{error} Bytes here are those of the float32 file: {floats:,.0f} of them become {asked:,.0f} in {way}."
            raise BudgetError(told, error.plan) from error

    def _choose(self, budget: Budget) -> Choice:
        device = self._stages.job.device
        if device.attached and budget.latency_ms is not None:
            return self._closed_loop(budget, budget.latency_ms)
        return Choice(self._planner.plan(budget, CostModel(device)), 1.0, (), self._planner.facts)

    def choose_all(self, budgets: Sequence[Budget]) -> tuple[Choice, ...]:
        """One plan per budget, in their order; the hardest is searched for first."""
        order = self._planner.hardest_first(budgets, CostModel(self._stages.job.device))
        found = {number: self.choose(budgets[number]) for number in order}
        return tuple(found[number] for number in range(len(budgets)))

    def _closed_loop(self, budget: Budget, asked_ms: float) -> Choice:
        """Export, measure, correct the prediction, allocate again, until the measured latency fits and the budget is used."""
        stages = self._stages
        graph, device = stages.graph, stages.job.device
        dense = stages.measured("dense", stages.job.model, quick=True)
        correction = dense.latency_ms / predict_graph(graph, None, device).latency_ms.value / HEADROOM
        rounds: list[Round] = []
        best: tuple[float, Plan, float] | None = None
        floor: Plan | None = None
        for number in range(1, ROUNDS + 1):
            try:
                plan = self._planner.plan(budget, CostModel(device, correction))
            except BudgetError as error:  # so says the prediction, perhaps corrected by one slow measurement
                if best is not None:
                    break
                if error.plan is None or error.plan == floor:
                    raise
                plan = floor = error.plan  # the board has the last word
            raw = predict_graph(graph, widths(graph, plan), device).latency_ms.value
            got = stages.measured("candidate", slim(stages.job.model, graph, plan), quick=True)
            rounds.append(Round(number, raw * correction * HEADROOM, got.latency_ms, got.low_ms, got.high_ms, correction * HEADROOM))
            stages.progress("measuring candidates", number, ROUNDS)
            stages.run.log(f"round {number}: predicted {raw * correction * HEADROOM:.3f} ms, measured {got.latency_ms:.3f} ms")
            if got.high_ms <= asked_ms and (best is None or got.high_ms > best[0]):
                best = (got.high_ms, plan, got.latency_ms / raw)
            whole = all(len(keep) == g.channels for g, keep in zip(graph.groups, plan.keep.values(), strict=True))
            if best and (best[0] >= CLOSE_ENOUGH * asked_ms or whole):
                break
            correction = got.high_ms / raw / HEADROOM
        if best is None:
            fastest = min(rounds, key=lambda r: r.high_ms)
            raise BudgetError(
                f"no plan was measured at {asked_ms:g} ms or less on {device.profile} in {ROUNDS} rounds: the fastest took "
                f"{fastest.measured_ms:.3f} ms (up to {fastest.high_ms:.3f} ms). The machine may be busy; try again, or ask for "
                f"--latency-ms {fastest.high_ms * 1.05:.3g}."
            )
        return Choice(best[1], best[2], tuple(rounds), self._planner.facts)


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled batches that can be read again: those held out from training first, then training images in a fixed random order."""

    held: Split | None
    train: Split
    seed: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.held is not None:
            yield from self.held.batches(64)
        yield from self.train.batches(64, shuffle_seed=self.seed)


def widths(graph: ChannelGraph, plan: Plan) -> NDArray[np.int64]:
    """The widths of a plan in the order of graph.groups, (groups,)."""
    return np.array([len(plan.keep.get(g.name, range(g.channels))) for g in graph.groups])
