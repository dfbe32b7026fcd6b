"""Fitted at one input size, asked at another: how latency grows with the maps, held against measurements of YOLOv5 at eleven sizes.

    python -m benchmarks.cost_models --sizes

What the issue of the cost models asks is about cells of NAS-Bench-201 on one core of a Raspberry Pi 5, fitted at 32 pixels and asked at
88 (2.75 times the side, 7.6 times the maps); no measurements at 88 are at hand. This is a proxy: other networks, four threads, the
same model and the same ratio of sides (160 to 448 pixels), and the way back. Twice: only the size is held out (all architectures are in
the fit), and the architecture as well (five folds; the fit sees other architectures, at the other size). The interval is that of
`fit_profile` on what the fit sees, widening included. Writes benchmarks/results/cost_sizes.json and .md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.device.cost import interval_factors
from edgeprune.device.fit import Prior, Sample, constants_of, design, fit_profile, folds_of, kendall_tau

RESULTS = Path(__file__).parent / "results"
# Pixels of the side: of the fit, of the question.
YOLO = ((160, (448,)), (160, (320,)), (224, (448,)), (448, (160,)), (320, (160,)))
TIMM = ((224, range(225, 673)),)
FACTS: dict[str, Any] = {"runtime": "", "threads": 1, "precision": "fp32", "clock_mhz": 1.0, "description": ""}
WORDS = {"source": "", "method": "", "held_out": "", "noise": ""}


def study(tables: dict[str, tuple[Sequence[Sample], Prior]]) -> list[dict[str, Any]]:
    """Asks every profile, (samples, prior) each, across every pair of sizes; prints and writes the table."""
    rows = [
        {"profile": name, "fitted_at": seen, "asked_at": _worded(asked), "held_out": held, **across(samples, prior, seen, asked, held=held)}
        for name, (samples, prior) in tables.items()
        for seen, asked in (YOLO if name.startswith("rpi") else TIMM)
        for held in ("size", "size and architecture")
    ]
    text = table(rows)
    print(text)
    (RESULTS / "cost_sizes.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "cost_sizes.md").write_text(text, encoding="utf-8")
    return rows


def _worded(asked: Sequence[int]) -> str:
    return f"{asked[0]}²" + (f" to {asked[-1]}²" if len(asked) > 1 else "")


def across(samples: Sequence[Sample], prior: Prior, seen: int, asked: Sequence[int], *, held: str) -> dict[str, float]:
    """What a fit at `seen` pixels is worth at `asked` pixels; `held`: "size", or "size and architecture"."""
    fitted, questions = ([s for s in samples if side(s) in sides] for sides in ((seen,), asked))
    folds = folds_of(questions) if held != "size" else np.zeros(len(questions), dtype=np.int64)
    ratio, inside = np.zeros(len(questions)), np.zeros(len(questions), dtype=bool)
    for fold in np.unique(folds):
        members = np.flatnonzero(folds == fold)
        out = {questions[n].family for n in members} if held != "size" else set()
        profile = fit_profile([s for s in fitted if s.family not in out], prior, FACTS, WORDS).profile
        x, y = design([questions[n] for n in members], profile.cache_bytes)
        ratio[members] = y / (x @ constants_of(profile))
        bounds = np.array([np.ravel(interval_factors(profile, questions[n].at)) for n in members])
        inside[members] = (bounds[:, 0] <= ratio[members]) & (ratio[members] <= bounds[:, 1])
    return judged(ratio, np.array([s.latency_ms for s in questions]), inside)


def judged(ratio: NDArray[np.float64], measured_ms: NDArray[np.float64], inside: NDArray[np.bool_]) -> dict[str, float]:
    """Figures in percent (tau and bias apart) from measured / predicted; `bias`: its median."""
    error = np.abs(1 / ratio - 1)
    return {
        "networks": len(ratio),
        "within_10": round(100 * float((error <= 0.1).mean()), 1),
        "mape": round(100 * float(error.mean()), 2),
        "kendall_tau": round(kendall_tau(measured_ms / ratio, measured_ms), 3),
        "coverage": round(100 * float(inside.mean()), 1),
        "bias": round(float(np.median(ratio)), 3),
    }


def side(sample: Sample) -> int:
    """Pixels of the side of a row's images, which its name ends with."""
    return int(sample.network.rpartition("_")[2])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Cost models fitted at one input size and asked at another",
        "",
        "YOLOv5 architectures, a proxy for cells asked at 88 pixels when fitted at 32: see benchmarks/cost_sizes.py. `python -m",
        "benchmarks.cost_models --sizes`.",
        "",
        "| profile's table | fitted at | asked at | held out | networks | within ±10 % | MAPE | Kendall tau | coverage of 90 % "
        "| measured / predicted, median |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        figures = (f"{r['within_10']:.0f} %", f"{r['mape']:.1f} %", f"{r['kendall_tau']:.3f}", f"{r['coverage']:.0f} %", f"{r['bias']:.2f}")
        cells = (r["profile"], f"{r['fitted_at']}²", r["asked_at"], r["held_out"], str(r["networks"]), *figures)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
