"""Which plan a run takes: by prediction, or with a board attached by its measurements; for one budget or for several from one search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import Tensor, nn

from edgeprune.allocate import Planner, options_of
from edgeprune.allocate.search import Search
from edgeprune.data import Augment, Split
from edgeprune.device.cost import Cost, CostModel, predict_graph
from edgeprune.device.kernels import kernels
from edgeprune.device.measure import MEASURED, Figure
from edgeprune.errors import BudgetError, DeviceError
from edgeprune.graph.slim import slim
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.quantize.size import float32_limit, quantized_size

if TYPE_CHECKING:
    from edgeprune.pipeline import Pipeline

T = TypeVar("T")

ROUNDS = 5
MEMORY_NOISE = 0.005  # by which the same network's memory differs from one measurement to the next
HEADROOM = 0.97  # of the asked latency and energy: what a measurement a few minutes later must still meet
CLOSE_ENOUGH = 0.93  # of what is asked: a plan that uses this much of it is not worth another round
_OPTIONS = {"latency_ms": ("--latency-ms", 1.0, "ms"), "energy_mj": ("--energy-mj", 1.0, "mJ")}
_OPTIONS |= {"peak_memory_bytes": ("--peak-memory-mb", 1e-6, "MB")}


@dataclass(frozen=True)
class Reading:
    """Another figure of the budget in a round, by the budget's name for it; `high`: the upper end of what was measured."""

    name: str
    predicted: float
    measured: float
    high: float


@dataclass(frozen=True)
class Round:
    """One turn of the closed loop: what was predicted, what the board said, and the factor for the next prediction."""

    round: int
    predicted_ms: float
    measured_ms: float
    low_ms: float
    high_ms: float
    correction: float
    others: tuple[Reading, ...] = ()


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
        rounds = (Round(**r | {"others": tuple(Reading(**o) for o in r["others"])}) for r in facts["rounds"])
        return Choice(Plan.from_json(plan), facts["correction"], tuple(rounds), facts["search"])


@dataclass(frozen=True)
class Correction:
    """What measurements say about predictions: milliseconds and millijoules per predicted millisecond, and the way memory goes.

    Energy is taken to follow latency, which needs no power figures of the card. Of memory a large part is the runtime's own, and the rest
    is held more than once, so its line goes through a measured point with the slope that the points have shown (1 before the second).
    """

    ms: float
    mj: float
    predicted_bytes: int
    measured_bytes: float
    slope: float

    @staticmethod
    def of(raw: Cost, found: Mapping[str, float], dense: Correction | None = None) -> Correction:
        """From one network, its uncorrected prediction and what was measured by the budget's names, and what the dense one has shown."""
        scale, at, measured, slope = raw.latency_ms.value * HEADROOM, raw.peak_memory_bytes, found.get("peak_memory_bytes", 0.0), 1.0
        if dense and at < dense.predicted_bytes:
            slope = min(max((dense.measured_bytes - measured) / (dense.predicted_bytes - at), 0.5), 4.0)
        return Correction(found["latency_ms"] / scale, found.get("energy_mj", 0.0) / scale, at, measured, slope)

    def asked(self, budget: Budget) -> Budget:
        """The budget in terms of what is predicted: energy as a limit of latency, memory as what this line reaches it at."""
        ms = [budget.latency_ms] if budget.latency_ms is not None else []
        if budget.energy_mj is not None:
            ms.append(budget.energy_mj * self.ms / max(self.mj, 1e-6 * self.ms))  # a net energy can be measured as 0 or less
        memory = budget.peak_memory_bytes
        left = memory and max(1.0, self.predicted_bytes + (memory - (1 + MEMORY_NOISE) * self.measured_bytes) / self.slope)
        return replace(budget, latency_ms=min(ms, default=None), energy_mj=None, peak_memory_bytes=left)

    def used(self, name: str, high: float, limit: float) -> float:
        """What a measured figure takes of its limit; of memory, the part beyond what no width changes."""
        fixed = self.measured_bytes - self.slope * self.predicted_bytes if name == "peak_memory_bytes" else 0.0
        return (high - fixed) / max(limit - fixed, 1e-9)

    def readings(self, raw: Cost, found: Mapping[str, Figure]) -> tuple[Reading, ...]:
        """What was predicted by this correction beside what was measured, of all but latency."""
        memory = self.measured_bytes + self.slope * (raw.peak_memory_bytes - self.predicted_bytes)
        predicted = {"energy_mj": self.mj * raw.latency_ms.value * HEADROOM, "peak_memory_bytes": memory}
        return tuple(Reading(name, predicted[name], got.value, got.high) for name, got in found.items() if name in predicted)


class Chooser:
    """Chooses plans for the job of a pipeline; what the allocator learns, it learns once."""

    def __init__(self, stages: Pipeline, scores: Scores) -> None:
        job = stages.job
        known = {"progress": stages.progress, "seed": job.seed, "recover": job.recover}
        self._stages = stages
        self._planner = Planner(
            stages.graph,
            scores,
            method=job.allocator,
            model=job.model,
            data=Images(stages.held_split, stages.train_split, job.seed, stages.augment) if stages.train_split else None,
            rules=job.rules,
            **{name: value for name, value in known.items() if name in options_of(job.allocator)},
            **job.search,
        )

    def choose(self, budget: Budget) -> Choice:
        """The plan at one budget; a size is that of the file as delivered. Raises BudgetError when none meets it."""
        return _at_float32(self._stages, budget, self._choose)

    def _choose(self, budget: Budget) -> Choice:
        device = self._stages.job.device
        if device.attached and budget.limits().keys() & MEASURED:
            return self._closed_loop(budget)
        return Choice(self._planner.plan(budget, CostModel(device)), 1.0, (), self._planner.facts)

    def choose_all(self, budgets: Sequence[Budget]) -> tuple[Choice, ...]:
        """One plan per budget, in their order; the hardest is searched for first."""
        device = self._stages.job.device
        if device.attached:  # what predictions hold impossible may be measured
            order = tuple(sorted(range(len(budgets)), key=lambda number: tuple(budgets[number].limits().values())))
        else:
            order = self._planner.hardest_first(budgets, CostModel(device))
        found = {number: self.choose(budgets[number]) for number in order}
        return tuple(found[number] for number in range(len(budgets)))

    def _closed_loop(self, budget: Budget) -> Choice:
        """Export, measure, correct the prediction, allocate again, until all that the board measures fits and the budget is used."""
        stages, asked = self._stages, {name: limit for name, limit in budget.limits().items() if name in MEASURED}
        graph, device = stages.graph, stages.job.device
        found = self._measured("dense", stages.job.model, asked)
        known = dense = Correction.of(predict_graph(graph, None, device), {name: figure.value for name, figure in found.items()})
        rounds: list[Round] = []
        best: tuple[float, Plan, float] | None = None
        floor: Plan | None = None
        for number in range(1, ROUNDS + 1):
            try:
                plan = self._planner.plan(known.asked(budget), CostModel(device, known.ms))
            except BudgetError as error:  # so says the prediction, perhaps corrected by one slow measurement
                again = floor is not None and error.plan == floor
                if best is not None or (again and asked.keys() != {"latency_ms"}):
                    break  # what was measured says more
                if error.plan is None or again:
                    raise
                plan = floor = error.plan  # the board has the last word
            if best and plan == best[1]:
                break
            raw = predict_graph(graph, plan.widths(graph), device)
            got = self._measured("candidate", slim(stages.job.model, graph, plan), asked)
            rounds.append(_round(number, raw, got, known))
            stages.progress("measuring candidates", number, ROUNDS)
            stages.run.log(f"round {number}: {_worded(got)}")
            known = Correction.of(raw, {name: figure.high for name, figure in got.items()}, dense)
            used = max(known.used(name, got[name].high, limit) for name, limit in asked.items())
            if used <= 1 and (best is None or used > best[0]):
                best = (used, plan, got["latency_ms"].value / raw.latency_ms.value)
            whole = all(len(keep) == g.channels for g, keep in zip(graph.groups, plan.keep.values(), strict=True))
            if best and (best[0] >= CLOSE_ENOUGH or whole):
                break
        if best is None:
            raise _missed(asked, rounds, device.profile)
        return Choice(best[1], best[2], tuple(rounds), self._planner.facts)

    def _measured(self, name: str, model: nn.Module, asked: Mapping[str, float]) -> dict[str, Figure]:
        """Latency and what else is asked for, as the board measures it."""
        found = self._stages.measured(name, model, quick=True, energy="energy_mj" in asked)
        figures = {which: found.figure(which) for which in dict.fromkeys(("latency_ms", *asked))}
        missing = [which for which, figure in figures.items() if figure is None]
        if missing:
            raise DeviceError(
                f"{' and '.join(missing)} could not be measured on {found.fingerprint.get('where', 'the board')}: leave that limit away."
            )
        return {which: figure for which, figure in figures.items() if figure is not None}


def must_be_reachable(stages: Pipeline, budget: Budget) -> None:
    """Raise BudgetError before anything is paid for where no widths meet the budget; a board that is attached has the last word itself."""
    job = stages.job
    if job.device.attached and budget.limits().keys() & MEASURED:
        return
    alike = Scores("none", {g.name: np.ones(g.channels) for g in stages.graph.groups})
    cost = CostModel(job.device)
    _at_float32(stages, budget, lambda floats: Search(stages.graph, alike, floats, cost, rules=job.rules).check())


def _at_float32(stages: Pipeline, budget: Budget, use: Callable[[Budget], T]) -> T:
    """What comes of the budget with the size that the file has before it is quantized; a BudgetError speaks of the quantized file."""
    way, asked, graph = stages.job.quantize, budget.size_bytes, stages.graph
    if asked is None or way == "none":
        return use(budget)
    try:
        return use(replace(budget, size_bytes=float32_limit(asked, way, graph)))
    except BudgetError as error:
        if error.plan is None:
            raise
        least = quantized_size(float(kernels(graph).size_bytes(error.plan.widths(graph)[None])[0]), way, graph)
        if least <= asked:  # another limit
            raise
        told = (
            f"no plan reaches {asked / 1e6:.4g} MB in {way}: the floor is {least / 1e6:.4g} MB, with every layer at its narrowest. Ask for "
            f"at least --size-mb {1.02 * least / 1e6:.4g}, or allow narrower layers (--round-to 1), or use a smaller input."
        )
        raise BudgetError(told, error.plan) from error


def _round(number: int, raw: Cost, got: Mapping[str, Figure], known: Correction) -> Round:
    factor = known.ms * HEADROOM
    latency = got["latency_ms"]
    predicted_ms = raw.latency_ms.value * factor
    return Round(number, predicted_ms, latency.value, latency.low, latency.high, factor, known.readings(raw, got))


def _missed(asked: Mapping[str, float], rounds: Sequence[Round], profile: str) -> BudgetError:
    """That no candidate was measured inside the budget, what the nearest one came to, and what to ask for instead."""

    def highs(one: Round) -> dict[str, float]:
        return {"latency_ms": one.high_ms, **{reading.name: reading.high for reading in one.others}}

    nearest = min((highs(r) for r in rounds), key=lambda high: max(high[name] / limit for name, limit in asked.items()))
    found, wishes = [], []
    for name, limit in asked.items():
        option, scale, unit = _OPTIONS[name]
        found.append(f"{nearest[name] * scale:.4g} {unit} where {limit * scale:g} {unit} was asked")
        wishes += [f"{option} {nearest[name] * scale * 1.05:.3g}"] if nearest[name] > limit else []
    return BudgetError(
        f"no plan was measured inside the budget on {profile} in {len(rounds)} rounds: by the upper end of what was measured, the nearest "
        f"took {' and '.join(found)}. The machine may be busy; try again, or ask for {' '.join(wishes)}."
    )


def _worded(found: Mapping[str, Figure]) -> str:
    return ", ".join(f"{got.value * _OPTIONS[name][1]:.4g} {_OPTIONS[name][2]} measured" for name, got in found.items())


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled batches that can be read again: those held out from training first, then training images in a fixed random order.

    Augmented: candidates are told apart better by images that the dense network has not seen as they are.
    """

    held: Split | None
    train: Split
    seed: int
    augment: Augment

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.held is not None:
            yield from self.held.batches(64, augment=self.augment)
        yield from self.train.batches(64, shuffle_seed=self.seed, augment=self.augment)
