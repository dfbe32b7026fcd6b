"""First-order Taylor: what the loss changes, to first order, when a channel's weights become zero.

Formula: s_c = mean over batches of (sum over the channel's weights of w * dL/dw)², L the mean cross-entropy of the batch; then the mean
over the layers that produce the channel. `squared=False` takes |.| instead of the square. `on="norms"` takes gamma and beta of the
norms on the channel instead of the weights: their sum gamma * dL/dgamma + beta * dL/dbeta is the derivative by a gate behind the norm;
groups without norms keep their weights. Cost: one forward and one backward pass over the data.
Source: Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural Network Pruning", CVPR 2019. We differ in: the paper
prunes while it trains, a few channels every few batches; here the network is scored once. The square is of the batch's mean gradient,
so scores depend on how the data are cut into batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune.criteria.probe import Probe, Statistic
from edgeprune.errors import UsageError
from edgeprune.graph import ChannelGraph, ChannelGroup, Member
from edgeprune.plan import Scores

NEEDS = ("labels", "gradients", "loss")
PAPER = "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019"


def score(graph: ChannelGraph, probe: Probe, **options: Any) -> Scores:
    """Squared first-order change of the loss, float64, higher = keep. Shapes: (channels,) per group."""
    return probe.gather(statistic(graph, probe, **options))[0]


def statistic(graph: ChannelGraph, probe: Probe, *, on: str = "weights", squared: bool = True) -> Statistic:
    """The running sums over batches. Raises UsageError for an unknown `on` and for weights that have no gradient."""
    if on not in ("weights", "norms"):
        raise UsageError(f"on must be weights or norms, got {on!r}.")
    return _Taylor(graph, probe, norms=on == "norms", squared=squared)


class _Taylor(Statistic):
    gradients = True
    maps = False

    def __init__(self, graph: ChannelGraph, probe: Probe, *, norms: bool, squared: bool) -> None:
        self._graph, self._probe, self._squared = graph, probe, squared
        gammas = {op.weight for op in graph.ops if op.kind == "norm" and op.weight} if norms else set()
        self._layers = {g.name: _layers(g, gammas) for g in graph.groups}
        self._sums = {g.name: [np.zeros(g.channels) for _ in self._layers[g.name]] for g in graph.groups}
        frozen = sorted({m.parameter for ls in self._layers.values() for members in ls for m in members if not self._trains(m.parameter)})
        if frozen:
            raise UsageError(
                f"the criterion taylor needs gradients, and {frozen[0]} has requires_grad off: switch it on, or choose another criterion."
            )

    def _trains(self, parameter: str) -> bool:
        return self._probe.tensors[parameter].requires_grad

    def backward(self, gradients: Mapping[str, Tensor], images: int) -> None:
        """Add one batch, weighted by its images. A weight that the loss does not depend on has no gradient: it counts as zero."""
        for group in self._graph.groups:
            sums = self._sums[group.name]
            for number, members in enumerate(self._layers[group.name]):
                change = torch.zeros(group.channels, dtype=torch.float64)
                for member in members:
                    if member.parameter in gradients:
                        change += _change(self._probe.tensors[member.parameter], gradients[member.parameter], member).cpu()
                sums[number] += images * (change.square() if self._squared else change.abs()).numpy()

    def scores(self, images: int) -> Scores:
        """The mean over batches, then over layers."""
        values = {name: self._probe.reduced([s / images for s in sums]) for name, sums in self._sums.items()}
        return Scores("taylor", values, {"images": images})


def _layers(group: ChannelGroup, gammas: set[str]) -> list[list[Member]]:
    """What is set to zero together: the rows of each producing weight; or gamma and beta of each norm."""
    by_name = {m.parameter: m for m in group.members}
    norms = [m for m in group.members if m.parameter in gammas]
    if not norms:
        return [[m] for m in group.members[: group.producing]]
    betas = [by_name.get(m.parameter.removesuffix("weight") + "bias") for m in norms]
    return [[gamma, *([beta] if beta else [])] for gamma, beta in zip(norms, betas, strict=True)]


def _change(weight: Tensor, gradient: Tensor, member: Member) -> Tensor:
    """Sum of weight * gradient over all that belongs to each channel, float64 (channels,)."""
    product = weight.detach().double() * gradient.double()
    rows = product.movedim(member.axis, 0).reshape(weight.shape[member.axis], -1).sum(dim=1)
    return rows[torch.from_numpy(member.indices).to(rows.device)].sum(dim=1)
