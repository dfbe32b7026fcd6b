"""Channel independence (CHIP): what the layer's feature maps lose in nuclear norm without a channel; no labels needed.

Formula, one image, A (channels, h w) the maps of a layer, one a row:
    form="deletion"             CI_c = ||A||_* - ||A without row c||_*
    form="gradient" (default)   the derivative of ||A||_* by a factor on row c, [(A A')^(1/2)]_cc, never below CI_c
averaged over images. The second takes one eigendecomposition for all channels, the first one for each; the gradients of a layer sum
to its ||A||_*. A channel that the others can stand for is low. A channel read in several places has the mean of its independences,
each divided by its layer's mean. A dead channel has 0. Maps are taken where the next conv, linear or pooling reads them.
Cost, s = min(channels, h w): images s^3 and a Gram matrix, images c s^3 for "deletion"; eigenvalues in float64, on the shorter side of A.
`every=k` takes every k-th image only.
Source: Sui, Yin, Xie, Phan, Zonouz, Yuan, "CHIP: CHannel Independence-based Pruning for Compact Neural Networks", NeurIPS 2021, with
its authors' code.
We differ in: the gradient in place of the deletion is ours, much cheaper; features are not rounded to 4 decimals as in the code;
A holds the channels of one group, where a layer reads several (after a concatenation) each is taken for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgeprune.criteria.nuclear_norm import MapMeans
from edgeprune.criteria.probe import Probe, Statistic
from edgeprune.errors import UsageError
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Scores

NEEDS = ("maps",)
PAPER = "Sui et al., CHIP: CHannel Independence-based Pruning for Compact Neural Networks, NeurIPS 2021"
CHUNK_BYTES = 32 << 20
ROUNDING = 1e-13  # eigenvalues below this share of the largest are what rounding left of 0


def score(graph: ChannelGraph, probe: Probe, **options: Any) -> Scores:
    """Independence of each channel, float64, >= 0, higher = keep. Shapes: maps (n, c, h, w) -> (c,)."""
    return probe.gather(statistic(graph, probe, **options))[0]


def statistic(graph: ChannelGraph, probe: Probe, *, form: str = "gradient", every: int = 1) -> Statistic:
    """The running sums of the independences. Raises UsageError for an unknown form."""
    forms: dict[str, Callable[[Tensor], Tensor]] = {"gradient": gradients, "deletion": deletions}
    if form not in forms:
        raise UsageError(f"form must be one of {', '.join(forms)}, got {form!r}.")
    if every < 1:
        raise UsageError(f"every must be 1 or more, got {every!r}.")
    return MapMeans(graph, probe, "chip", forms[form], every=every, max_side=1 << 30)


def gradients(maps: Tensor) -> Tensor:
    """[(A A')^(1/2)]_cc of every image, float64: (n, c, h, w) -> (n, c)."""
    rows = maps.flatten(2)
    channels, pixels = rows.shape[1:]
    parts = []
    for part in rows.split(max(1, CHUNK_BYTES // (8 * channels * pixels))):
        a = part.double()
        values, vectors = torch.linalg.eigh(a @ a.mT if channels <= pixels else a.mT @ a)
        values = torch.where(values > ROUNDING * values[:, -1:], values, 0.0)
        roots = values.sqrt()[:, None]
        if channels <= pixels:
            found = (vectors.square() * roots).sum(dim=2)
        else:  # left singular vectors times their values are A v
            found = ((a @ vectors).square() / roots.where(roots > 0, torch.inf)).sum(dim=2)
        parts.append(torch.where(a.square().sum(dim=2) > 0, found, 0.0))
    return torch.cat(parts)


def deletions(maps: Tensor) -> Tensor:
    """||A||_* - ||A without row c||_* of every image and channel, float64: (n, c, h, w) -> (n, c)."""
    return torch.stack([_deletions(a.double()) for a in maps.flatten(2)])


def _deletions(a: Tensor) -> Tensor:
    """One image: a (channels, pixels) -> (channels,)."""
    channels, pixels = a.shape
    short = channels <= pixels
    gram = a @ a.T if short else a.T @ a
    whole = _root_sum(gram)
    parts = []
    for rows in torch.arange(channels, device=a.device).split(max(1, CHUNK_BYTES // (8 * len(gram) ** 2))):
        if short:  # a row and a column of zeros have the same singular values as none
            left = torch.ones(len(rows), channels, dtype=a.dtype, device=a.device)
            left[torch.arange(len(rows)), rows] = 0
            less = gram * left[:, :, None] * left[:, None, :]
        else:
            less = gram - a[rows, :, None] * a[rows, None, :]
        parts.append(whole - _root_sum(less))
    found = torch.cat(parts).clamp(min=0)
    return torch.where(a.square().sum(dim=1) > 0, found, 0.0)


def _root_sum(gram: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(dim=-1)
    return values
