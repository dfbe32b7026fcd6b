"""Whether widths rounded by the measured staircase make faster networks than multiples of 8 that keep as much: on this machine.

    edgeprune device calibrate host
    python -m benchmarks.cost_staircase

Per network and budget, the knapsack's plan in multiples of 8 at a share of the MACs, and its plan in the multiple that the staircase of
host-ort favours, with the least MACs at which it keeps at least as much importance (L1). Both are exported and measured in turns on a
machine that must be idle. Plans and files are made first and kept. Writes benchmarks/results/cost_staircase.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import RESULTS
from edgeprune.run import write_atomic, write_json

NETWORKS = (("resnet18", 160), ("mobilenetv2_100", 160))
SHARES, USUAL, STEPS, TURNS = (0.75, 0.5, 0.3), 8, 9, 2
SCHEDULE: dict[str, Any] = {"processes": 3, "min_runs": 20, "min_seconds": 0.5, "warmup_runs": 3, "warmup_seconds": 0.1}


def main() -> None:
    """Plans, exports, measures, writes."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--multiple", type=int, help="default: what the staircase of host-ort says")
    folder = Path(tempfile.gettempdir()) / "edgeprune-staircase"
    options.add_argument("--artifacts", type=Path, default=folder, help="where plans and files are kept")
    options.add_argument("--plan-only", action="store_true", help="make the files, measure nothing")
    chosen = options.parse_args()
    multiple = chosen.multiple or favoured()
    rows = []
    for name, side in NETWORKS:
        rows += pairs(name, side, multiple, chosen.artifacts)
    if not chosen.plan_only:
        report([row | measured(row, chosen.artifacts) for row in rows], multiple)


def favoured() -> int:
    """The multiple of the staircase that `edgeprune device calibrate host` measured."""
    from edgeprune.device.card import device

    steps = device("host-ort").constants.staircase
    if steps is None:
        raise SystemExit("host-ort has no staircase: run `edgeprune device calibrate host` before, or give --multiple.")
    return steps.channel_multiple


def pairs(name: str, side: int, multiple: int, folder: Path) -> list[dict[str, Any]]:
    """Two plans per share of the MACs, as ONNX files in `folder`: what they keep, and the files' names."""
    import json

    kept = folder / f"{name}-{side}-{multiple}.json"
    if kept.exists():
        found: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    import torch

    import edgeprune as ep
    from benchmarks.cost_tables import timm_network
    from edgeprune.export import export

    torch.manual_seed(0)
    torch.set_num_threads(1)
    network, example = timm_network(name), torch.zeros(1, 3, side, side)
    graph = ep.trace(network, example)
    scores = ep.score(graph, network, "l1")

    def planned(share: float, round_to: int) -> ep.Plan:
        return ep.allocate(graph, scores, ep.Budget(macs=share), round_to=round_to)

    def value(plan: ep.Plan) -> float:
        parts = [scores.values[g.name][np.array(plan.keep[g.name])].sum() / scores.values[g.name].sum() for g in graph.groups]
        return float(np.mean(parts))

    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for share in SHARES:
        usual = planned(share, USUAL)
        low, high = share, 1.0
        if value(planned(low, multiple)) >= value(usual):
            low, high = 0.7 * share, share
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if value(planned(middle, multiple)) >= value(usual) else (middle, high)
        row: dict[str, Any] = {"network": name, "side": side, "share": share}
        for key, plan in (("usual", usual), ("rounded", planned(high, multiple))):
            path = folder / f"{name}-{side}-{share}-{multiple}-{key}.onnx"
            export(ep.slim(network, graph, plan), example, path)
            share_left = float(graph.macs_at(plan.widths(graph))[0]) / graph.macs
            row[key] = {"file": path.name, "importance": value(plan), "macs_share": share_left}
        rows.append(row)
    write_json(kept, rows)
    return rows


def measured(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Milliseconds of both files, measured in turns: the medians of all processes, and what disturbed them."""
    from edgeprune.device.measure import measure_host

    ms: dict[str, list[float]] = {"usual": [], "rounded": []}
    problems: set[str] = set()
    for _ in range(TURNS):
        for key, found in ms.items():
            m = measure_host(folder / row[key]["file"], **SCHEDULE)
            found.extend(m.process_medians_ms)
            problems.update(m.problems)
    return {"ms": {key: float(np.median(found)) for key, found in ms.items()}, "processes_ms": ms, "problems": sorted(problems)}


def report(rows: Sequence[dict[str, Any]], multiple: int) -> None:
    """Prints, and writes results/cost_staircase.json and .md."""
    lines = [
        f"# Multiples of {multiple}, which the staircase of this machine favours, against multiples of {USUAL}",
        "",
        "Written by `python -m benchmarks.cost_staircase`. Plans of the knapsack; importance: mean share of each group's L1 scores kept.",
        "",
        f"| network | importance kept: {USUAL}, {multiple} | MACs: {USUAL}, {multiple} | measured ms: {USUAL}, {multiple} | faster by |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        kept, macs = ([row[key][figure] for key in ("usual", "rounded")] for figure in ("importance", "macs_share"))
        ms = [row["ms"][key] for key in ("usual", "rounded")]
        figures = f"{kept[0]:.3f}, {kept[1]:.3f} | {macs[0]:.1%}, {macs[1]:.1%} | {ms[0]:.3f}, {ms[1]:.3f} | {1 - ms[1] / ms[0]:+.1%}"
        lines.append(f"| {row['network']} {row['side']} | {figures} |")
    disturbed = [row["network"] for row in rows if row["problems"]]
    lines += ["", f"Measured while other programs ran: {', '.join(disturbed)}." if disturbed else "Nothing disturbed the measurements."]
    print("\n".join(lines))
    write_atomic(RESULTS / "cost_staircase.md", ("\n".join(lines) + "\n").encode())
    write_json(RESULTS / "cost_staircase.json", {"multiple": multiple, "rows": list(rows)})


if __name__ == "__main__":
    main()
