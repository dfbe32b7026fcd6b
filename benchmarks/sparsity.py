"""Accuracy of a small fully connected network on grey CIFAR-10 at a share of its connections: screening against magnitude.

    python -m benchmarks.sparsity                     # 3 seeds, 6 shares, 3 methods; one thread, minutes
    python -m benchmarks.sparsity --seeds 0 --keeps 0.1,0.01

LeNet-300-100 in form: 1024-300-100-10, no batch norm. A dense network per seed is trained once, then every method sparsifies and trains
it with the same recipe; alpha 0 is magnitude, 0.5 screening with weights (as product or by ranks), 1 screening alone. Only training
images are looked at, held out ones included, until one evaluation of each network at the end on the test images. Nothing is chosen there.
Writes benchmarks/results/sparsity.json and sparsity.md. Needs EDGEPRUNE_DATA (default ../shared/data) with cifar10/.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

import edgeprune as ep
from benchmarks.cifar10 import datasets
from edgeprune.data import Data
from edgeprune.train.evaluate import evaluate
from edgeprune.train.finetune import finetune

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"alpha": 0.0},
    "screening, product": {"alpha": 0.5, "combine": "product"},
    "screening, ranks": {"alpha": 0.5, "combine": "rank"},
    "screening alone": {"alpha": 1.0},
}
GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def mlp() -> nn.Sequential:
    """1024-300-100-10 with ReLU: 338,200 connections."""
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def grey_data(train_images: int) -> Data:
    """The first training images and all test images of CIFAR-10 as one channel of 32x32."""
    (x, y), (x_test, y_test) = datasets()
    grey = [np.rint(part @ GREY).astype(np.uint8)[..., None] for part in (x[:train_images], x_test)]
    return ep.load_data(((grey[0], y[:train_images]), (grey[1], y_test)))


def run(data: Data, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, as plain values."""
    recipe = ep.Recipe(lr=options.lr, batch_size=128, distill=False, flip=True, crop_padding=0, weight_decay=5e-4)
    rows = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        rest, _ = data.train.hold_out_tenth(seed)
        dense, _ = finetune(mlp(), None, rest, None, ep.Recipe(**recipe.to_json() | {"epochs": options.dense_epochs}), seed=seed)
        accuracy = evaluate(dense, data.val).accuracy
        for keep in options.keeps:
            for method, how in METHODS.items():
                started = time.process_time()
                result = ep.sparsify(dense, data=data, keep=keep, epochs=options.epochs, recipe=recipe, seed=seed, **how)
                with TemporaryDirectory() as folder:
                    size = ep.save_sparse(result.model, Path(folder) / "sparse.safetensors").stat().st_size
                    whole = ep.save(dense, Path(folder) / "dense.safetensors").stat().st_size
                row = {"seed": seed, "method": method, **how, "keep": keep, "connections": result.connections, "kept": result.kept}
                row |= {"size_bytes": size, "dense_size_bytes": whole, "dense_test_accuracy": accuracy}
                row |= {"held_accuracy": result.steps[-1].val_accuracy, "test_accuracy": evaluate(result.model, data.val).accuracy}
                row |= {"cpu_s": round(time.process_time() - started, 2), "steps": [asdict(s) for s in result.steps]}
                rows.append(row)
                print({k: row[k] for k in ("seed", "method", "keep", "held_accuracy", "test_accuracy", "size_bytes", "cpu_s")}, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation of the test accuracy over seeds, and the size of the file, as Markdown."""
    dense = sorted({(r["seed"], r["dense_test_accuracy"]) for r in rows})
    lines = [
        f"Dense network: {_mean([a for _, a in dense])} % of the test images over {len(dense)} seeds, {rows[0]['dense_size_bytes']} bytes.",
        "",
        f"| connections kept | {' | '.join(METHODS)} | file (screening, product) |",
        f"|---|{'---|' * len(METHODS)}---|",
    ]
    for keep in sorted({r["keep"] for r in rows}, reverse=True):
        cells = [_mean([r["test_accuracy"] for r in rows if (r["keep"], r["method"]) == (keep, m)]) for m in METHODS]
        sizes = [r["size_bytes"] for r in rows if (r["keep"], r["method"]) == (keep, "screening, product")]
        share = rows[0]["dense_size_bytes"] / np.mean(sizes)
        lines.append(f"| {100 * keep:g}% | {' | '.join(cells)} | {np.mean(sizes) / 1000:.0f} kB (1/{share:.1f}) |")
    return "\n".join(lines) + "\n"


def _mean(accuracies: list[float]) -> str:
    spread = f" ± {100 * np.std(accuracies, ddof=1):.2f}" if len(accuracies) > 1 else ""
    return f"{100 * np.mean(accuracies):.2f}{spread}"


def main() -> None:
    """Run, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda s: [int(v) for v in s.split(",")], default=[0, 1, 2])
    parser.add_argument("--keeps", type=lambda s: [float(v) for v in s.split(",")], default=[0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
    parser.add_argument("--images", type=int, default=8000, help="training images, a tenth of them held out")
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    rows = run(grey_data(options.images), options)
    asked = {k: v for k, v in vars(options).items() if k != "out"}
    facts = {"machine": {"platform": platform.platform(), "threads": 1}, "options": asked, "cpu_s": round(time.process_time() - started, 1)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sparsity.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    (options.out / "sparsity.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
