"""Why does Discriminant Information rank inner channels badly, and what would mend it? ResNet-56 on CIFAR-10 at -50% MACs.

    python -m benchmarks.di_study      # goes on where it was; half an hour of one core

Three measurements. (1) What removing one channel really does: the squared change of the logits, channel by channel, for one layer of
each stage, and how the criteria's ranks agree with it (Spearman). (2) How much of the labels' energy the pooled features of a layer
explain, by stage. (3) Accuracy after BN recalibration and after reconstruction of each variant: pooled or whole maps, labels or the
dense network's outputs as targets, wide or narrow ridge, ranked with and without cost. All on training images, as in
benchmarks/criteria.py: they compare, they predict no test accuracy. Writes benchmarks/results/di_study.json and .md, row by row; rows of a
criterion whose file has changed are measured again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import edgeprune as ep
from benchmarks.accuracy import RESULTS
from benchmarks.criteria import ALLOCATIONS, Bench, Sizes, code_of, load
from edgeprune.plan import Scores
from edgeprune.run import write_atomic

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "l1": ("l1", {}),
    "reconstruction": ("reconstruction", {}),
    "di pooled (default: rho 1)": ("di", {}),
    "di pooled, rho 0.001": ("di", {"rho": 1e-3}),
    "di pooled, greedy": ("di", {"order": "greedy"}),
    "di pooled, outputs as targets": ("di", {"targets": "outputs"}),
    "di on whole maps": ("di", {"mode": "maps"}),
    "di on whole maps, outputs as targets": ("di", {"mode": "maps", "targets": "outputs"}),
}
LAYERS = ("layer1.4.conv1", "layer2.4.conv1", "layer3.4.conv1")
REMOVED_ON = 192  # images


def real_changes(bench: Bench) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """For each of LAYERS, the mean squared change of the logits when one channel goes, (channels,)."""
    images = torch.cat([x for x, _ in bench.scoring])[:REMOVED_ON]
    modules = dict(bench.dense.named_modules())
    found = {}
    with torch.no_grad():
        logits = bench.dense(images)
        for name in LAYERS:
            norm = modules[name.replace("conv", "bn")]
            changes = []
            for channel in range(norm.num_features):
                gone = torch.tensor([channel])
                handle = norm.register_forward_hook(lambda _m, _i, out, gone=gone: out.index_fill(1, gone, -1.0))  # the ReLU makes it 0
                changes.append(float((bench.dense(images) - logits).square().mean()))
                handle.remove()
            found[name] = np.array(changes)
    return found


def explained(bench: Bench, scores: Scores) -> dict[str, float]:
    """Mean share of the targets' energy that a layer's pooled features explain, by stage."""
    by_stage: dict[str, list[float]] = {}
    for key, share in scores.facts.get("explained", {}).items():
        if key.startswith("layer"):
            by_stage.setdefault(key.partition(".")[0], []).append(float(share))
    return {stage: round(float(np.mean(shares)), 3) for stage, shares in by_stage.items()}


def measure(bench: Bench, name: str, truth: dict[str, Any]) -> dict[str, Any]:
    """One variant: agreement with real removals, explained energy, accuracies."""
    criterion, options = VARIANTS[name]
    scores = ep.score(bench.graph, bench.dense, criterion, data=bench.scoring, **options)
    row: dict[str, Any] = {
        "variant": name,
        "code": code_of(criterion),
        "agreement": {layer: round(float(spearmanr(scores.values[layer], change).statistic), 2) for layer, change in truth.items()},
        "explained": explained(bench, scores),
    }
    for word, (method, rest) in ALLOCATIONS.items():
        plan = ep.allocate(bench.graph, scores, ep.Budget(macs=0.5), method=method, round_to=1, **rest)
        row[word] = {stage: bench.accuracy(bench.small(plan, stage)) for stage in ("recalibrated", "reconstructed")}
    print(row, flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: accuracies are recalibrated / reconstructed."""
    lines = [
        "| variant | agreement with real removals, stages 1, 2, 3 | targets explained | uniform | global | global per cost |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        agreement = ", ".join(f"{v:.2f}" for v in row["agreement"].values())
        shares = ", ".join(f"{v:.0%}" for v in row["explained"].values()) or "-"
        accuracies = [f"{row[w]['recalibrated']:.1f} / {row[w]['reconstructed']:.1f}" for w in ALLOCATIONS]
        lines.append(f"| {row['variant']} | {agreement} | {shares} | {' | '.join(accuracies)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the variants that have no row yet, and write the table."""
    file, bench = RESULTS / "di_study.json", load("resnet56", Sizes(), Path("runs") / "bench" / "criteria")
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"sizes": vars(bench.sizes), "rows": []}
    same = known["sizes"] == vars(bench.sizes)
    rows: dict[str, dict[str, Any]] = {
        row["variant"]: row for row in known["rows"] if same and row.get("code") == code_of(VARIANTS[row["variant"]][0])
    }
    truth = real_changes(bench) if VARIANTS.keys() - rows.keys() else {}
    for name in VARIANTS:
        if name not in rows:
            rows[name] = measure(bench, name, truth)
            ordered = [rows[other] for other in VARIANTS if other in rows]
            write_atomic(file, (json.dumps({"sizes": vars(bench.sizes), "rows": ordered}, indent=2) + "\n").encode())
            write_atomic(file.with_suffix(".md"), table(ordered).encode())
    print(table([rows[name] for name in VARIANTS]))


if __name__ == "__main__":
    main()
