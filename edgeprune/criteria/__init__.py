"""Importance of channels: one file per criterion, this folder is the registry.

A criterion file has `NEEDS` (a tuple out of weights, maps, pooled, labels, gradients, loss), `PAPER` (one line) and
`score(graph, probe, **options) -> Scores`. One that reads data in a single pass also has `statistic(graph, probe, **options)`, so
that several criteria share one run of the network. Outsiders add criteria through the entry point group `edgeprune.criteria`
(a module with the same names).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import DataError, UsageError
from edgeprune.plan import Scores
from edgeprune.registry import find

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph import ChannelGraph

Floats = NDArray[np.float64]
NORMALISERS: dict[str, Callable[[Floats], Floats]] = {
    "none": lambda s: s,
    "sum": lambda s: s / max(np.abs(s).sum(), 1e-300),
    "mean": lambda s: s / max(np.abs(s).mean(), 1e-300),
    "max": lambda s: s / max(np.abs(s).max(), 1e-300),
    "zscore": lambda s: (s - s.mean()) / max(s.std(), 1e-300),
    "rank": lambda s: (np.argsort(np.argsort(s, kind="stable"), kind="stable") + 1.0) / len(s),
}


def score(
    graph: ChannelGraph,
    model: nn.Module,
    criterion: str,
    *,
    data: Iterable[Any] | None = None,
    reduce: str = "mean",
    normalise: str = "none",
    **options: Any,
) -> Scores:
    """Importance of every channel of every group, float64, higher = keep.

    `data`: an iterable of (inputs, labels) batches, or of inputs where the criterion needs no labels; see `edgeprune criteria`
    for what each needs. `reduce` (mean, sum, max, first, backward): how the layers that share a group make one score; backward
    takes the last of them, after the residual sum. `normalise` (none, sum, mean, max, zscore, rank): what makes groups comparable.
    Raises UsageError for an unknown criterion or option, DataError where data are missing or give values that are not finite.
    """
    return score_all(graph, model, {criterion: options}, data=data, reduce=reduce, normalise=normalise)[criterion]


def score_all(
    graph: ChannelGraph,
    model: nn.Module,
    criteria: Mapping[str, Mapping[str, Any]],
    *,
    data: Iterable[Any] | None = None,
    reduce: str = "mean",
    normalise: str = "none",
) -> dict[str, Scores]:
    """The scores of several criteria, {name: options}, from one run of the network where each reads the data in a single pass.

    Criteria that run the network in their own way read `data` again: give a list, not a generator, when more than one is asked.
    """
    from edgeprune.criteria.probe import Probe

    if normalise not in NORMALISERS:
        raise UsageError(f"normalise must be one of {', '.join(NORMALISERS)}, got {normalise!r}.")
    probe = Probe(model, graph, data, reduce=reduce)
    modules = {name: _ready(name, options, data) for name, options in criteria.items()}
    for name in {m.parameter: None for g in graph.groups for m in g.members}:
        if not bool(probe.tensors[name].isfinite().all()):
            raise DataError(f"the weights cannot be scored: {name} holds NaN or Inf. Load a sound checkpoint.")
    streaming = {name: module.statistic(graph, probe, **criteria[name]) for name, module in modules.items() if hasattr(module, "statistic")}
    raw: dict[str, Scores] = dict(zip(streaming, probe.gather(*streaming.values()), strict=True)) if streaming else {}
    raw |= {name: module.score(graph, probe, **criteria[name]) for name, module in modules.items() if name not in streaming}
    return {name: _checked(graph, raw[name], normalise) for name in criteria}


def _ready(name: str, options: Mapping[str, Any], data: Iterable[Any] | None) -> ModuleType:
    module = find("criteria", name, "criterion")
    takes = inspect.signature(getattr(module, "statistic", module.score)).parameters.values()
    known = [p.name for p in takes if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(f"the criterion {name} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}.")
    if data is None and set(module.NEEDS) - {"weights"}:
        raise DataError(f"the criterion {name} looks at images: give data (--data), or choose one that reads weights only, such as l1.")
    return module


def _checked(graph: ChannelGraph, scores: Scores, normalise: str) -> Scores:
    values = {}
    for group in graph.groups:
        found = scores.values[group.name]
        if found.shape != (group.channels,) or not np.isfinite(found).all():
            raise DataError(
                f"the criterion {scores.criterion} gave scores for {group.name} that are not finite: the network or the data hold NaN or "
                "Inf. Check the preprocessing (mean, std) and the weights."
            )
        values[group.name] = NORMALISERS[normalise](found)
    return replace(scores, values=values, additive=scores.additive and normalise == "none")
