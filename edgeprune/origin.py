"""Where a network that is pruned again comes from, and one plan for all that was removed from the dense one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from edgeprune.graph import ChannelGraph
from edgeprune.graph.slim import removed_positions
from edgeprune.plan import Plan


@dataclass(frozen=True, eq=False)
class Origin:
    """The dense network, its graph, and the plan that made the network of now; an empty plan where that is the dense one."""

    model: nn.Module
    graph: ChannelGraph
    plan: Plan

    def then(self, graph: ChannelGraph, plan: Plan) -> Plan:
        """The plan of the dense network that removes what `plan` removes from the network of now, whose graph is `graph`, too."""
        before, later = removed_positions(self.graph, self.plan), removed_positions(graph, plan)
        keep = {}
        for group in self.graph.groups:
            member = next((m for m in group.members if m.parameter in graph.shapes), group.members[0])  # a branch may be gone
            axis = (member.parameter, member.axis)
            stays = ~before.get(axis, np.zeros(self.graph.shapes[member.parameter][member.axis], dtype=bool))
            if axis in later:
                stays[np.flatnonzero(stays)[later[axis]]] = False
            keep[group.name] = tuple(np.flatnonzero(stays[member.indices].all(axis=1)).tolist())
        return Plan(keep)
