"""A random order of the channels: what every criterion must beat.

Formula: s_c drawn evenly from [0, 1), from `seed`, group after group in the network's order. Looks at nothing, so that it says what
the widths alone are worth. Source: the control that Mittal, Bhardwaj, Khapra, Ravindran, "Recovering from Random Pruning: On the
Plasticity of Deep Convolutional Neural Networks", WACV 2018 shows to be hard to beat after fine-tuning.
"""

from __future__ import annotations

import numpy as np

from edgeprune.criteria.probe import Probe
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Scores

NEEDS = ()
PAPER = "the control; Mittal et al., Recovering from Random Pruning, WACV 2018"


def score(graph: ChannelGraph, probe: Probe, *, seed: int = 0) -> Scores:
    """Random numbers in [0, 1), the same for the same seed and network, float64. Shapes: (channels,) per group."""
    generator = np.random.default_rng(seed)
    return Scores("random", {group.name: generator.random(group.channels) for group in graph.groups}, {"seed": seed})
