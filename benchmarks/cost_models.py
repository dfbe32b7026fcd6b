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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cost_fit import ORDERS, Figures, Floats, design, features, fit, judge, rates, seen_shares
from benchmarks.cost_tables import Layer, Row, nb201_rows, timm_layers, timm_rows, yolo_rows
from edgeprune.device.card import Card, Device
from edgeprune.device.cost import CostModel
from edgeprune.device.kernels import KernelsAt

RESULTS, DEVICES = Path(__file__).parent / "results", Path(__file__).parents[1] / "devices"


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
    shape_note: str
    pull: float


# How strongly constants are drawn to the shape. Held-out errors are flat from 0.0003 to 0.01; stronger is safer outside the table.
ENOUGH = 12  # networks of a family for a fit of its own
BOARD_PULL, DIVERSE_PULL, HOST_PULL = 0.003, 0.01, 0.003
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
    report(figures, [*transfer(shape), *one_family(diverse, orders), *references(targets[0])])
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
        shape_note="the shape from timm CNNs on the Jetson Nano's CPU (ONNX Runtime, 4 threads)",
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
            "description": "ONNX Runtime, fp32, 1 thread",
        },
        source="chains of one kernel kind measured on the x86-64 machine the tool was developed on: a first guess, yours differs",
        held_out="unseen chains of the same kinds, five folds",
        rows=host_rows(threads=1),
        shape=shape,
        shape_note="orders of magnitude",
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


def one_family(rows: Sequence[Row], shape: Floats) -> list[tuple[str, str]]:
    """How often the widened interval of a fit to one family holds networks of all the others: the situation of rpi4-ort.

    That profile has seen YOLO only, so its interval must be honest about networks unlike those; the Nano's table can tell.
    """
    lines = []
    families = {row.family for row in rows}
    for family in sorted(f for f in families if sum(row.family == f for row in rows) >= ENOUGH):
        inside = [row for row in rows if row.family == family]
        others = [row for row in rows if row.family != family]
        measured = np.array([row.latency_ms for row in others])
        figures = judge(family, [Row(r.network, r.network, r.latency_ms, r.layers) for r in inside], shape, DIVERSE_PULL)
        facts = {"runtime": "onnxruntime", "threads": 4, "precision": "fp32", "clock_mhz": 1430.0, "description": "one family"}
        made = profile(Target("nano", "nano-x", facts, "one family", "networks", inside, shape, "orders", DIVERSE_PULL), figures)
        model = CostModel(_nano(made))
        bounds = np.array([np.ravel(model.interval_ms(kernels_at(row.layers))) for row in others])
        plain = np.array([float(model.total_ms(kernels_at(row.layers))[0]) for row in others])
        held = np.mean((measured >= bounds[:, 0]) & (measured <= bounds[:, 1]))
        bare = np.mean((measured >= plain * figures.low_factor) & (measured <= plain * figures.high_factor))
        answer = f"the 90 % interval holds {100 * held:.0f} % of them, {100 * bare:.0f} % without widening"
        lines.append((f"Jetson Nano, fitted to {family} only ({len(inside)} networks), asked for all other families", answer))
    return lines


def _nano(made: dict[str, Any]) -> Device:
    board = {
        "description": "Jetson Nano",
        "soc": "Tegra X1",
        "cores": 4,
        "clock_mhz": 1430.0,
        "memory_bytes": 2**32,
        "threads": 4,
        "runtimes": ["onnxruntime"],
        "channel_multiple": 8,
        "sensors": [],
        "sources": [],
        "default_profile": "nano-x",
    }
    return Device("nano", "nano-x", Card.model_validate({"board": board, "profiles": {"nano-x": made}}))


def kernels_at(layers: Sequence[Layer]) -> KernelsAt:
    """A row's kernels as the cost model takes them."""
    kinds, *columns = zip(*layers, strict=True)
    return KernelsAt(kinds, kinds, *(np.array([column], dtype=np.float64) for column in columns))


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
    marker = "# Written by `python -m benchmarks.cost_models --write`: do not edit below."
    above = path.read_text(encoding="utf-8").split(marker[:12])[0]
    made = profile(target, figures)
    kernels = made.pop("kernels")
    name = f"profiles.{target.profile}"
    lines = [marker, "", *_table(name, {k: v for k, v in made.items() if k != "fit"}), *_table(f"{name}.fit", made["fit"])]
    for kind, rate in kernels.items():
        lines += _table(f"{name}.kernels.{kind}", rate)
    path.write_text(above + "\n".join(lines), encoding="utf-8")


def profile(target: Target, figures: Figures) -> dict[str, Any]:
    """The fitted profile as the card's schema wants it."""
    constants = fit(*design(target.rows), target.shape, target.pull)
    shares = seen_shares(target.rows, constants)
    macs, latencies = [row.macs for row in target.rows if row.macs], [row.latency_ms for row in target.rows]
    return {
        **target.facts,
        "network_us": _short(constants[-1]),
        "fit": {
            "source": target.source,
            "method": METHOD.format(shape=target.shape_note),
            "held_out": target.held_out,
            **{key: value for key, value in asdict(figures).items() if key in _FIT_KEYS},
            "macs": [min(macs), max(macs)],
            "latency_ms": [_short(min(latencies)), _short(max(latencies))],
        },
        "kernels": {
            kind: {**{name: _short(value) for name, value in rate.items()}, "seen_share": round(min(shares[kind], 1.0), 3)}
            for kind, rate in rates(constants).items()
        },
    }


_FIT_KEYS = ("rows", "networks", "mape", "within_10", "kendall_tau", "coverage", "low_factor", "high_factor")


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _table(name: str, values: dict[str, Any]) -> list[str]:
    # JSON's strings, numbers and flat lists are TOML's too.
    return [f"[{name}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()), ""]


if __name__ == "__main__":
    main()
