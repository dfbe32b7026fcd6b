"""Widths that keep the most importance under one or several costs, by integer programming.

Every group takes one of its allowed widths; its value is the logarithm of the share of importance it keeps, once for
every layer that writes the group, so that no group is starved. A cost that depends on two widths at once (a conv reads one group and writes
another) is linearised around the current choice, exactly for every change of a single group, and solved again until the choice
repeats; then the true costs are repaired, filled and improved by exchanging steps between pairs of groups. Networks with few choices
are searched whole.
Cost: a few integer programs of (groups * widths) variables with HiGHS. Source: the latency knapsack of Shen et al. (HALP),
NeurIPS 2022; we differ in: values are logarithmic, both widths of a conv count, any budgeted figure is a constraint.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array

from edgeprune.allocate.search import Floats, Search, Widths
from edgeprune.criteria.probe import Probe
from edgeprune.device.cost import CostModel
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.widths import DEFAULT_RULES, WidthRules

NEEDS = ()
PAPER = "after Shen et al., Structural Pruning via Latency-Saliency Knapsack, NeurIPS 2022"
GAPS = (1e-3,) * 3 + (1e-4,) * 3  # of the optimum, that the solver may leave in each round
OFFERED = 32  # levels of a group, up to which a program chooses among all
TRIED = 8192  # exchanges of two steps
EXHAUSTIVE = 20_000  # up to so many choices all are tried
NODES = 16  # of the solver's tree, for each program: a limit in seconds would let the machine's load choose the widths


def allocate(
    graph: ChannelGraph,
    scores: Scores,
    budget: Budget,
    cost: CostModel | None,
    probe: Probe | None,
    *,
    rules: WidthRules = DEFAULT_RULES,
    normalise: str = "auto",
    concave: bool | None = None,
) -> Plan:
    """The most valuable widths found that fit; concave (see Search) unless the scores are additive. Raises BudgetError with the floor."""
    concave = not scores.additive if concave is None else concave
    search = Search(graph, scores, budget, cost, rules=rules, normalise=normalise, concave=concave)
    search.check()
    return search.plan(search.from_levels(best_levels(search)))


def best_levels(search: Search) -> Widths:
    """The most valuable levels found that fit, by `search.values`, whatever these stand for; some levels must fit."""
    values = search.values
    if math.prod(len(v) for v in values) <= EXHAUSTIVE:
        return _all_choices(search, values)
    return _exchange(search, values, _rounds(search, values, search.fill(search.shrink(search.top, lambda saved: saved))))


def _all_choices(search: Search, values: tuple[Floats, ...]) -> Widths:
    """The best of all choices that fit, the cheapest by every figure among equals."""
    levels = np.stack([grid.reshape(-1) for grid in np.meshgrid(*(np.arange(len(v)) for v in values), indexing="ij")], axis=1)
    use = search.use(search.from_levels(levels))
    fitting = np.flatnonzero((use <= 1).all(axis=1))
    worth = sum((v[levels[fitting, g]] for g, v in enumerate(values)), np.zeros(len(fitting)))
    return np.asarray(levels[fitting[np.lexsort((use[fitting].sum(axis=1), -worth))[0]]])


def _rounds(search: Search, values: tuple[Floats, ...], start: Widths) -> Widths:
    """Solve, linearise there, solve again, until the choice repeats; the best fitting choice on the way."""
    best = levels = start
    seen = {tuple(start.tolist())}
    for gap in GAPS:
        levels = _solve(search, values, levels, gap)
        fitting = search.fill(search.shrink(levels, lambda saved: saved))
        best = max(best, fitting, key=lambda choice: _total(values, choice))
        if tuple(levels.tolist()) in seen:
            break
        seen.add(tuple(levels.tolist()))
    return best


def _total(values: tuple[Floats, ...], levels: Widths) -> float:
    return float(sum(v[level] for v, level in zip(values, levels, strict=True)))


def _solve(search: Search, values: tuple[Floats, ...], levels: Widths, gap: float) -> Widths:
    """The best levels under costs linearised around `levels`, to a share `gap` of their value."""
    offered = [_offered(int(level), len(v)) for level, v in zip(levels, values, strict=True)]
    sizes = [len(o) for o in offered]
    choices = np.repeat(levels[None], sum(sizes), axis=0)
    group = np.repeat(np.arange(len(sizes)), sizes)
    choices[np.arange(len(group)), group] = np.concatenate(offered)
    use = search.use(search.from_levels(np.concatenate([levels[None], choices])))
    change = (use[1:] - use[0]).T
    one_each = csr_array(block_diag([np.ones((1, n)) for n in sizes]))
    with _quiet_solver():
        result = milp(
            -np.concatenate([v[o] for v, o in zip(values, offered, strict=True)]),
            integrality=np.ones(len(group), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(change, -np.inf, 1 - use[0])],
            options={"node_limit": NODES, "mip_rel_gap": gap},
        )
    if result.x is None:
        return levels
    starts = np.cumsum([0, *sizes[:-1]])
    return np.array([o[int(np.argmax(result.x[s : s + len(o)]))] for s, o in zip(starts, offered, strict=True)])


def _offered(level: int, count: int) -> Widths:
    """The levels that a round may choose, ascending: all where they are few, else the denser the nearer to the present one."""
    if count <= OFFERED:
        return np.arange(count)
    near = [step for power in range(count.bit_length()) for step in (2**power, 3 * 2**power)]
    around = np.array([0, *near, *(-step for step in near)]) + level
    return np.unique(np.clip(around, 0, count - 1))


@contextmanager
def _quiet_solver() -> Iterator[None]:
    """HiGHS prints a debugging line from C at times, which would stand in the middle of --json: C's stdout goes nowhere meanwhile."""
    c = ctypes.CDLL(None)
    sys.stdout.flush()
    c.fflush(None)
    with open(os.devnull, "wb") as nowhere:
        kept = os.dup(1)
        try:
            os.dup2(nowhere.fileno(), 1)
            yield
        finally:
            c.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


def _exchange(search: Search, values: tuple[Floats, ...], levels: Widths) -> Widths:
    """Narrow one group and widen another, by 1, 2, 4 … levels each, while that raises the value and fits; then fill.

    At most `TRIED` exchanges are looked at each time: first those that fit where both steps cost what they cost alone.
    """
    while True:
        down, up = _steps(values, levels, -1), _steps(values, levels, 1)
        gain = up.change[None, :] + down.change[:, None]
        pairs = np.argwhere((gain > 1e-9) & (down.group[:, None] != up.group[None, :]))
        alone = [search.use(search.from_levels(_moved(levels, step))) for step in (down, up)]
        together = alone[0][pairs[:, 0]] + alone[1][pairs[:, 1]] - search.use(search.from_levels(levels))
        pairs = pairs[np.lexsort((-gain[tuple(pairs.T)], (together > 1).any(axis=1)))[:TRIED]]
        for start in range(0, len(pairs), 256):
            narrower, wider = pairs[start : start + 256].T
            moved = _moved(_moved(levels, down, narrower), up, wider)
            fits = np.flatnonzero(search.fits(search.from_levels(moved)))
            if len(fits):
                levels = search.fill(moved[fits[0]])
                break
        else:
            return levels


class _Steps(NamedTuple):
    """Moves of single groups: which, to what level, and by how much the value changes."""

    group: Widths
    level: Widths
    change: Floats


def _moved(levels: Widths, steps: _Steps, chosen: Widths | None = None) -> Widths:
    """Levels after each of the chosen steps (all without), (steps, groups); `levels` for all or one row for each."""
    numbers = np.arange(len(steps.group)) if chosen is None else chosen
    moved = np.array(np.broadcast_to(levels, (len(numbers), levels.shape[-1])))
    moved[np.arange(len(numbers)), steps.group[numbers]] = steps.level[numbers]
    return moved


def _steps(values: tuple[Floats, ...], levels: Widths, sign: int) -> _Steps:
    found = [
        (g, int(level), float(v[level] - v[levels[g]]))
        for g, v in enumerate(values)
        for power in range(len(v).bit_length())
        if 0 <= (level := levels[g] + sign * 2**power) < len(v)
    ]
    columns = np.array(found, dtype=np.float64).reshape(-1, 3).T
    return _Steps(columns[0].astype(np.int64), columns[1].astype(np.int64), columns[2])
