"""Nuclear norm (energy) of each channel's feature maps, no labels needed.

Formula: ||M||_* = sum of the singular values of M, taken where the next conv, linear or pooling reads the channel:
    mode="image"   (default)  s_c = mean over images of || map of channel c, (h, w) ||_*
    mode="stacked"            s_c = || the maps of all images, one flattened map a row, (images, h w) ||_*
A channel read in several places has the mean of their energies, each divided by its layer's mean. Vectors (h = w = 1) reduce to
mean |a| and to the L2 norm over the images.
Cost: `image` O(images c h w min(h, w)) after one forward pass, about 2,600 MACs of a convolution per map element. Where that is more
than the forward pass, only the first images (as many as hold 16 million map elements, at least 16) and then every k-th count, with
k the smallest whole number that makes it no more; `every=1` takes all, `every=k` every k-th. `stacked` keeps a (h w, h w) Gram matrix
per channel: no image is kept, so any split into batches gives the same.
Large maps are averaged over squares first: where the shorter side is above `max_side` = 56 (image), or where the Gram matrices of
a layer would take more than 64 MiB (stacked).
route="gram" takes eigenvalues of M M^T on the shorter side in float64, because squaring loses half of the digits, in chunks that fit a
cache; "svd" the singular values themselves, slower; they agree to 1e-6.
Source: Yeom, Shim, Hwang, "Toward Compact Deep Neural Networks via Energy-Aware Pruning", arXiv 2103.10858 (2021).
We differ in: the paper's text says nuclear norm of feature maps; that the matrix is each image's own (h, w) map, averaged over
images, is our reconstruction, after its predecessor HRank; `stacked` is the other reading. Pooling and every k-th image are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from edgeprune.criteria.probe import Probe, Statistic, View
from edgeprune.errors import UsageError
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Scores

Floats = NDArray[np.float64]

NEEDS = ("maps",)
PAPER = "Yeom et al., Toward Compact Deep Neural Networks via Energy-Aware Pruning, arXiv 2103.10858 (reconstructed from its abstract)"
ROUTES = ("gram", "svd")
CHUNK_BYTES = 1 << 20
GRAM_BYTES = 64 << 20
MACS_PER_ELEMENT = 2600  # measured: 35 ns for an element of a map of side 32, 50 at 16, 64 at 8; 0.025 ns for a MAC of a convolution
EXACT_ELEMENTS = 1 << 24
EXACT_IMAGES = 16


def score(graph: ChannelGraph, probe: Probe, **options: Any) -> Scores:
    """Energy of each channel, dimensionless, float64, higher = keep. Shapes: maps (n, c, h, w) -> (c,)."""
    return probe.gather(statistic(graph, probe, **options))[0]


def statistic(
    graph: ChannelGraph, probe: Probe, *, mode: str = "image", route: str = "gram", every: int = 0, max_side: int = 56
) -> Statistic:
    """The running sums of the energies; `every` = 0 chooses. Raises UsageError for unknown modes and routes."""
    for name, value, known in (("mode", mode, ("image", "stacked")), ("route", route, ROUTES)):
        if value not in known:
            raise UsageError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    checked_work(every, max_side)
    if mode == "stacked":
        return _Stacked(graph, probe, route, max(every, 1))
    return MapMeans(graph, probe, "nuclear_norm", lambda maps: nuclear_norms(maps, route), every=every, max_side=max_side)


class MapMeans(Statistic):
    """The mean over images of one figure of every map: `figure` takes (n, c, h, w) to (n, c)."""

    def __init__(
        self, graph: ChannelGraph, probe: Probe, name: str, figure: Callable[[Tensor], Tensor], *, every: int, max_side: int
    ) -> None:
        self._graph, self._probe, self._name, self._figure, self._max_side = graph, probe, name, figure, max_side
        self._every, self._first = (every, 0) if every else _thinning(graph)
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._seen: dict[tuple[str, int], int] = {}
        self._used: dict[tuple[str, int], int] = {}

    def update(self, view: View) -> None:
        """Add the figures of one batch."""
        seen, n = self._seen.get(view.key, 0), len(view.maps)
        self._seen[view.key] = seen + n
        maps = _thinned(view.maps, seen, self._every, self._first)
        if not len(maps):
            return
        maps = _shrunk(maps, lambda h, w: min(h, w) <= self._max_side)
        figures = self._figure(maps).sum(dim=0)
        self._sums[view.key] = self._sums[view.key] + figures if view.key in self._sums else figures
        self._used[view.key] = self._used.get(view.key, 0) + len(maps)

    def scores(self, images: int) -> Scores:
        """The mean of each channel; a group that no layer reads is worth the same everywhere."""
        rows = {key: (total / self._used[key]).cpu().numpy() for key, total in self._sums.items()}
        return layers_to_groups(self._graph, self._probe, rows, Scores(self._name, {}, {"images": images, "every": self._every}))


class _Stacked(Statistic):
    """A square matrix per channel with the singular values of all rows so far: their Gram matrix, or the R of their QR (svd)."""

    def __init__(self, graph: ChannelGraph, probe: Probe, route: str, every: int) -> None:
        self._graph, self._probe, self._svd, self._every = graph, probe, route == "svd", every
        self._seen: dict[tuple[str, int], int] = {}
        self._squares: dict[tuple[str, int], Tensor] = {}

    def update(self, view: View) -> None:
        """Add one batch's rows."""
        seen = self._seen.get(view.key, 0)
        self._seen[view.key] = seen + len(view.maps)
        maps = _thinned(view.maps, seen, self._every, 0)
        maps = _shrunk(maps, lambda h, w: 8 * maps.shape[1] * (h * w) ** 2 <= GRAM_BYTES)
        rows = maps.flatten(2).transpose(0, 1).double()
        before = self._squares.get(view.key)
        if self._svd:
            self._squares[view.key] = torch.linalg.qr(rows if before is None else torch.cat([before, rows], dim=1), mode="r").R
        else:
            self._squares[view.key] = torch.bmm(rows.mT, rows) if before is None else before.baddbmm_(rows.mT, rows)

    def scores(self, images: int) -> Scores:
        """The sum of the singular values of each channel's rows."""
        rows = {}
        for key, square in self._squares.items():
            values = torch.linalg.svdvals(square) if self._svd else torch.linalg.eigvalsh(square).clamp(min=0).sqrt()
            rows[key] = values.sum(dim=1).cpu().numpy()
        return layers_to_groups(self._graph, self._probe, rows, Scores("nuclear_norm", {}, {"images": images, "every": self._every}))


def checked_work(every: int, max_side: int) -> None:
    """Raises UsageError for options that leave no image or no map."""
    if every < 0 or max_side < 1:
        raise UsageError(f"every must be 0 (choose) or more and max_side 1 or more, got {every!r} and {max_side!r}.")


def nuclear_norms(maps: Tensor, route: str = "gram") -> Tensor:
    """Sum of singular values of every map, float64: (n, c, h, w) -> (n, c)."""
    return of_singular_values(maps, lambda values: values.sum(dim=1), route)


def of_singular_values(maps: Tensor, figure: Callable[[Tensor], Tensor], route: str = "gram") -> Tensor:
    """A figure of the singular values of every map, float64: (n, c, h, w) -> (n, c); `figure` takes (maps, values) to (maps,)."""
    n, c, h, w = maps.shape
    flat = maps.reshape(n * c, h, w)
    if h > w:
        flat = flat.mT
    parts = []
    for chunk in flat.split(max(1, CHUNK_BYTES // (8 * h * w))):
        x = chunk.double()
        if min(h, w) == 1:
            values = torch.linalg.vector_norm(x, dim=2)
        elif route == "svd":
            values = torch.linalg.svdvals(x)
        else:
            values = torch.linalg.eigvalsh(torch.bmm(x, x.mT)).clamp_(min=0).sqrt_()
        parts.append(figure(values))
    return torch.cat(parts).reshape(n, c)


def layers_to_groups(graph: ChannelGraph, probe: Probe, rows: Mapping[tuple[str, int], Floats], scores: Scores) -> Scores:
    """`scores` with values: of each group the rows of its layers, each divided by its mean; a group that no layer reads has ones."""
    values = {}
    for group in graph.groups:
        found = [rows[key] for tap in range(len(graph.taps[group.name])) if (key := (group.name, tap)) in rows]
        values[group.name] = probe.reduced(found, balance=True) if found else np.ones(group.channels)
    return replace(scores, values=values)


def _thinning(graph: ChannelGraph) -> tuple[int, int]:
    """(k, first): after the first images every k-th counts, so that eigenvalues cost no more than the forward pass."""
    calls = {op.call: op for op in graph.ops}
    elements = 0.0
    for tap in (tap for group in graph.groups for tap in graph.taps[group.name] if tap.call in calls):
        shape = graph.activations[calls[tap.call].output].shape
        elements += float(np.prod(shape)) * tap.indices.size / shape[tap.axis]
    every = max(1, int(np.ceil(MACS_PER_ELEMENT * elements / max(graph.macs, 1))))
    return every, max(EXACT_IMAGES, int(EXACT_ELEMENTS / max(elements, 1)))


def _thinned(maps: Tensor, seen: int, every: int, first: int) -> Tensor:
    """The maps of those images that count, by their number in the run."""
    number = torch.arange(seen, seen + len(maps), device=maps.device)
    used = (number < first) | (number % every == 0)
    return maps if bool(used.all()) else maps[used]


def _shrunk(maps: Tensor, fits: Callable[[int, int], bool]) -> Tensor:
    """The maps, averaged over the smallest squares that make their sides fit."""
    h, w = maps.shape[2:]
    factor = 1
    while not fits(-(-h // factor), -(-w // factor)):
        factor += 1
    return maps if factor == 1 else F.avg_pool2d(maps, (min(factor, h), min(factor, w)), ceil_mode=True)
