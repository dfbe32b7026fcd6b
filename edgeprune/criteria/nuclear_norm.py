"""Nuclear norm (energy) of each channel's feature maps, no labels needed.

Formula: s_c = mean over images of the sum of the singular values of the (h, w) map of channel c, taken where the next conv, linear
or pooling reads it; a channel read in several places has the mean of their energies, each divided by its layer's mean.
Cost: O(images * channels * h * w * min(h, w)) after one forward pass.
Source: Yeom, Shim, Hwang, "Toward Compact Deep Neural Networks via Energy-Aware Pruning", arXiv 2103.10858 (2021).
We differ in: the paper's text says nuclear norm of feature maps; that the matrix is each image's own (h, w) map, averaged over
images, is our reconstruction, after its predecessor HRank. Vectors (h = w = 1) reduce to mean |a|.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune.criteria.probe import Probe, Statistic, View
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Scores

NEEDS = ("maps",)
PAPER = "Yeom et al., Toward Compact Deep Neural Networks via Energy-Aware Pruning, arXiv 2103.10858 (reconstructed from its abstract)"
CHUNK_BYTES = 64 << 20


def score(graph: ChannelGraph, probe: Probe, **options: Any) -> Scores:
    """Energy of each channel, dimensionless, float64, higher = keep. Shapes: maps (n, c, h, w) -> (c,)."""
    return probe.gather(statistic(graph, probe, **options))[0]


def statistic(graph: ChannelGraph, probe: Probe) -> Statistic:
    """The running sums of the energies."""
    return _Energy(graph, probe)


class _Energy(Statistic):
    def __init__(self, graph: ChannelGraph, probe: Probe) -> None:
        self._graph = graph
        self._probe = probe
        self._sums: dict[str, dict[int, Tensor]] = {g.name: {} for g in graph.groups}

    def update(self, view: View) -> None:
        """Add the energies of one batch."""
        sums = self._sums[view.group.name]
        energy = nuclear_norms(view.maps).sum(dim=0)
        sums[view.tap] = sums[view.tap] + energy if view.tap in sums else energy

    def scores(self, images: int) -> Scores:
        """Mean energy of each channel; a group that no layer reads is worth the same everywhere."""
        values = {}
        for group in self._graph.groups:
            rows = [(total / images).cpu().numpy() for total in self._sums[group.name].values()]
            values[group.name] = self._probe.reduced(rows, balance=True) if rows else np.ones(group.channels)
        return Scores("nuclear_norm", values, {"images": images})


def nuclear_norms(maps: Tensor) -> Tensor:
    """Sum of singular values of every map, float64: (n, c, h, w) -> (n, c).

    By the eigenvalues of the Gram matrix of the shorter side, in float64 because squaring loses half of the digits; in chunks
    that bound memory.
    """
    n, c, h, w = maps.shape
    flat = maps.reshape(n * c, h, w)
    if h > w:
        flat = flat.transpose(1, 2)
    if flat.shape[1] == 1:
        rows: Tensor = torch.linalg.vector_norm(flat.double(), dim=2)
        return rows.reshape(n, c)
    step = max(1, CHUNK_BYTES // (8 * h * w))
    parts = []
    for chunk in flat.split(step):
        x = chunk.double()
        parts.append(torch.linalg.eigvalsh(x @ x.transpose(1, 2)).clamp(min=0).sqrt().sum(dim=1))
    return torch.cat(parts).reshape(n, c)
