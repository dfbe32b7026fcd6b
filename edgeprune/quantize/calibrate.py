"""The ranges of activations on real images, streamed: whatever the number of images, a few hundred megabytes at most.

minmax: the union of all images' ranges; nothing is clipped. percentile: what holds all but a small share of the values. entropy: the
clipping with the least information lost (Kullback-Leibler divergence of the 8-bit histogram from the fine one). Percentile and
entropy read one histogram a tensor, whose width doubles whenever a value falls outside, pairs of bins merging, so that one pass
over the images is enough.
Source of entropy calibration: S. Migacz, 8-bit Inference with TensorRT, GTC 2017. We differ in: both ends of a range shrink together,
by shares of the range, and signed tensors keep their zero point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeprune.errors import DataError, UsageError
from edgeprune.export.session import session_of
from edgeprune.quantize.bits import METHODS, Method

Batch = tuple[NDArray[np.float32], NDArray[np.int64]]
Range = tuple[float, float]
BINS = 4096
SHARE_INSIDE = 0.9999  # of the values, for percentile
_MEMORY_BYTES = 192 << 20  # of activations at a time
_AT_ONCE = 32  # images, where only outputs are kept
_LEVELS = 128  # of the entropy calibration's coarse histogram, on each side of zero
_SHARES = np.linspace(1.0, 0.2, 33)
_LEAST_PER_BIN = 64  # values: with fewer, the noise of the fine histogram counts as information


class Observer(Protocol):
    """Something that sees tensors while the network runs."""

    @property
    def tensors(self) -> Iterable[str]:
        """The names it wants to see."""

    def see(self, name: str, values: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        """A tensor of some images, batch first, and their labels (-1: none)."""


def observe(proto: onnx.ModelProto, batches: Iterable[Batch], *observers: Observer) -> int:
    """Runs the network over `batches` and shows every observer the tensors it asked for; returns the number of images.

    Images are taken a few at a time, so that their activations stay below 192 MB. Raises DataError for no images, for a network of
    several inputs, and for values that are not finite.
    """
    wanted = sorted({name for observer in observers for name in observer.tensors})
    session, feed, fixed = _session(proto, wanted)
    made = [name for name in wanted if name != feed]
    seen, at_once = 0, fixed
    for images, labels in batches:
        start = 0
        while start < len(images):
            part = slice(start, start + (at_once or 1))
            values = {feed: images[part], **dict(zip(made, session.run(made, {feed: images[part]}) if made else [], strict=True))}
            for observer in observers:
                for name in observer.tensors:
                    observer.see(name, values[name], labels[part])
            start = part.stop
            at_once = at_once or max(1, _MEMORY_BYTES // max(1, sum(v.nbytes for v in values.values())))
        seen += len(images)
    if not seen:
        raise DataError("there are no images to calibrate with: give data with training images.")
    return seen


def runner(proto: onnx.ModelProto) -> Callable[[NDArray[np.float32]], NDArray[np.float64]]:
    """A function from images to the first output; one image at a time where the network insists on its batch."""
    session = session_of(proto)
    given = session.get_inputs()[0]
    step = given.shape[0] if isinstance(given.shape[0], int) else _AT_ONCE

    def run(images: NDArray[np.float32]) -> NDArray[np.float64]:
        parts = [session.run(None, {given.name: images[i : i + step]})[0] for i in range(0, len(images), step)]
        return np.concatenate(parts).astype(np.float64)

    return run


class Ranges:
    """The range of every tensor, by one of METHODS; an Observer. Histograms are kept only by methods that read them."""

    def __init__(self, tensors: Iterable[str], method: Method = "minmax") -> None:
        if method not in METHODS:
            raise UsageError(f"the calibration method must be one of {', '.join(METHODS)}, got {method!r}.")
        self._histograms = {name: Histogram() for name in tensors}
        self._method = method

    @property
    def tensors(self) -> Iterable[str]:
        """The names it sees."""
        return self._histograms.keys()

    def see(self, name: str, values: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        """See Observer."""
        if not np.isfinite(values.sum()):
            raise DataError(f"the tensor {name} holds NaN or Inf on the calibration images: check preprocessing (mean, std) and weights.")
        self._histograms[name].add(values, count=self._method != "minmax")

    def found(self) -> dict[str, Range]:
        """(lowest, highest) of every tensor, zero included: the value of padding must be exact."""
        choose: dict[Method, Callable[[Histogram], Range]] = {
            "minmax": Histogram.extremes,
            "percentile": Histogram.percentile,
            "entropy": Histogram.entropy,
        }
        raw = {name: choose[self._method](histogram) for name, histogram in self._histograms.items()}
        return {name: (min(low, 0.0), max(high, 0.0)) for name, (low, high) in raw.items()}


class Histogram:
    """Extremes and counts of the values seen so far, in BINS bins of equal width over (-reach, reach).

    Zeros are not counted: every range represents them exactly, and behind a ReLU half of all values would be one spike.
    """

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.reach = 0.0
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[np.float32], *, count: bool = True) -> None:
        """Some values."""
        low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not count:
            return
        largest = max(-low, high)
        if largest >= self.reach:
            reach = 2.0 ** (np.floor(np.log2(max(largest, 1e-30))) + 1)
            while self.reach and self.reach < reach:
                self._double()
            self.reach = reach
        places = ((values.ravel() + self.reach) * (BINS / (2 * self.reach))).astype(np.int32)
        self.counts += np.bincount(np.minimum(places, BINS - 1, out=places), minlength=BINS)
        self.counts[BINS // 2] -= values.size - np.count_nonzero(values)

    def extremes(self) -> Range:
        """The smallest and the largest value."""
        return self.low, self.high

    def percentile(self) -> Range:
        """What holds SHARE_INSIDE of the values, the rest shared by both ends."""
        outside = (1 - SHARE_INSIDE) * self.counts.sum()
        below, above = np.cumsum(self.counts), np.cumsum(self.counts[::-1])
        signed = self.low < 0
        allowed = outside / 2 if signed else outside
        edges = self._edges()
        low = edges[np.searchsorted(below, allowed, side="right")] if signed else self.low
        high = edges[BINS - np.searchsorted(above, allowed, side="right")]
        return max(float(low), self.low), min(float(high), self.high)

    def entropy(self) -> Range:
        """The share of the extremes whose 8-bit histogram keeps most of the information; the extremes where values are too few."""
        if self.counts.sum() < _LEAST_PER_BIN * np.count_nonzero(self.counts):
            return self.extremes()
        losses = [self._divergence(share) for share in _SHARES]
        share = float(_SHARES[int(np.argmin(losses))])
        return self.low * share, self.high * share

    def _divergence(self, share: float) -> float:
        """KL(P || Q): P is the histogram with what is clipped put into the outermost bins, Q its 8-bit version."""
        centre = BINS // 2
        first = max(0, centre - int(np.ceil(centre * min(1.0, max(0.0, -self.low * share / self.reach)))))
        last = min(BINS, centre + int(np.ceil(centre * min(1.0, max(0.0, self.high * share / self.reach)))))
        inside = self.counts[first:last].astype(np.float64)
        levels = 2 * _LEVELS
        if len(inside) <= levels:  # finer than 8 bits is nothing to lose: only clipping counts
            levels = max(1, len(inside))
        clipped = inside.copy()
        clipped[0] += self.counts[:first].sum()
        clipped[-1] += self.counts[last:].sum()
        group = np.arange(len(inside)) * levels // len(inside)
        filled = (inside > 0).astype(np.float64)
        totals, members = np.bincount(group, inside, levels), np.bincount(group, filled, levels)
        coarse = np.where(inside > 0, (totals / np.maximum(members, 1))[group], 0.0)
        p, q = clipped / clipped.sum(), coarse / max(coarse.sum(), 1.0)
        used = p > 0
        return float((p[used] * np.log(p[used] / np.maximum(q[used], 1e-9))).sum())

    def _edges(self) -> NDArray[np.float64]:
        return np.linspace(-self.reach, self.reach, BINS + 1)

    def _double(self) -> None:
        """The same counts in bins of twice the width; zero stays an edge."""
        quarter, pairs = BINS // 4, self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(BINS, np.int64)
        self.counts[quarter : 3 * quarter] = pairs
        self.reach *= 2


class Means:
    """The mean of tensors over the images, keeping every position, (…) without the batch axis; an Observer."""

    def __init__(self, tensors: Sequence[str]) -> None:
        self.tensors: Sequence[str] = tuple(dict.fromkeys(tensors))
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._images = dict.fromkeys(self.tensors, 0)

    def see(self, name: str, values: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        """See Observer."""
        self._sums[name] = self._sums.get(name, np.zeros(values.shape[1:])) + values.sum(axis=0, dtype=np.float64)
        self._images[name] += len(values)

    def found(self) -> Mapping[str, NDArray[np.float64]]:
        """By tensor."""
        return {name: total / self._images[name] for name, total in self._sums.items()}


def _session(proto: onnx.ModelProto, tensors: Sequence[str]) -> tuple[Any, str, int]:
    """(a session that also returns `tensors`, the name of its input, the batch size it insists on or 0)."""
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    known = {o.name for o in watched.graph.output} | {i.name for i in watched.graph.input}
    for name in tensors:
        if name not in known:
            watched.graph.output.append(onnx.ValueInfoProto(name=name))
    made = {i.name for i in proto.graph.initializer}
    inputs = [i.name for i in proto.graph.input if i.name not in made]
    if len(inputs) != 1:
        raise DataError(f"calibration feeds one tensor of images, the network takes {len(inputs)} inputs: {', '.join(inputs)}.")
    session = session_of(watched, enable_mem_pattern=False, enable_cpu_mem_arena=False)  # an arena would keep the largest batch's memory
    batch = session.get_inputs()[0].shape[0]
    return session, inputs[0], batch if isinstance(batch, int) else 0
