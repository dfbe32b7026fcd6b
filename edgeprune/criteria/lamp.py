"""LAMP for channels: squared weight of a channel as a share of that of all channels of its layer that are no smaller.

Formula: s_c = n_c / sum of n_d over the channels d of the layer with n_d >= n_c, where n_c = sum W[c]²; then the mean over the layers
that produce the channel. Cost: one pass over the weights, no data.
Source: Lee, Park, Mo, Ahn, Shin, "Layer-Adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021. We differ in: the paper scores
single weights; here whole channels take their place. Within a layer the order is that of l2; what LAMP changes is the comparison of
layers: the last channel of every layer scores 1, so that no layer is emptied. Equal channels score the same (all of them are in each
other's sum), so that the order of the channels does not matter.
"""

from __future__ import annotations

import numpy as np

from edgeprune.criteria.probe import Floats, Probe
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Scores

NEEDS = ("weights",)
PAPER = "Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021 (per channel)"


def score(graph: ChannelGraph, probe: Probe) -> Scores:
    """Layer-adaptive magnitude in [0, 1], float64, higher = keep. Shapes: (channels,) per group."""
    values = {}
    for group in graph.groups:
        rows = [lamp(part.double().square().sum(dim=1).cpu().numpy()) for part in probe.slices(group)]
        values[group.name] = probe.reduced(rows)
    return Scores("lamp", values)


def lamp(squares: Floats) -> Floats:
    """Each value as a share of all that are not below it; (channels,) -> (channels,). A layer of zeros has zeros."""
    ascending = np.sort(squares)
    not_below = ascending[::-1].cumsum()[::-1][np.searchsorted(ascending, squares, side="left")]
    return squares / np.where(not_below > 0, not_below, 1.0)
