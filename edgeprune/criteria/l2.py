"""L2 norm of the weights that produce a channel.

Formula: s_c = mean over the convs and linears that produce channel c of sqrt(sum W[c]²). Cost: one pass over the weights, no data.
Source: the other common magnitude; both norms are compared in Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient
ConvNets", ICLR 2017. We differ in: channels that a residual connection ties are scored together, over all layers that write to them.
"""

from __future__ import annotations

from edgeprune.criteria.probe import Probe
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Scores

NEEDS = ("weights",)
PAPER = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (its comparison of norms)"


def score(graph: ChannelGraph, probe: Probe) -> Scores:
    """Euclidean length of each channel's filters, float64, higher = keep. Shapes: (channels,) per group."""
    values = {}
    for group in graph.groups:
        norms = [part.double().norm(dim=1).cpu().numpy() for part in probe.slices(group)]
        values[group.name] = probe.reduced(norms)
    return Scores("l2", values)
