"""Accuracy of ResNets on CIFAR-10 at a share of their MACs: right after pruning, recovered without training, after fine-tuning.

    python -m benchmarks.accuracy                       # ResNet-56 to half its MACs by l1 and nuclear_norm, 1 epoch
    python -m benchmarks.accuracy --network resnet20 --macs 0.4 --criteria l1 --epochs 3

Needs EDGEPRUNE_DATA (default ../shared/data) with cifar10/ and weights/. Every run is a run folder under runs/bench; an interrupted
benchmark goes on where it was. Everything is chosen on training images; the 10,000 test images are evaluated after each step and
choose nothing. Writes benchmarks/results/accuracy.json and accuracy.md; latency is of this machine, measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import edgeprune as ep
from benchmarks.cifar10 import datasets

DATA = Path(os.environ.get("EDGEPRUNE_DATA", "../shared/data"))
WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
RESULTS = Path(__file__).parent / "results"


def run(network: str, criterion: str, *, recover: str, macs: float, epochs: int, seed: int) -> dict[str, Any]:
    """One compression on this machine; its figures as plain values."""
    loaded = ep.load_model(DATA / "weights" / WEIGHTS[network], factory=f"benchmarks.networks:{network}", input_shape=(1, 3, 32, 32))
    name = f"{network}-{criterion}-{recover}-{macs:g}-{epochs}ep-s{seed}"
    folder = Path("runs") / "bench" / name
    result = ep.compress(
        loaded.model,
        loaded.example_inputs,
        budget=ep.Budget(macs=macs),
        device="host",
        data=ep.load_data(datasets()),
        criterion=criterion,
        recover=recover,
        recipe=ep.Recipe(epochs=epochs),
        out=folder,
        resume=(folder / "run.json").exists(),
        seed=seed,
        name=network,
        progress=lambda what, done, total: print(f"\r{name}: {what} {done}/{total}   ", end="", flush=True),
    )
    print()
    figures = {f["name"]: f for f in result.facts["figures"]}
    return {
        "network": network,
        "criterion": criterion,
        "recover": recover,
        "asked_macs": macs,
        "epochs": epochs,
        "seed": seed,
        "accuracy": {s["step"]: s["accuracy"] for s in result.facts["accuracy_steps"]},
        "macs": [figures["macs"][side]["value"] for side in ("before", "after")],
        "params": [figures["params"][side]["value"] for side in ("before", "after")],
        "latency_ms": {side: figures["latency"][side] for side in ("before", "after")},
        "latency_how": figures["latency"]["how"],
        "recipe": ep.Recipe(epochs=epochs).to_json(),
        "curve": result.facts["curve"],
        "plan_sha256": result.plan.sha256,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| network | criterion | MACs | params | dense | right after pruning | without training | fine-tuned (epochs) | latency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        a = r["accuracy"]
        change = [f"{100 * (after / before - 1):+.1f}%" for before, after in (r["macs"], r["params"])]
        tuned = f"{100 * a['after fine-tuning']:.2f} ({r['epochs']})" if "after fine-tuning" in a else "-"
        steps = [f"{100 * a[s]:.2f}" for s in ("dense", "right after pruning")]
        word = {"bn": "BN recalibration", "reconstruct": "reconstruction"}[r["recover"]]
        steps.append(f"{100 * a[f'after {word}']:.2f} ({word})")
        latency = [
            "{value:.2f} ms [{low:.2f}, {high:.2f}]".format(**r["latency_ms"][side]) if r["latency_ms"][side] else "-"
            for side in ("before", "after")
        ]
        lines.append(
            f"| {r['network']} | {r['criterion']} | {change[0]} | {change[1]} | {' | '.join(steps)} | {tuned} | {' → '.join(latency)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked, keep the other rows, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet56", choices=sorted(WEIGHTS))
    parser.add_argument("--criteria", default="l1,nuclear_norm")
    parser.add_argument("--recover", default="bn", choices=("bn", "reconstruct"))
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    file = RESULTS / "accuracy.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    key = ("network", "criterion", "recover", "asked_macs", "epochs", "seed")
    for criterion in options.criteria.split(","):
        row = run(options.network, criterion, recover=options.recover, macs=options.macs, epochs=options.epochs, seed=options.seed)
        rows = sorted([r for r in rows if [r[k] for k in key] != [row[k] for k in key]] + [row], key=lambda r: [r[k] for k in key])
        RESULTS.mkdir(exist_ok=True)
        file.write_text(
            json.dumps({"machine": {"cpu_count": os.cpu_count(), "platform": platform.platform()}, "rows": rows}, indent=2) + "\n"
        )
        (RESULTS / "accuracy.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
