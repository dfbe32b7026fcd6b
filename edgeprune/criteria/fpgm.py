"""Distance to the geometric median: filters that the others can stand in for go first, large or small.

Formula: s_c = sum over the filters d of the same layer of the Euclidean distance between W[c] and W[d]; the filter with the smallest
sum is the one nearest to the layer's geometric median. Cost: channels² * values per layer, no data.
Source: He, Liu, Wang, Hu, Yang, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", CVPR 2019.
We differ in: layers that a residual connection ties are scored together. A filter of zeros is no special case here: it scores low
only where the others surround it. Of two filters neither is nearer to the middle: both score the same.
"""

from __future__ import annotations

import torch

from edgeprune.criteria.probe import Probe
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Scores

NEEDS = ("weights",)
PAPER = "He et al., Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration, CVPR 2019"


def score(graph: ChannelGraph, probe: Probe) -> Scores:
    """Sum of the distances to all other filters of the layer, float64, higher = keep. Shapes: (channels,) per group."""
    values = {}
    for group in graph.groups:
        distances = [torch.cdist(part.double(), part.double()).sum(dim=1).cpu().numpy() for part in probe.slices(group)]
        values[group.name] = probe.reduced(distances)
    return Scores("fpgm", values)
