"""Fits the constants of a cost model to rows of measured networks, and judges fits on families they have not seen."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import kendalltau

from benchmarks.cost_tables import Layer, Row

Floats = NDArray[np.float64]

MAC_KINDS = ("conv1x1", "conv3x3", "conv_other", "depthwise", "grouped", "linear")
DENSE = ("conv1x1", "conv3x3", "conv_other", "grouped", "linear")
KINDS = (*MAC_KINDS, "elementwise", "pool", "cat", "resize", "norm", "other")
COLUMNS = (
    *(f"mac_ns {kind}" for kind in MAC_KINDS),
    "byte_ns dense",
    "byte_ns depthwise",
    "byte_ns memory",
    "weight_byte_ns",
    "call_us",
    "network_us",
)
# Orders of magnitude for a four-core Cortex-A at 1.5 GHz: where even the diverse table cannot tell (per-call cost), they decide.
ORDERS = dict(zip(COLUMNS, (0.12, 0.12, 0.12, 1.5, 0.15, 0.12, 0.5, 0.5, 0.5, 0.3, 10.0, 500.0), strict=True))
FOLDS, NOMINAL = 5, 0.90


@dataclass(frozen=True)
class Figures:
    """What a fit is worth on families it has not seen. Percentages, except the factors, tau and the ranges."""

    target: str
    rows: int
    networks: int
    mape: float
    within_10: float
    kendall_tau: float
    coverage: float
    low_factor: float
    high_factor: float
    macs_only_mape: float
    macs_only_within_10: float


def memory_part(kind: str) -> str:
    """Which cost per activation byte a kernel kind has: kinds share them where no table tells them apart."""
    return "dense" if kind in DENSE else "depthwise" if kind == "depthwise" else "memory"


def rates(constants: Floats) -> dict[str, dict[str, float]]:
    """The constants as a device card holds them: mac_ns, byte_ns, weight_byte_ns and call_us of every kernel kind."""
    named = dict(zip(COLUMNS, constants.tolist(), strict=True))
    return {
        kind: {
            "mac_ns": named.get(f"mac_ns {kind}", 0.0),
            "byte_ns": named[f"byte_ns {memory_part(kind)}"],
            "weight_byte_ns": named["weight_byte_ns"],
            "call_us": named["call_us"],
        }
        for kind in KINDS
    }


def seen_shares(rows: Sequence[Row], constants: Floats) -> dict[str, float]:
    """Largest share of a row's fitted time that each kernel kind takes; the kinds without MACs count as one."""
    largest: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for row in rows:
        total = float(features(row.layers) @ constants)
        parts: dict[str, float] = defaultdict(float)
        for layer in row.layers:
            # Without the constant of the whole network, which belongs to no kernel.
            parts[layer.kind if layer.kind in MAC_KINDS else "elementwise"] += float(features([layer])[:-1] @ constants[:-1])
        for kind, part in parts.items():
            largest[kind] = max(largest[kind], part / total)
    return {kind: largest[kind if kind in MAC_KINDS else "elementwise"] for kind in KINDS}


def features(layers: Sequence[Layer]) -> Floats:
    """What each constant multiplies in one network, in the order of COLUMNS; the products are nanoseconds."""
    sums: dict[str, float] = defaultdict(float)
    for kind, macs, reads, writes, weights in layers:
        sums[f"mac_ns {kind}"] += macs
        sums[f"byte_ns {memory_part(kind)}"] += 4 * (reads + writes)
        sums["weight_byte_ns"] += 4 * weights
        sums["call_us"] += 1e3
    return np.array([*(sums[column] for column in COLUMNS[:-1]), 1e3])


def design(rows: Sequence[Row]) -> tuple[Floats, Floats]:
    """(features (rows, columns), measured nanoseconds (rows,))."""
    return np.stack([features(row.layers) for row in rows]), np.array([row.latency_ms * 1e6 for row in rows])


def fit(x: Floats, y_ns: Floats, shape: Floats, pull: float) -> Floats:
    """Nonnegative constants with small relative errors, drawn towards `shape` times one fitted speed factor.

    Minimises sum (relative error)^2 + pull * rows * mean over columns (constant / (speed * shape) - 1)^2, rows reweighted twice
    against outliers. A column the rows do not contain stays at speed * shape.
    """
    relative = x / y_ns[:, None]
    speed = 1 / np.median(relative @ shape)
    target = shape * speed
    scaled = relative * target
    anchor = math.sqrt(pull * len(y_ns) / len(shape)) * np.eye(len(shape))
    weight = np.ones(len(y_ns))
    factors = np.ones(len(shape))
    for _ in range(3):
        factors = nnls(np.vstack([scaled * weight[:, None], anchor]), np.concatenate([weight, anchor.sum(axis=1)]))[0]
        weight = 1 / np.sqrt(np.maximum(np.abs(scaled @ factors - 1) / 0.05, 1.0))
    return np.asarray(factors * target)


def held_out(rows: Sequence[Row], shape: Floats, pull: float) -> tuple[Floats, NDArray[np.int64]]:
    """(predicted ns of every row by a fit without its family, fold of every row): five folds, whole families."""
    x, y = design(rows)
    families = sorted({row.family for row in rows}, key=lambda family: (-sum(r.family == family for r in rows), family))
    # Large families first, each to the smallest fold: folds of similar size.
    sizes, assigned = [0] * FOLDS, {}
    for family in families:
        assigned[family] = int(np.argmin(sizes))
        sizes[assigned[family]] += sum(row.family == family for row in rows)
    folds = np.array([assigned[row.family] for row in rows])
    predicted = np.zeros(len(y))
    for fold in range(FOLDS):
        predicted[folds == fold] = x[folds == fold] @ fit(x[folds != fold], y[folds != fold], shape, pull)
    return predicted, folds


def conformal(ratios: Floats) -> tuple[float, float]:
    """Factors (low, high) that hold measured / predicted with NOMINAL probability, each side with its finite-sample correction."""
    ordered, n = np.sort(ratios), len(ratios)
    cut = max(math.floor((n + 1) * (1 - NOMINAL) / 2), 1)
    return min(float(ordered[cut - 1]), 1.0), max(float(ordered[n - cut]), 1.0)


def judge(target: str, rows: Sequence[Row], shape: Floats, pull: float) -> Figures:
    """The held-out figures of a fit. Coverage is of each fold by the interval of the other folds' residuals."""
    predicted, folds = held_out(rows, shape, pull)
    measured = np.array([row.latency_ms * 1e6 for row in rows])
    ratios, errors = measured / predicted, np.abs(predicted / measured - 1)
    covered = []
    for fold in range(FOLDS):
        low, high = conformal(ratios[folds != fold])
        covered.extend((ratios[folds == fold] >= low) & (ratios[folds == fold] <= high))
    macs = np.array([row.macs for row in rows])
    baseline = np.zeros(len(rows))
    for fold in range(FOLDS):
        seen = folds != fold
        baseline[~seen] = macs[~seen] * np.median(measured[seen] / macs[seen])
    plain = np.abs(baseline / measured - 1)
    low, high = conformal(ratios)
    return Figures(
        target=target,
        rows=len(rows),
        networks=len({row.family for row in rows}),
        mape=round(100 * float(errors.mean()), 2),
        within_10=round(100 * float((errors <= 0.1).mean()), 1),
        kendall_tau=round(float(kendalltau(predicted, measured).statistic), 3),
        coverage=round(100 * float(np.mean(covered)), 1),
        low_factor=round(low, 4),
        high_factor=round(high, 4),
        macs_only_mape=round(100 * float(plain.mean()), 2),
        macs_only_within_10=round(100 * float((plain <= 0.1).mean()), 1),
    )
