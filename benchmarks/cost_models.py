"""Refits the profiles of devices/*.toml from public measurements and shows what they are worth on unseen networks.

    python -m benchmarks.cost_models            # fits, prints and writes the tables in benchmarks/results
    python -m benchmarks.cost_models --write    # and puts the constants into devices/
    python -m benchmarks.cost_models --sizes    # only: fitted at one input size, asked at another (cost_sizes.py)

The public tables lie where EDGEPRUNE_DATA says (default ../shared/data beside the repository); no row of them is copied here.
The priors are what a four-core board of that kind does per MAC, byte and call, to orders of magnitude: edgeprune/device/fit.py says
what they are for. The Raspberry Pi profiles of ONNX Runtime take theirs from the fit to the diverse timm CNNs on the Jetson Nano's
CPU (same runtime, similar cores), so that kinds which their own tables lack have measured ratios.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cost_sizes import study
from benchmarks.cost_tables import nb201_energies, nb201_rows, timm_rows, yolo_rows
from edgeprune.device.card import Profile, device
from edgeprune.device.cost import interval_factors
from edgeprune.device.fit import (
    COLUMNS,
    FOLDS,
    Fitted,
    Floats,
    Prior,
    Sample,
    constants_of,
    design,
    fit,
    fit_profile,
    folds_of,
    refine,
    shape_of,
)
from edgeprune.device.store import write_profiles

RESULTS, DEVICES = Path(__file__).parent / "results", Path(__file__).parents[1] / "devices"
METHOD = (
    "nonnegative least squares on relative errors, constants drawn to {shape}, moved by one speed factor; robust reweighting; "
    "interval: split conformal on held-out ratios, 90 %, each family with the same weight"
)

_PLAIN = {f"byte_ns {kind}": 0.3 for kind in ("elementwise", "scale", "cat", "resize", "pad", "norm", "other")}
# Four Cortex-A cores, ONNX Runtime: about 8 MACs and 2 bytes a nanosecond.
CPU = {
    "mac_ns conv1x1": 0.12,
    "mac_ns conv3x3": 0.12,
    "mac_ns conv_other": 0.12,
    "mac_ns grouped": 0.13,
    "mac_ns linear": 0.3,
    "mac_ns depthwise": 1.0,
    "mac_ns depthwise_large": 1.5,
    "byte_ns dense": 0.5,
    "byte_ns depthwise": 0.4,
    "byte_ns activation": 0.8,
    "byte_ns pool": 1.0,
    "byte_ns global_pool": 0.5,
    **_PLAIN,
    "weight_byte_ns": 0.4,
    "patch_byte_ns": 0.05,
    "far_byte_ns": 0.3,
    "far_weight_byte_ns": 0.9,
    "group_us": 5.0,
    "call_us": 10.0,
    "network_us": 500.0,
}
# The same with LiteRT's XNNPACK, whose depthwise kernels and calls are cheaper.
LITERT = {**CPU, "mac_ns depthwise": 0.5, "mac_ns depthwise_large": 0.5, "byte_ns pool": 0.5, "call_us": 3.0, "network_us": 100.0}
# One Cortex-A76, caches warm: calls of a microsecond, bytes at 20 to 40 GB/s, a little less beyond the 512 KB of its own cache.
CORE = {
    **{name: 0.09 for name in COLUMNS if name.startswith("mac_ns")},
    "mac_ns depthwise": 0.6,
    "mac_ns depthwise_large": 0.6,
    "byte_ns dense": 0.06,
    "byte_ns depthwise": 0.06,
    "byte_ns activation": 0.3,
    "byte_ns pool": 0.5,
    "byte_ns global_pool": 0.2,
    **dict.fromkeys(_PLAIN, 0.06),
    "weight_byte_ns": 0.1,
    "patch_byte_ns": 0.01,
    "far_byte_ns": 0.02,
    "far_weight_byte_ns": 0.06,
    "group_us": 1.0,
    "call_us": 1.0,
    "network_us": 20.0,
}
# 128 CUDA cores: cuDNN gathers no patches, runs grouped convolutions group by group, and every launch costs.
GPU = {
    "mac_ns conv1x1": 0.012,
    "mac_ns conv3x3": 0.009,
    "mac_ns conv_other": 0.012,
    "mac_ns grouped": 0.012,
    "mac_ns linear": 0.02,
    "mac_ns depthwise": 0.2,
    "mac_ns depthwise_large": 0.2,
    "byte_ns dense": 0.1,
    "byte_ns depthwise": 0.1,
    "byte_ns activation": 0.1,
    "byte_ns pool": 0.1,
    "byte_ns global_pool": 0.1,
    **dict.fromkeys(_PLAIN, 0.1),
    "byte_ns pad": 2.0,
    "byte_ns scale": 0.3,
    "byte_ns other": 0.3,
    "weight_byte_ns": 0.2,
    "group_us": 60.0,
    "call_us": 60.0,
    "network_us": 500.0,
}
L2 = float(2**20)


@dataclass(frozen=True)
class Target:
    """A profile to ship: what it says of itself, its samples and its prior."""

    board: str
    profile: str
    facts: dict[str, Any]
    source: str
    held_out: str
    samples: Sequence[Sample]
    prior: Prior
    shape_note: str = "orders of magnitude"
    power: dict[str, Any] | None = field(default=None)

    def fitted(self) -> Fitted:
        """The profile and its held-out figures."""
        words = {"source": self.source, "method": METHOD.format(shape=self.shape_note), "held_out": self.held_out}
        facts = {"precision": "fp32", **self.facts, **({"power": self.power} if self.power else {})}
        return fit_profile(self.samples, self.prior, facts, {**words, "noise": noise(self.samples)})


def main() -> None:
    """Fits, prints, writes."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--write", action="store_true", help="update devices/*.toml with the new constants")
    options.add_argument("--sizes", action="store_true", help="only the study of input sizes")
    chosen = options.parse_args()
    targets = all_targets()
    if chosen.sizes:
        study({t.profile: (t.samples, t.prior) for t in targets if t.held_out != _UNSEEN_CELLS})
        return
    fits = {t.profile: t.fitted() for t in targets}
    by_name = {t.profile: t for t in targets}
    report(targets, fits, [*adapted(by_name, fits), *one_family(by_name["jetson-nano-cpu-ort"])])
    if chosen.write:
        for board in dict.fromkeys(t.board for t in targets):
            made = {t.profile: fits[t.profile].profile for t in targets if t.board == board}
            write_profiles(DEVICES / f"{board}.toml", with_known_memory(board, made), "python -m benchmarks.cost_models --write")


def with_known_memory(board: str, profiles: Mapping[str, Profile]) -> dict[str, Profile]:
    """The profiles with the constants for memory that the board's card has: benchmarks.cost_memory measures those."""
    known = device(DEVICES / f"{board}.toml").card.profiles
    return {name: p.model_copy(update={"memory": known[name].memory if name in known else None}) for name, p in profiles.items()}


def all_targets() -> list[Target]:
    """Every profile that the public tables allow."""
    nano = nano_cpu()
    measured = dict(zip(COLUMNS, fit(*design(nano.samples, nano.prior.cache_bytes), shape_of(nano.prior), nano.prior.pull), strict=True))
    return [*raspberry_pi_4(measured), *raspberry_pi_5(measured), nano, nano_gpu()]


_YOLO = "YOLOBench (Deeplite, Apache-2.0): YOLOv5 variants at 160 to 480 pixels"
_NB201 = "HW-NAS-Bench-360: NAS-Bench-201 cells at 32x32 pixels, one pinned core, median of 40 runs"
_TIMM = "CLSBench (Deeplite, Apache-2.0): CNNs of timm at their own resolutions"
_UNSEEN_YOLO, _UNSEEN_CELLS = "unseen YOLOv5 architectures, five folds", "unseen cells, five folds"
_LIKE_NANO = "the shape from timm CNNs on the Jetson Nano's CPU (ONNX Runtime, 4 threads)"


def raspberry_pi_4(nano: dict[str, float]) -> list[Target]:
    """Four threads; the tables state none, but no single core is that fast."""
    stated = "fp32, 4 threads (its source does not say how many; the speed is that of four)"
    ort = {"runtime": "onnxruntime", "threads": 4, "clock_mhz": 1500.0, "description": f"ONNX Runtime, {stated}"}
    litert = {"runtime": "litert", "threads": 4, "clock_mhz": 1500.0, "description": f"TFLite (LiteRT) with XNNPACK, {stated}"}
    rows, tflite = yolo_rows("pi4_ort_latency"), yolo_rows("raspi4_tflite_latency")
    return [
        Target("rpi4", "rpi4-ort", ort, _YOLO, _UNSEEN_YOLO, rows, Prior(nano, 0.001, L2), _LIKE_NANO),
        Target("rpi4", "rpi4-litert", litert, _YOLO, _UNSEEN_YOLO, tflite, Prior(LITERT, 0.003, L2)),
    ]


def raspberry_pi_5(nano: dict[str, float]) -> list[Target]:
    """Four threads from the YOLO table, one pinned core from NAS-Bench-201."""
    four = "ONNX Runtime, fp32, 4 threads (its source does not say how many; the speed is that of four)"
    ort = {"runtime": "onnxruntime", "threads": 4, "clock_mhz": 2400.0, "description": four}
    one = {"runtime": "onnxruntime", "threads": 1, "clock_mhz": 2400.0, "description": "ONNX Runtime, fp32, 1 pinned core"}
    litert = {"runtime": "litert", "threads": 1, "clock_mhz": 2400.0, "description": "LiteRT with XNNPACK, fp32, 1 pinned core"}
    cells, lite, core = nb201_rows("onnx"), nb201_rows("litert"), Prior(CORE, 0.001, L2 / 2)
    yolo = yolo_rows("pi5_ort_latency")
    return [
        Target("rpi5", "rpi5-ort", ort, _YOLO, _UNSEEN_YOLO, yolo, Prior(nano, 0.001, L2), _LIKE_NANO),
        Target("rpi5", "rpi5-ort-1t", one, _NB201, _UNSEEN_CELLS, cells, core, power=core_power("onnx", cells)),
        Target("rpi5", "rpi5-litert", litert, _NB201, _UNSEEN_CELLS, lite, core, power=core_power("litert", lite)),
    ]


def nano_cpu() -> Target:
    """Four Cortex-A57 cores."""
    facts = {"runtime": "onnxruntime", "threads": 4, "clock_mhz": 1430.0, "description": "CPU, ONNX Runtime, fp32, 4 threads"}
    held_out = "unseen timm families, five folds"
    return Target("jetson-nano", "jetson-nano-cpu-ort", facts, _TIMM, held_out, timm_rows("CPU"), Prior(CPU, 0.01))


def nano_gpu() -> Target:
    """128 Maxwell cores."""
    facts = {"runtime": "onnxruntime-gpu", "threads": 1, "clock_mhz": 921.6, "description": "GPU (CUDA), ONNX Runtime, fp32"}
    held_out = "unseen timm families, five folds"
    return Target("jetson-nano", "jetson-nano-gpu-ort", facts, _TIMM, held_out, timm_rows("GPU"), Prior(GPU, 0.01))


def core_power(framework: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Mean power above idle of the core rail, with the error of power times measured latency on cells that did not set it."""
    energy, latency = nb201_energies(framework), np.array([s.latency_ms for s in samples])
    folds, predicted = folds_of(samples), np.zeros(len(latency))
    for fold in range(FOLDS):
        predicted[folds == fold] = latency[folds == fold] * np.median((energy / latency)[folds != fold])
    error = np.abs(predicted / energy - 1)
    held = f"{len(energy)} cells on the core rail: power times measured latency is {100 * error.mean():.1f} % off on unseen ones"
    return {
        "active_mw": round(1e3 * float(np.median(energy / latency)), 1),
        "idle_mw": 755.0,
        "uncertainty": round(float(np.quantile(error, 0.9)), 3),
        "source": "VDD_CORE rail only, one busy core, 0.755 W idle at the performance governor, HW-NAS-Bench-360; the board draws more",
        "validated": f"{held}, {100 * (error <= 0.1).mean():.0f} % within ±10 %",
    }


def noise(samples: Sequence[Sample]) -> str:
    """How far measurements of networks with the same kernels lie apart: no model of kernels can do better."""
    same: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for s in samples:
        rows = np.stack([s.at.macs[0], s.at.input_elements[0], s.at.output_elements[0], s.at.weight_elements[0]], axis=1)
        same[tuple(sorted((kind, *map(float, row)) for kind, row in zip(s.at.kinds, rows, strict=True)))].append(s.latency_ms)
    apart = np.array([abs(ms / np.median(group) - 1) for group in same.values() if len(group) > 1 for ms in group])
    if not len(apart):
        return "no two rows have the same kernels"
    away, within = 100 * apart.mean(), 100 * (apart <= 0.1).mean()
    return f"{len(apart)} rows share their kernels with another: {away:.1f} % from their median, {within:.0f} % within ±10 %"


def adapted(targets: dict[str, Target], fits: dict[str, Fitted]) -> list[tuple[str, str]]:
    """What 3 and 10 anchors make of a profile of another board, runtime or thread count: error on the networks that are no anchors."""
    cases = (
        ("jetson-nano-cpu-ort", "rpi5-ort"),
        ("rpi4-ort", "rpi5-ort"),
        ("rpi5-ort", "rpi4-litert"),
        ("rpi5-ort", "rpi5-litert"),
        ("rpi4-ort", "jetson-nano-cpu-ort"),
    )
    lines = []
    for source, asked in cases:
        samples, profile, random = targets[asked].samples, fits[source].profile, np.random.default_rng(0)
        x, y = design(samples, profile.cache_bytes)
        errors: dict[int, list[float]] = {0: [], 3: [], 10: []}
        for _ in range(20):
            order = random.permutation(len(samples))
            for count, found in errors.items():
                rest = order[10:]
                made = refine(profile, [samples[i] for i in order[:count]])[0] if count else profile
                found.append(float(np.abs(_predicted(made, x[rest]) / y[rest] - 1).mean()))
        shown = ", ".join(f"{count} anchors {100 * np.mean(found):.1f} %" for count, found in errors.items())
        lines.append((f"{source} asked for the networks of {asked}: mean error, 20 random draws of anchors", shown))
    return lines


def _predicted(profile: Profile, x: Floats) -> Floats:
    return np.asarray(x @ constants_of(profile))


ENOUGH = 12  # networks of a family for a fit of its own


def one_family(target: Target) -> list[tuple[str, str]]:
    """How often the widened interval of a fit to one family holds networks of all the others: the situation of the YOLO profiles."""
    lines = []
    families = {s.family for s in target.samples}
    for family in sorted(f for f in families if sum(s.family == f for s in target.samples) >= ENOUGH):
        inside = [Sample(s.network, s.network, s.latency_ms, s.at) for s in target.samples if s.family == family]
        others = [s for s in target.samples if s.family != family]
        words = {"source": "", "method": "", "held_out": "", "noise": ""}
        made = fit_profile(inside, target.prior, {"precision": "fp32", **target.facts}, words).profile
        x, _ = design(others, made.cache_bytes)
        ratio = np.array([s.latency_ms for s in others]) / (_predicted(made, x) / 1e6)
        bounds = np.array([np.ravel(interval_factors(made, s.at)) for s in others])
        held = np.mean((ratio >= bounds[:, 0]) & (ratio <= bounds[:, 1]))
        bare = np.mean((ratio >= made.fit.low_factor) & (ratio <= made.fit.high_factor))
        answer = f"the 90 % interval holds {100 * held:.0f} % of them, {100 * bare:.0f} % without widening"
        lines.append((f"{target.profile}, fitted to {family} only ({len(inside)} networks), asked for all other families", answer))
    return lines


def macs_only(samples: Sequence[Sample]) -> tuple[float, float]:
    """(MAPE, share within ±10 %) in percent of milliseconds per MAC alone, on the same folds."""
    macs, measured = np.array([s.at.macs.sum() for s in samples]), np.array([s.latency_ms for s in samples])
    folds, predicted = folds_of(samples), np.zeros(len(samples))
    for fold in range(FOLDS):
        predicted[folds == fold] = macs[folds == fold] * np.median((measured / np.maximum(macs, 1))[folds != fold])
    error = np.abs(predicted / measured - 1)
    return 100 * float(error.mean()), 100 * float((error <= 0.1).mean())


def report(targets: Sequence[Target], fits: dict[str, Fitted], extra: Sequence[tuple[str, str]]) -> None:
    """Prints the tables and writes results/cost_models.json and .md."""
    judged = ("MAPE", "within ±10 %", "Kendall tau", "coverage of 90 %", "MACs only: MAPE, within ±10 %")
    head = ("profile", "rows", "families", *judged, "noise floor", "held out")
    cells: list[tuple[str, ...]] = []
    facts: dict[str, Any] = {}
    for target in targets:
        f, (mape, within) = fits[target.profile].profile.fit, macs_only(target.samples)
        figures = (f"{f.mape:.1f} %", f"{f.within_10:.0f} %", f"{f.kendall_tau:.3f}", f"{f.coverage:.0f} %")
        cells.append((target.profile, str(f.rows), str(f.networks), *figures, f"{mape:.1f} %, {within:.0f} %", f.noise, f.held_out))
        facts[target.profile] = f.model_dump(mode="json") | {"macs_only_mape": round(mape, 2), "macs_only_within_10": round(within, 1)}
    lines = [
        "# Cost models on networks they have not seen",
        "",
        "Five folds, whole families held out. Written by `python -m benchmarks.cost_models`.",
        "",
        *(_row(head), "|" + "---|" * len(head), *(_row(row) for row in cells)),
        "",
        "Other boards and other networks: what a few anchors repair, and whether the intervals stay honest.",
        "",
        *("| question | answer |", "|---|---|", *(f"| {question} | {answer} |" for question, answer in extra)),
        "",
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cost_models.md").write_text("\n".join(lines), encoding="utf-8")
    (RESULTS / "cost_models.json").write_text(json.dumps({"held_out": facts, "extra": dict(extra)}, indent=1) + "\n", encoding="utf-8")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
