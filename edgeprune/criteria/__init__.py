"""Importance of channels: one file per criterion, this folder is the registry.

A criterion file has `NEEDS` (a tuple out of weights, maps, pooled, labels, gradients, loss), `PAPER` (one line) and
`score(graph, probe, **options) -> Scores`. Outsiders add criteria through the entry point group `edgeprune.criteria`
(a module with the same three names).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import DataError, UsageError
from edgeprune.plan import Scores
from edgeprune.registry import find

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph import ChannelGraph


def score(graph: ChannelGraph, model: nn.Module, criterion: str, *, data: Iterable[Any] | None = None, **options: Any) -> Scores:
    """Importance of every channel of every group, float64, higher = keep.

    `data`: an iterable of (inputs, labels) batches, or of inputs where the criterion needs no labels; see `edgeprune criteria`
    for what each needs. Raises UsageError for an unknown criterion or option, DataError where data are missing or give
    values that are not finite.
    """
    from edgeprune.criteria.probe import Probe

    module = find("criteria", criterion, "criterion")
    known = [p.name for p in inspect.signature(module.score).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(f"the criterion {criterion} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}.")
    if data is None and set(module.NEEDS) - {"weights"}:
        raise DataError(
            f"the criterion {criterion} looks at images: give data (--data), or choose one that reads weights only, such as l1."
        )
    scores: Scores = module.score(graph, Probe(model, graph, data), **options)
    for group in graph.groups:
        values = scores.values[group.name]
        if values.shape != (group.channels,) or not np.isfinite(values).all():
            raise DataError(
                f"the criterion {criterion} gave scores for {group.name} that are not finite: the network or the data hold NaN or Inf. "
                "Check the preprocessing (mean, std) and the weights."
            )
    return scores
