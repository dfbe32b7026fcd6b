"""The plain values that travel between the stages: Budget, Scores, Plan. No torch here.

Invariants: a Plan keeps channels in ascending order, none of a group only where a whole residual branch goes (graph/branches.py);
Scores are finite, one float64 per channel, higher = keep; a Budget holds at least one positive limit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import UsageError

if TYPE_CHECKING:
    from edgeprune.graph import ChannelGraph


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the small network may cost; every limit that is set must hold.

    latency_ms, energy_mj: one inference, batch 1. macs, params: a count, or a fraction of the dense network (0 < x <= 1).
    size_bytes: the artifact. peak_memory_bytes: what the process has in an inference beyond the imported runtime.
    Raises UsageError for a limit that is not a positive finite number, or when none is set.
    """

    latency_ms: float | None = None
    energy_mj: float | None = None
    macs: float | None = None
    params: float | None = None
    size_bytes: float | None = None
    peak_memory_bytes: float | None = None

    def __post_init__(self) -> None:
        limits = self.limits()
        if not limits:
            raise UsageError("no budget given: set at least one of latency_ms, energy_mj, macs, params, size_bytes, peak_memory_bytes.")
        for name, value in limits.items():
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"the budget {name} must be a positive number, got {value!r}.")

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {f.name: float(value) for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @property
    def label(self) -> str:
        """The limits in a form that names a folder: macs-0.5, latency_ms-30+params-0.4."""
        return "+".join(f"{name}-{value:g}" for name, value in self.limits().items())

    def absolute(self, dense: Mapping[str, float]) -> dict[str, float]:
        """The limits as absolute figures: fractions of MACs and params become counts of the dense network's."""
        relative = ("macs", "params")
        return {n: v * dense[n] if n in relative and v <= 1 else v for n, v in self.limits().items()}


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance of every channel: `values[group.name]` is float64 (channels,), finite, higher = keep.

    `additive`: the scores of all groups are in one unit (a loss), so they may be compared and added as they are.
    """

    criterion: str
    values: Mapping[str, NDArray[np.float64]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    additive: bool = False


@dataclass(frozen=True)
class Plan:
    """Which channels stay: `keep[group.name]` holds ascending channel numbers; a group that is not named stays whole.

    None at all, of a group in `graph.branches`: its residual branch vanishes.
    """

    keep: Mapping[str, tuple[int, ...]]

    @staticmethod
    def uniform(graph: ChannelGraph, keep: float = 0.5, scores: Scores | None = None, round_to: int = 1) -> Plan:
        """The same share of every group: the best-scored channels, or the first ones without scores.

        `keep` is a fraction (0 < keep <= 1); widths are rounded to the nearest multiple of `round_to`, at least 1.
        """
        if not 0 < keep <= 1:
            raise UsageError(f"keep must be a fraction in (0, 1], got {keep!r}.")
        widths = {}
        for group in graph.groups:
            allowed = np.array(group.widths(round_to))
            widths[group.name] = int(allowed[np.argmin(np.abs(allowed - keep * group.channels))])
        return Plan.from_widths(graph, widths, scores)

    @staticmethod
    def from_widths(graph: ChannelGraph, widths: Mapping[str, int], scores: Scores | None = None) -> Plan:
        """Keep the `widths[group.name]` best channels of each group (ties: the lower number stays)."""
        keep = {}
        for group in graph.groups:
            order = np.arange(group.channels)
            if scores is not None:
                order = np.argsort(-scores.values[group.name], kind="stable")
            keep[group.name] = tuple(sorted(int(c) for c in order[: widths[group.name]]))
        return Plan(keep)

    @property
    def empty(self) -> tuple[str, ...]:
        """The groups of which nothing stays."""
        return tuple(name for name, channels in self.keep.items() if not len(channels))

    def widths(self, graph: ChannelGraph) -> NDArray[np.int64]:
        """How many channels stay of every group, in the order of graph.groups, (groups,)."""
        return np.array([len(self.keep.get(g.name, range(g.channels))) for g in graph.groups], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for plan.json."""
        return {"keep": {name: list(channels) for name, channels in self.keep.items()}}

    @staticmethod
    def from_json(text: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        return Plan({str(name): tuple(int(c) for c in channels) for name, channels in text["keep"].items()})

    @property
    def sha256(self) -> str:
        """Hash of the plan, the same for equal plans; written into artifacts."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
