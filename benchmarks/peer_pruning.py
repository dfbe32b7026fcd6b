"""Torch-Pruning's choice of channels as a plan of ours, so that it runs through the same recovery and the same evaluation.

It is no dependency of edgeprune. To have its rows: `pip install --no-deps --target runs/peers torch-pruning==1.6.1`, then run the
benchmark with PYTHONPATH=runs/peers. Only the inner widths of the blocks are given to it: on shortcuts that pad channels (option A) it
ties the wrong ones. Source: Fang, Ma, Song, Mi, Wang, "DepGraph: Towards Any Structural Pruning", CVPR 2023.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.device.kernels import kernels
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Plan

PEERS = {"torch-pruning L2 group norm": "GroupMagnitudeImportance", "torch-pruning Taylor": "GroupTaylorImportance"}
ALLOCATION = "its own global"
INNER = ".conv1"
LARGEST = 0.9  # share of a layer's channels that may go, as in our allocators


def version() -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version("torch-pruning")
    except importlib.metadata.PackageNotFoundError:
        return None


def plan(name: str, model: nn.Module, graph: ChannelGraph, data: Iterable[tuple[Tensor, Tensor]], macs: float) -> Plan:
    """The channels that the peer leaves, at the pruning ratio whose network is the largest with at most the share `macs` of the MACs.

    `data`: labelled batches, which its Taylor importance reads.
    """
    gradients = _gradients(model, data) if "Taylor" in name else {}
    low, high, best = 0.0, 1.0, Plan({})
    for _ in range(12):
        ratio = (low + high) / 2
        found = _pruned(PEERS[name], model, graph, gradients, ratio)
        widths = np.array([[len(found.keep.get(g.name, range(g.channels))) for g in graph.groups]])
        if float(kernels(graph).macs(widths)[0]) <= macs * graph.macs:
            high, best = ratio, found
        else:
            low = ratio
    return best


def _gradients(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Of the summed loss of all batches, in eval mode."""
    work = copy.deepcopy(model).eval()
    for x, y in data:
        F.cross_entropy(work(x), y).backward()
    return {name: p.grad for name, p in work.named_parameters() if p.grad is not None}


def _pruned(importance: str, model: nn.Module, graph: ChannelGraph, gradients: dict[str, Tensor], ratio: float) -> Plan:
    peer: Any = importlib.import_module("torch_pruning")
    work = copy.deepcopy(model).eval()
    for name, parameter in work.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    inner = {g.name for g in graph.groups if g.name.endswith(INNER) and g.producing == 1}
    layers = dict(work.named_modules())
    pruner = peer.pruner.BasePruner(
        work,
        torch.zeros(1, 3, 32, 32),
        importance=getattr(peer.importance, importance)(),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=LARGEST,
        ignored_layers=[m for n, m in layers.items() if isinstance(m, nn.Conv2d | nn.Linear) and n not in inner],
    )
    pruner.step()
    tensors, dense = dict(work.named_parameters()), dict(model.named_parameters())
    return Plan({name: _kept(dense[f"{name}.weight"], tensors[f"{name}.weight"]) for name in sorted(inner)})


def _kept(dense: Tensor, left: Tensor) -> tuple[int, ...]:
    """Which filters of a layer are still there: those that are equal, number by number."""
    same = (dense.detach().flatten(1)[:, None] == left.detach().flatten(1)[None]).all(dim=2)
    if int(same.sum()) != len(left):
        raise ValueError("the peer changed filters that it kept, or two filters are equal: its choice cannot be read off.")
    return tuple(int(c) for c in torch.nonzero(same.any(dim=1)).flatten())
