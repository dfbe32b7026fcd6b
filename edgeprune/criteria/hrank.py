"""Mean rank of each channel's feature maps, no labels needed.

Formula: s_c = mean over images of rank(map of channel c, (h, w)), taken where the next conv, linear or pooling reads it. A singular value
counts where it exceeds `tolerance` times the largest of its map; 0 (the default) takes max(h, w) times the rounding of float32,
whatever the maps' own type. Vectors (h = w = 1) have the share of images on which they are not 0. A channel read in several places has the
mean of its ranks, each divided by its layer's mean. A dead channel has 0.
Cost: as nuclear_norm, whose limits on the work are the same: every k-th image where eigenvalues would cost more than the forward pass
(`every`), maps averaged to a shorter side of `max_side`.
Source: Lin, Ji, Wang, Zhang, Zhang, Tian, Shao, "HRank: Filter Pruning using High-Rank Feature Map", CVPR 2020.
We differ in: channels that a residual sum ties have one score; eigenvalues of the Gram matrix in float64 stand for singular values, which
is exact above a tolerance of 1e-7; the paper's code takes 500 or 640 images, we all that are given within the limits above.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgeprune.criteria.nuclear_norm import MapMeans, checked_work, of_singular_values
from edgeprune.criteria.probe import Probe, Statistic
from edgeprune.errors import UsageError
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Scores

NEEDS = ("maps",)
PAPER = "Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020"


def score(graph: ChannelGraph, probe: Probe, **options: Any) -> Scores:
    """Mean rank of each channel's maps, float64, higher = keep. Shapes: maps (n, c, h, w) -> (c,)."""
    return probe.gather(statistic(graph, probe, **options))[0]


def statistic(graph: ChannelGraph, probe: Probe, *, tolerance: float = 0.0, every: int = 0, max_side: int = 56) -> Statistic:
    """The running sums of the ranks. Raises UsageError for a tolerance outside 1e-7 to 1."""
    checked_work(every, max_side)
    if tolerance and not 1e-7 <= tolerance < 1:
        raise UsageError(f"tolerance must lie in [1e-7, 1), or be 0 for the rounding of float32, got {tolerance!r}.")
    return MapMeans(graph, probe, "hrank", lambda maps: ranks(maps, tolerance), every=every, max_side=max_side)


def ranks(maps: Tensor, tolerance: float = 0.0) -> Tensor:
    """The rank of every map, float64: (n, c, h, w) -> (n, c)."""
    least = tolerance or max(maps.shape[2:]) * torch.finfo(torch.float32).eps

    def count(values: Tensor) -> Tensor:
        largest = values.amax(dim=1, keepdim=True)
        return ((values > least * largest) & (largest > 0)).sum(dim=1).double()

    return of_singular_values(maps, count)
