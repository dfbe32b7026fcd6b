"""Fits the constants of a profile to measured networks and judges the fit on networks it has not seen. No torch here.

The model is a sum with nonnegative constants, so least squares with nonnegativity is all it takes; what makes or breaks it is the
regularisation. A table seldom tells kernel kinds apart (in one family of networks every kind grows with every other), and plain
least squares then makes some constants zero and others triple: it fits the rows and predicts other networks absurdly. So constants
are drawn to a prior shape times one fitted speed factor; the rows correct it as far as they know better, and constants that no row
knows keep the prior's ratio to the rest.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from edgeprune.device.card import Fit, KernelKind, MacKind, MemoryKind, Profile, Rate
from edgeprune.device.cost import RATES, interval_factors, range_of, share_of_kinds, terms
from edgeprune.device.kernels import KernelsAt
from edgeprune.errors import DeviceError

Floats = NDArray[np.float64]

MAC_KINDS, MEMORY_KINDS = get_args(MacKind), get_args(MemoryKind)
KINDS = (*MAC_KINDS, *MEMORY_KINDS)
_DEPTHWISE = ("depthwise", "depthwise_large")
_GATHERING = ("conv3x3", "conv_other", "grouped")
FOLDS, NOMINAL = 5, 0.90
_ROBUST_STEPS, _OUTLIER = 3, 0.05


@dataclass(frozen=True, eq=False)
class Sample:
    """One measured network. Networks of one `family` are never on both sides of a hold-out. `at` holds one plan."""

    network: str
    family: str
    latency_ms: float
    at: KernelsAt


@dataclass(frozen=True)
class Prior:
    """What is believed before the rows speak: the constants by column up to a common factor, and how strongly (see `fit`)."""

    shape: Mapping[str, float]
    pull: float
    cache_bytes: float = 1e18


def column(kind: str, rate: str) -> str:
    """The column of the fit that a kind's constant belongs to, "" where the kind has none: kinds share what no table tells apart."""
    dense = kind in MAC_KINDS and kind not in _DEPTHWISE
    columns = {
        "mac_ns": f"mac_ns {kind}" if kind in MAC_KINDS else "",
        "byte_ns": "byte_ns dense" if dense else "byte_ns depthwise" if kind in _DEPTHWISE else f"byte_ns {kind}",
        "weight_byte_ns": "weight_byte_ns",
        "patch_byte_ns": "patch_byte_ns" if kind in _GATHERING else "",
        "far_byte_ns": "far_byte_ns",
        "far_weight_byte_ns": "far_weight_byte_ns" if dense else "",
        "group_us": "group_us" if kind == "grouped" else "",
        "call_us": "call_us",
    }
    return columns[rate]


COLUMNS = (*dict.fromkeys(name for rate in RATES for kind in KINDS if (name := column(kind, rate))), "network_us")


def features(at: KernelsAt, cache_bytes: float) -> Floats:
    """What each constant multiplies in one network, in the order of COLUMNS; the products are nanoseconds, (columns,)."""
    columns = np.array([[_position(kind, rate) for kind in at.kinds] for rate in RATES])
    counted = terms(at, cache_bytes)[:, 0, :]
    sums = np.bincount(columns.ravel(), weights=counted.ravel(), minlength=len(COLUMNS) + 1)[: len(COLUMNS)]
    sums[-1] = 1e3
    return np.asarray(sums)


@cache
def _position(kind: str, rate: str) -> int:
    """Number of the column; one past the last where the kind has no such constant."""
    name = column(kind, rate)
    return COLUMNS.index(name) if name else len(COLUMNS)


def design(samples: Sequence[Sample], cache_bytes: float) -> tuple[Floats, Floats]:
    """(features (samples, columns), measured nanoseconds (samples,))."""
    return np.stack([features(s.at, cache_bytes) for s in samples]), np.array([s.latency_ms * 1e6 for s in samples])


def shape_of(prior: Prior) -> Floats:
    """The prior's shape as a vector, (columns,). Raises DeviceError for names that are no column."""
    if strangers := prior.shape.keys() - set(COLUMNS):
        raise DeviceError(f"a prior names {', '.join(sorted(strangers))}; the columns are {', '.join(COLUMNS)}.")
    return np.array([prior.shape.get(name, 0.0) for name in COLUMNS])


def fit(x: Floats, y_ns: Floats, shape: Floats, pull: float) -> Floats:
    """Nonnegative constants, (columns,), with small relative errors, drawn towards `shape` times one fitted speed factor.

    Minimises sum (relative error)^2 + pull * rows * mean over columns (constant / (speed * shape) - 1)^2, rows reweighted
    against outliers. A column the rows do not contain stays at speed * shape; one whose shape is 0 stays 0.
    """
    from scipy.optimize import nnls

    relative = x / y_ns[:, None]
    target = shape / np.median(relative @ shape)
    scaled = relative * target
    anchor = math.sqrt(pull * len(y_ns) / len(shape)) * np.eye(len(shape))
    weight, factors = np.ones(len(y_ns)), np.ones(len(shape))
    for _ in range(_ROBUST_STEPS):
        factors = nnls(np.vstack([scaled * weight[:, None], anchor]), np.concatenate([weight, anchor.sum(axis=1)]))[0]
        weight = 1 / np.sqrt(np.maximum(np.abs(scaled @ factors - 1) / _OUTLIER, 1.0))
    return np.asarray(factors * target)


def folds_of(samples: Sequence[Sample]) -> NDArray[np.int64]:
    """The fold of every sample, (samples,): whole families, large ones first, each to the smallest fold."""
    count = Counter(s.family for s in samples)
    sizes, assigned = [0] * FOLDS, {}
    for family in sorted(count, key=lambda f: (-count[f], f)):
        assigned[family] = int(np.argmin(sizes))
        sizes[assigned[family]] += count[family]
    return np.array([assigned[s.family] for s in samples])


def held_out(x: Floats, y: Floats, folds: NDArray[np.int64], shape: Floats, pull: float) -> Floats:
    """Predicted ns of every row by a fit to the other folds, (rows,)."""
    predicted = np.zeros(len(y))
    for fold in np.unique(folds):
        out = folds == fold
        predicted[out] = x[out] @ fit(x[~out], y[~out], shape, pull)
    return predicted


def conformal(ratios: Floats, families: Sequence[str]) -> tuple[float, float]:
    """Factors (low, high) that hold measured / predicted with NOMINAL probability, each side with its finite-sample correction.

    Every family has the same weight, whatever its rows: the next network is more likely of a family that no row belongs to.
    """
    count = Counter(families)
    weight = np.array([1 / count[f] for f in families]) / (len(count) + 1)
    order = np.argsort(ratios)
    tail, low, high = (1 - NOMINAL) / 2, np.cumsum(weight[order]), np.cumsum(weight[order][::-1])
    first, last = int(np.searchsorted(low, tail)), int(np.searchsorted(high, tail))
    ordered = ratios[order]
    return min(float(ordered[first]), 1.0), max(float(ordered[::-1][last]), 1.0)


def constants_of(profile: Profile) -> Floats:
    """A profile's constants as the vector that `fit` gives, (columns,)."""
    named = {column(kind, rate): getattr(profile.kernels[kind], rate) for rate in RATES for kind in KINDS}
    return np.array([*(named[name] for name in COLUMNS[:-1]), profile.network_us])


def rates(constants: Floats, shares: Mapping[str, float]) -> dict[KernelKind, Rate]:
    """The constants of every kernel kind as a card holds them."""
    named = {name: _short(value) for name, value in zip(COLUMNS, constants, strict=True)}
    return {
        kind: Rate(**{r: named[c] for r in RATES if (c := column(kind, r))}, seen_share=round(min(shares.get(kind, 0.0), 1.0), 3))
        for kind in KINDS
    }


@dataclass(frozen=True, eq=False)
class Fitted:
    """A profile, and the held-out predictions in ms (samples,) that its figures come from."""

    profile: Profile
    held_out_ms: Floats
    covered: NDArray[np.bool_]


def fit_profile(samples: Sequence[Sample], prior: Prior, facts: Mapping[str, Any], words: Mapping[str, str]) -> Fitted:
    """A profile fitted to `samples`, with its error on held-out families in five folds.

    facts: runtime, threads, precision, clock_mhz, description (and power). words: source, method, held_out, noise of the Fit.
    Coverage is of each fold by the interval that a fit to the other folds gives, widening included: what a user would have got.
    """
    x, y = design(samples, prior.cache_bytes)
    folds, shape, families = folds_of(samples), shape_of(prior), [s.family for s in samples]
    predicted = held_out(x, y, folds, shape, prior.pull)
    covered = np.zeros(len(y), dtype=bool)
    for fold in np.unique(folds):
        seen = [s for s, f in zip(samples, folds, strict=True) if f != fold]
        x_seen, y_seen = x[folds != fold], y[folds != fold]
        inner = held_out(x_seen, y_seen, folds_of(seen), shape, prior.pull)
        factors = conformal(y_seen / inner, [s.family for s in seen])
        part = _profile(seen, fit(x_seen, y_seen, shape, prior.pull), prior, facts, _stated(factors, words))
        for number in map(int, np.flatnonzero(folds == fold)):
            low, high = interval_factors(part, samples[number].at)
            covered[number] = low[0] <= samples[number].latency_ms / (predicted[number] / 1e6) <= high[0]
    figures = _stated(conformal(y / predicted, families), words) | {
        "mape": round(100 * float(np.abs(predicted / y - 1).mean()), 2),
        "within_10": round(100 * float((np.abs(predicted / y - 1) <= 0.1).mean()), 1),
        "kendall_tau": round(kendall_tau(predicted, y), 3),
        "coverage": round(100 * float(covered.mean()), 1),
    }
    made = _profile(samples, fit(x, y, shape, prior.pull), prior, facts, figures)
    return Fitted(made, predicted / 1e6, covered)


def refine(profile: Profile, anchors: Sequence[Sample], pull: float = 0.3) -> tuple[Profile, Floats, Floats]:
    """(the profile adapted to a few measured networks, their errors before, their errors after), errors as predicted / measured - 1.

    The profile's own constants are the shape: three anchors mostly set the speed, ten also move constants against each other.
    An error after is that of the anchor when the others adapt the profile, so it says what to expect of the next network.
    Raises DeviceError for fewer than 3 anchors.
    """
    if len(anchors) < 3:
        raise DeviceError(f"{len(anchors)} anchor(s) do not adapt a profile: measure at least 3 networks, of different kinds and sizes.")
    x, y = design(anchors, profile.cache_bytes)
    shape = constants_of(profile)
    before, after = x @ shape / y - 1, np.zeros(len(y))
    for out in range(len(y)):
        rest = np.arange(len(y)) != out
        after[out] = x[out] @ fit(x[rest], y[rest], shape, pull) / y[out] - 1
    constants = fit(x, y, shape, pull)
    spread = float(np.exp(np.abs(np.log1p(after)).max()))
    noted = profile.fit.model_copy(
        update={
            "method": f"{profile.fit.method}; adapted to {len(anchors)} networks measured on this board",
            "held_out": f"{len(anchors)} anchors on this board, each left out in turn",
            "mape": round(100 * float(np.abs(after).mean()), 2),
            "within_10": round(100 * float((np.abs(after) <= 0.1).mean()), 1),
            "low_factor": min(profile.fit.low_factor, _short(1 / spread)),
            "high_factor": max(profile.fit.high_factor, _short(spread)),
        }
    )
    shares = {kind: rate.seen_share for kind, rate in profile.rates.items()}
    made = profile.model_copy(update={"kernels": rates(constants, shares), "network_us": _short(constants[-1]), "fit": noted})
    return made, before, after


def _stated(factors: tuple[float, float], words: Mapping[str, str]) -> dict[str, Any]:
    low, high = factors
    zero = {"mape": 0.0, "within_10": 0.0, "kendall_tau": 0.0, "coverage": 0.0}
    return {**words, **zero, "low_factor": round(low, 4), "high_factor": round(high, 4)}


def _profile(samples: Sequence[Sample], constants: Floats, prior: Prior, facts: Mapping[str, Any], figures: Mapping[str, Any]) -> Profile:
    macs = [float(s.at.macs.sum()) for s in samples if s.at.macs.sum() > 0]
    latencies = [s.latency_ms for s in samples]
    ranges: dict[str, Any] = {name: range_of([s.at for s in samples], name) for name in ("channels", "activation_bytes")}
    scalars: dict[str, Any] = {"network_us": _short(constants[-1]), "cache_bytes": prior.cache_bytes, **facts}
    made = Profile(
        **scalars,
        kernels=rates(constants, {}),
        fit=Fit(
            **figures,
            rows=len(samples),
            networks=len({s.family for s in samples}),
            macs=(min(macs), max(macs)),
            latency_ms=(_short(min(latencies)), _short(max(latencies))),
            **ranges,
        ),
    )
    largest: dict[str, float] = defaultdict(float)
    for sample in samples:
        for kind, share in share_of_kinds(made, sample.at).items():
            largest[kind] = max(largest[kind], float(share[0]))
    return made.model_copy(update={"kernels": rates(constants, largest)})


def kendall_tau(predicted: Floats, measured: Floats) -> float:
    """How far two orders agree, -1 to 1."""
    from scipy.stats import kendalltau

    return float(kendalltau(predicted, measured).statistic)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
