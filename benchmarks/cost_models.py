"""Refits the constants of devices/*.toml from public measurements and shows what they are worth on unseen networks.

    python -m benchmarks.cost_models            # fits, prints and writes the tables in benchmarks/results
    python -m benchmarks.cost_models --write    # and puts the constants into devices/

The public tables lie where EDGEPRUNE_DATA says (default ../shared/data beside the repository); no row of them is copied here.

A board's table seldom tells kernel kinds apart: in the YOLO rows of the Raspberry Pi 4 every kind grows with every other, so plain
nonnegative least squares makes some constants zero and others triple, fits the rows well and predicts other networks absurdly.
So constants are shrunk: the diverse timm CNNs on the Jetson Nano's CPU (same runtime, similar cores, 4 threads) give the shape, one
speed factor moves it to the board, and the board's rows correct it as far as they know better. Kinds that a board's table has no
row of keep the moved constants, are marked "borrowed", and widen the interval.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import kendalltau

from benchmarks.cost_tables import Layer, Row, nb201_rows, timm_layers, timm_rows, yolo_rows

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
RESULTS, DEVICES = Path(__file__).parent / "results", Path(__file__).parents[1] / "devices"


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


def features(layers: Sequence[Layer]) -> Floats:
    """What each constant multiplies in one network, in the order of COLUMNS; the products are nanoseconds."""
    sums: dict[str, float] = defaultdict(float)
    for kind, macs, reads, writes, weights in layers:
        part = "dense" if kind in DENSE else "depthwise" if kind == "depthwise" else "memory"
        sums[f"mac_ns {kind}"] += macs
        sums[f"byte_ns {part}"] += 4 * (reads + writes)
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


@dataclass(frozen=True)
class Target:
    """A profile to ship: its facts, its rows, and how the fit is described in the card."""

    board: str
    profile: str
    facts: dict[str, Any]
    source: str
    held_out: str
    rows: Sequence[Row]
    shape: Floats
    pull: float


# How strongly constants are drawn to the shape. Held-out errors are flat from 0.0003 to 0.01; stronger is safer outside the table.
BOARD_PULL, DIVERSE_PULL, HOST_PULL = 0.003, 0.01, 0.003
SHAPE_NOTE = "the shape from timm CNNs on the Jetson Nano's CPU (ONNX Runtime, 4 threads)"
METHOD = (
    "nonnegative least squares on relative errors, constants drawn to {shape}, moved by one speed factor; robust reweighting; "
    "interval: split conformal on held-out ratios, 90 %"
)
REFERENCES = (("resnet18", 224), ("resnet50", 224), ("mobilenetv2_100", 224), ("mobilenetv3_small_100", 224))


def main() -> None:
    """Fits, prints, writes."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--write", action="store_true", help="update devices/*.toml with the new constants")
    options.add_argument("--host", action="store_true", help="also measure small networks on this machine and fit host-ort")
    chosen = options.parse_args()

    orders = np.array(list(ORDERS.values()))
    diverse = timm_rows()
    shape = fit(*design(diverse), orders, DIVERSE_PULL)
    figures = [judge("Jetson Nano CPU, ORT, timm CNNs", diverse, orders, DIVERSE_PULL)]
    targets = [rpi4(shape)]
    if chosen.host:
        targets.append(host(orders))
    figures += [judge(t.profile, t.rows, t.shape, t.pull) for t in targets]
    figures += [
        judge("Raspberry Pi 5, ORT, YOLO", yolo_rows("pi5_ort_latency"), shape, BOARD_PULL),
        judge("Raspberry Pi 4, TFLite, YOLO", yolo_rows("raspi4_tflite_latency"), shape, BOARD_PULL),
        judge("Raspberry Pi 5, ORT, one core, 32x32", nb201_rows("onnx", 4), shape, BOARD_PULL),
        judge("Raspberry Pi 5, LiteRT, one core, 32x32", nb201_rows("litert", 4), shape, BOARD_PULL),
    ]
    report(figures, [*transfer(shape), *references(targets[0])])
    if chosen.write:
        for target in targets:
            write(target, next(f for f in figures if f.target == target.profile))


def rpi4(shape: Floats) -> Target:
    """The Raspberry Pi 4 profile, from the YOLO rows."""
    return Target(
        board="rpi4",
        profile="rpi4-ort",
        facts={
            "runtime": "onnxruntime",
            "threads": 4,
            "precision": "fp32",
            "clock_mhz": 1500.0,
            "description": "ONNX Runtime, fp32, 4 threads (not stated in the table; its speed is that of all four cores)",
        },
        source="YOLOBench (Deeplite, Apache-2.0): YOLOv5 variants at 160 to 480 pixels",
        held_out="unseen YOLOv5 architectures, five folds",
        rows=yolo_rows("pi4_ort_latency"),
        shape=shape,
        pull=BOARD_PULL,
    )


def host(shape: Floats) -> Target:
    """This machine, from chains measured now."""
    from benchmarks.cost_host import host_rows

    return Target(
        board="host",
        profile="host-ort",
        facts={
            "runtime": "onnxruntime",
            "threads": 1,
            "precision": "fp32",
            "clock_mhz": 2500.0,
            "description": "ONNX Runtime, fp32, 1 thread; the constants are a first guess that measuring replaces",
        },
        source="chains of one kernel kind measured on the x86-64 machine the tool was developed on: a first guess, yours differs",
        held_out="unseen chains of the same kinds, five folds",
        rows=host_rows(threads=1),
        shape=shape,
        pull=HOST_PULL,
    )


def transfer(shape: Floats) -> list[tuple[str, str]]:
    """How far constants carry: rows of one situation predicted by the fit of another, after one speed factor."""
    yolo = fit(*design(yolo_rows("pi5_ort_latency")), shape, BOARD_PULL)
    cases = (
        ("Jetson Nano timm fit asked for Raspberry Pi 4 YOLO", shape, yolo_rows("pi4_ort_latency")),
        ("Jetson Nano timm fit asked for Raspberry Pi 5 YOLO", shape, yolo_rows("pi5_ort_latency")),
        ("Raspberry Pi 5 YOLO fit (4 threads) asked for NAS-Bench-201 at 32x32 (1 thread)", yolo, nb201_rows("onnx", 4)),
    )
    lines = []
    for name, constants, rows in cases:
        x, y = design(rows)
        ratio = y / (x @ constants)
        ratio /= np.median(ratio)
        low, high = np.quantile(ratio, [0.05, 0.95])
        lines.append((name, f"mean error {100 * np.abs(ratio - 1).mean():.1f} %, measured / predicted {low:.2f} to {high:.2f} (5 to 95 %)"))
    return lines


def references(target: Target) -> list[tuple[str, str]]:
    """What the shipped constants say about well-known networks far from the table."""
    constants = fit(*design(target.rows), target.shape, target.pull)
    known = [(name, layers) for name, side in REFERENCES if (layers := timm_layers(name, side))]
    return [(f"{target.profile}, {name} at 224, extrapolated", f"{features(layers) @ constants / 1e6:.1f} ms") for name, layers in known]


def report(figures: Sequence[Figures], extra: Sequence[tuple[str, str]]) -> None:
    """Prints the table and writes results/cost_models.json and .md."""
    head = (
        "target",
        "rows",
        "families",
        "MAPE",
        "within ±10 %",
        "Kendall tau",
        "coverage of 90 %",
        "MACs only: MAPE",
        "MACs only: within ±10 %",
    )
    cells = [
        (
            *(f.target, f.rows, f.networks, f"{f.mape:.1f} %", f"{f.within_10:.0f} %", f"{f.kendall_tau:.3f}", f"{f.coverage:.0f} %"),
            *(f"{f.macs_only_mape:.1f} %", f"{f.macs_only_within_10:.0f} %"),
        )
        for f in figures
    ]
    lines = [
        "# Cost models on networks they have not seen",
        "",
        "Five folds, whole families held out. Written by `python -m benchmarks.cost_models`.",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(str(cell) for cell in row)} |" for row in cells),
        "",
        "Transfer and extrapolation: what the widening of the intervals is based on.",
        "",
        "| question | answer |",
        "|---|---|",
        *(f"| {question} | {answer} |" for question, answer in extra),
        "",
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cost_models.md").write_text("\n".join(lines), encoding="utf-8")
    facts = {"held_out": [asdict(f) for f in figures], "extra": dict(extra)}
    (RESULTS / "cost_models.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def write(target: Target, figures: Figures) -> None:
    """Replaces the profile in the board's card: everything below the marker is ours, everything above is written by hand."""
    path = DEVICES / f"{target.board}.toml"
    marker = "# Written by benchmarks/cost_models.py --write: do not edit below."
    above = path.read_text(encoding="utf-8").split(marker)[0]
    constants = dict(zip(COLUMNS, fit(*design(target.rows), target.shape, target.pull), strict=True))
    seen = {layer.kind for row in target.rows for layer in row.layers}
    macs, latencies = [row.macs for row in target.rows if row.macs], [row.latency_ms for row in target.rows]
    method = METHOD.format(shape="orders of magnitude" if target.board == "host" else SHAPE_NOTE)
    fitted = {
        "source": target.source,
        "method": method,
        "held_out": target.held_out,
        **{k: v for k, v in asdict(figures).items() if k in _FIT_KEYS},
        "macs": [min(macs), max(macs)],
        "latency_ms": [round(min(latencies), 4), round(max(latencies), 2)],
    }
    name = f"profiles.{target.profile}"
    lines = [marker, "", *_table(name, {**target.facts, "network_us": _short(constants["network_us"])}), *_table(f"{name}.fit", fitted)]
    for kind in KINDS:
        part = "dense" if kind in DENSE else "depthwise" if kind == "depthwise" else "memory"
        rate = {
            "mac_ns": _short(constants.get(f"mac_ns {kind}", 0.0)),
            "byte_ns": _short(constants[f"byte_ns {part}"]),
            "weight_byte_ns": _short(constants["weight_byte_ns"]),
            "call_us": _short(constants["call_us"]),
            # Kernels that only move memory share their constants: seeing one of them is seeing all.
            "basis": "fitted" if kind in seen or (part == "memory" and "elementwise" in seen) else "borrowed",
        }
        lines += _table(f"{name}.kernels.{kind}", rate)
    path.write_text(above + "\n".join(lines), encoding="utf-8")


_FIT_KEYS = ("rows", "networks", "mape", "within_10", "kendall_tau", "coverage", "low_factor", "high_factor")


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _table(name: str, values: dict[str, Any]) -> list[str]:
    # JSON's strings, numbers and flat lists are TOML's too.
    return [f"[{name}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()), ""]


if __name__ == "__main__":
    main()
