"""Allocation problems on tiny networks: scores, budgets between floor and dense, and what a plan really costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune import criteria
from edgeprune.allocate import allocate
from edgeprune.allocate.search import Search
from edgeprune.device.card import device
from edgeprune.device.cost import CostModel, predict_graph
from edgeprune.graph import ChannelGraph
from edgeprune.graph.slim import slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.registry import entries
from edgeprune.widths import WidthRules
from tests.networks import images, traced

ALLOCATORS = [e.name for e in entries("allocate")]
COST = CostModel(device("rpi4"))
FEW: dict[str, dict[str, Any]] = {
    "layer_compensated": {"evaluations": 6, "population": 3, "images": 8, "recalibration_images": 4},
    "di_greedy": {"images": 12, "share": 0.1},
}
Batches = list[tuple[Any, Tensor]]
_NETWORKS: dict[ChannelGraph, tuple[nn.Module, Batches]] = {}


def problem(name: str) -> tuple[nn.Module, ChannelGraph, Scores]:
    model, graph = traced(name)
    known(graph, model, [(images(name, 12), torch.arange(12) % 5)])
    return model, graph, criteria.score(graph, model, "l1")


def known(graph: ChannelGraph, model: nn.Module, data: Batches) -> None:
    """From now on `plan_of` knows the network of this graph, and images for it."""
    _NETWORKS[graph] = model, data


def plan_of(graph: ChannelGraph, scores: Scores, budget: Budget, *, method: str, **options: Any) -> Plan:
    """`allocate`; methods that run the network get it, and search a little only."""
    if method not in FEW:
        return allocate(graph, scores, budget, method=method, **options)
    model, data = _NETWORKS[graph]
    return allocate(graph, scores, budget, method=method, model=model, data=data, **{**FEW[method], **options})


def stack() -> nn.Module:
    """Nine convs each of 16, 32 and 64 channels: as wide as ResNet-56, and nothing tied."""
    layers: list[nn.Module] = []
    before = 3
    for width in (16, 32, 64):
        for block in range(9):
            layers += [nn.Conv2d(before, width, 3, 2 if block == 0 and width > 16 else 1, 1), nn.ReLU()]
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def between(graph: ChannelGraph, scores: Scores, share: float, *figures: str, round_to: int = 1) -> Budget:
    """A budget that lies `share` of the way from the smallest allowed network to the dense one, in each figure."""
    any_budget = Budget(**dict.fromkeys(figures, 1e9))
    search = Search(graph, scores, any_budget, COST, rules=WidthRules(round_to=round_to))
    low, high = (search.figures(np.atleast_2d(w)) for w in (search.smallest, graph.dense_widths))
    return Budget(**{f: float(low[f][0] + share * (high[f][0] - low[f][0])) for f in figures})


def widths(graph: ChannelGraph, plan: Plan) -> Any:
    return plan.widths(graph)


def real_figures(name: str, plan: Plan) -> dict[str, float]:
    """Every figure of the network that `slim` makes, traced anew."""
    model, graph = traced(name)
    thin = trace(slim(model, graph, plan), images(name))
    cost = predict_graph(thin, None, COST.device)
    assert cost.energy_mj is not None
    return {
        "macs": thin.macs,
        "params": thin.params,
        "latency_ms": cost.latency_ms.high,
        "energy_mj": cost.energy_mj.high,
        "size_bytes": cost.size_bytes,
        "peak_memory_bytes": cost.peak_memory_bytes,
    }


def is_full(graph: ChannelGraph, scores: Scores, budget: Budget, plan: Plan, round_to: int) -> bool:
    """No group can be widened by one step without breaking a limit."""
    search = Search(graph, scores, budget, COST, rules=WidthRules(round_to=round_to))
    now = widths(graph, plan)
    for g, allowed in enumerate(search.allowed):
        wider = [w for w in allowed if w > now[g]]
        if wider and search.fits(np.concatenate([now[:g], wider[:1], now[g + 1 :]])[None])[0]:
            return False
    return True
