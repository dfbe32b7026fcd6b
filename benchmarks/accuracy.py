"""Accuracy of ResNets on CIFAR-10 at a share of their MACs: right after pruning, recovered without training, after one epoch.

    python -m benchmarks.accuracy                          # ResNet-56 and ResNet-20, no training; goes on where it was
    python -m benchmarks.accuracy --network resnet56 --removed 50 --epochs 1

The default criterion and allocator, and beside them Torch-Pruning's choice of inner widths (where it is installed, see
benchmarks/peer_pruning.py; the importance that was best on validation images in benchmarks/criteria.py), both with the same recovery:
reconstruction on 2,048 augmented training images without labels, then, where epochs are asked for, the preset quick with so many
epochs (in bf16, with --feature-weight 400). Widths of any number. `kl` is the divergence from the dense network's answers on 2,000
augmented training images that nothing else reads. The 10,000 test images are evaluated after each step and choose nothing.
One row per combination in benchmarks/results/accuracy.json, written as it is measured, and accuracy.md; refitted and trained networks
stay in runs/bench. Needs EDGEPRUNE_DATA (default ../shared/data) with cifar10/ and weights/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import edgeprune as ep
from benchmarks import peer_pruning
from benchmarks.cifar10 import datasets
from benchmarks.revision import git_revision
from edgeprune.data import Augment, Split
from edgeprune.export.fold import fold_batchnorm
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Plan
from edgeprune.run import write_atomic
from edgeprune.train.distill import features_to_learn
from edgeprune.train.finetune import finetune
from edgeprune.train.reconstruct import reconstruct

DATA = Path(os.environ.get("EDGEPRUNE_DATA", "../shared/data"))
WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
RESULTS = Path(__file__).parent / "results"
OURS = "edgeprune"
PEER = "torch-pruning L2 group norm"
REMOVED = {"resnet56": (50, 64, 35, 40), "resnet20": (50, 64, 40)}  # percent of the MACs, the most telling first
AUGMENT = Augment(crop_padding=4, flip=True)  # that of the checkpoints' own training
BATCH = 100
FEATURES = 400.0  # four times the preset's: 400 was still stable on both networks, 1000 was not


@dataclass(frozen=True)
class Sizes:
    """Images for each purpose."""

    scoring: int = 1024
    reconstruction: int = 2048
    held: int = 2000


class Bench:
    """One network and its images."""

    def __init__(self, network: str, model: nn.Module, train: Split, test: Split, *, sizes: Sizes, work: Path) -> None:
        self.network, self.sizes, self.work = network, sizes, work
        self.dense, self.test = model.eval(), test
        self.rest, self.held = train.hold_out(sizes.held, seed=0)
        self.example = next(test.batches(1))[0]
        self.graph: ChannelGraph = ep.trace(self.dense, self.example)

    @cached_property
    def scoring(self) -> list[tuple[Tensor, Tensor]]:
        """Augmented, labelled batches to choose channels by (ours reads no labels)."""
        return list(self.rest.batches(128, shuffle_seed=0, limit=self.sizes.scoring, augment=AUGMENT))

    @cached_property
    def scores(self) -> ep.Scores:
        """By the default criterion."""
        return ep.score(self.graph, self.dense, "reconstruction", data=self.scoring)

    @cached_property
    def dense_row(self) -> dict[str, Any]:
        """The dense network's own figures."""
        return {"accuracy": self.accuracy(self.dense), "macs": self.graph.macs, "params": self.graph.params}

    def plan(self, chooser: str, removed: int) -> Plan:
        """The channels that stay when this percentage of the MACs goes."""
        share = 1 - removed / 100
        if chooser == OURS:
            return ep.allocate(self.graph, self.scores, ep.Budget(macs=share), method="knapsack", round_to=1)
        return peer_pruning.plan(chooser, self.dense, self.graph, self.scoring, share)

    def accuracy(self, model: nn.Module) -> float:
        """Top-1 on the test images, percent."""
        found = [(logits.argmax(1) == y).sum() for logits, y in self._answers(model, self.test.batches(BATCH))]
        return round(100 * int(torch.stack(found).sum()) / len(self.test), 2)

    def divergence(self, model: nn.Module) -> float:
        """Mean Kullback-Leibler divergence from the dense network's answers on the held images, nats."""
        sides = [self._answers(m, self.held.batches(BATCH, shuffle_seed=5, augment=AUGMENT)) for m in (model, self.dense)]
        found = [
            F.kl_div(F.log_softmax(small, 1), F.log_softmax(dense, 1), reduction="sum", log_target=True)
            for (small, _), (dense, _) in zip(*sides, strict=True)
        ]
        return round(float(torch.stack(found).sum()) / len(self.held), 4)

    def _answers(self, model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        fast: Any = fold_batchnorm(model, self.example)
        fast = fast.to(memory_format=torch.channels_last)
        for x, y in batches:
            with torch.inference_mode():
                logits = fast(x.contiguous(memory_format=torch.channels_last))
            yield logits, y

    def measure(self, chooser: str, removed: int, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
        """One row without training; the refitted network is kept on disk. `earlier`: a row of the same channels, chosen before."""
        plan = Plan.from_json({"keep": earlier["plan"]}) if earlier else self.plan(chooser, removed)
        small = ep.slim(self.dense, self.graph, plan)
        slimmed = ep.trace(small, self.example)
        started = time.process_time()
        fitted = self._refitted(small, plan, chooser, removed)
        seconds = time.process_time() - started
        return {
            "network": self.network,
            "chooser": chooser,
            "removed": removed,
            "plan": plan.to_json()["keep"],
            "macs_share": round(slimmed.macs / self.graph.macs, 4),
            "params_share": round(slimmed.params / self.graph.params, 4),
            "accuracy": {
                "pruned": earlier["accuracy"]["pruned"] if earlier else self.accuracy(small),
                "reconstructed": self.accuracy(fitted),
            },
            "kl": {"reconstructed": self.divergence(fitted)},
            "reconstruction_cpu_seconds": round(seconds, 1),
            "sizes": vars(self.sizes),
            "git": {"reconstructed": git_revision()},
        }

    def train(self, row: dict[str, Any], epochs: int) -> None:
        """Fine-tune a row's refitted network (refitted again where it is not on disk) with the preset quick, and add its figures."""
        plan = Plan.from_json({"keep": row["plan"]})
        small = ep.slim(self.dense, self.graph, plan)
        if (path := self._path(row["chooser"], row["removed"], 0)).exists():
            small.load_state_dict(load_file(path))
        else:
            small = self._refitted(small, plan, row["chooser"], row["removed"])
        recipe, features = _recipe(epochs), features_to_learn(self.graph, plan)
        started = time.process_time()
        tuned, _ = finetune(small, self.dense, self.rest, self.held, recipe, seed=0, features=features)
        seconds = time.process_time() - started
        self._keep(tuned, row["chooser"], row["removed"], epochs)
        name = f"epochs {epochs}"
        row["accuracy"][name], row["kl"][name] = self.accuracy(tuned), self.divergence(tuned)
        row.setdefault("git", {})[name] = git_revision()
        row.setdefault("training", {})[name] = {"recipe": recipe.to_json(), "cpu_seconds": round(seconds, 1)}

    def _refitted(self, small: nn.Module, plan: Plan, chooser: str, removed: int) -> nn.Module:
        fitted = reconstruct(small, self.dense, self.graph, plan, self.rest, images=self.sizes.reconstruction, augment=AUGMENT)
        self._keep(fitted, chooser, removed, 0)
        return fitted

    def _path(self, chooser: str, removed: int, epochs: int) -> Path:
        return self.work / f"{self.network}-{removed}-{chooser.replace(' ', '_')}-{epochs}ep.safetensors"

    def _keep(self, model: nn.Module, chooser: str, removed: int, epochs: int) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, self._path(chooser, removed, epochs))


def _recipe(epochs: int) -> ep.Recipe:
    return ep.Recipe.preset("quick", epochs=epochs, precision="bf16", feature_weight=FEATURES)


class Results:
    """The rows on disk; every change is a whole new file."""

    def __init__(self, folder: Path) -> None:
        self._file, self._page = folder / "accuracy.json", folder / "accuracy.md"
        self.dense: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self._read()

    def _read(self) -> None:
        content = json.loads(self._file.read_text()) if self._file.exists() else {"dense": {}, "rows": []}
        self.dense, self.rows = content["dense"] | self.dense, content["rows"]

    def find(self, network: str, chooser: str, removed: int) -> dict[str, Any] | None:
        """The row of these channels, with however many images it was measured."""
        return next((r for r in self.rows if (r["network"], r["chooser"], r["removed"]) == (network, chooser, removed)), None)

    def put(self, row: dict[str, Any]) -> None:
        """Add or replace a row, beside what other processes wrote meanwhile, and write everything."""
        self._read()
        key = ("network", "removed", "chooser")
        self.rows = [r for r in self.rows if [r[k] for k in key] != [row[k] for k in key]] + [row]
        self.rows.sort(key=lambda r: [r[k] for k in key])
        machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        lines = ",\n".join(json.dumps(r) for r in self.rows)
        head = f'{{"machine": {json.dumps(machine)},\n"dense": {json.dumps(self.dense)},\n"rows": [\n'
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file, (head + lines + "\n]}\n").encode())
        write_atomic(self._page, table(self.rows, self.dense).encode())


def table(rows: list[dict[str, Any]], dense: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table; "-" is what has not been measured."""
    epochs = sorted({int(k.split()[1]) for r in rows for k in r["accuracy"] if k.startswith("epochs")} | {1})
    heads = ["network", "MACs", "params", "channels chosen by", "dense", "right after pruning", "after reconstruction"]
    heads += [f"after {n} epoch{'s' * (n > 1)}" for n in epochs]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows:
        figures = [r["accuracy"].get(step) for step in ("pruned", "reconstructed", *(f"epochs {n}" for n in epochs))]
        change = [f"{100 * (r[share] - 1):+.1f}%" for share in ("macs_share", "params_share")]
        cells = [r["network"], *change, r["chooser"], f"{dense[r['network']]['accuracy']:.2f}"]
        lines.append(f"| {' | '.join(cells + ['-' if f is None else f'{f:.2f}' for f in figures])} |")
    return "\n".join(lines) + "\n"


def run(bench: Bench, results: Results, budgets: tuple[int, ...], choosers: list[str], epochs: int) -> None:
    """Everything for one network that is not on disk yet."""
    if bench.network not in results.dense:
        results.dense[bench.network] = bench.dense_row
    for chooser in choosers:
        for removed in budgets:
            row = results.find(bench.network, chooser, removed)
            if row is None or row["sizes"] != vars(bench.sizes):
                same_channels = row if row and row["sizes"]["scoring"] == bench.sizes.scoring else None
                results.put(row := bench.measure(chooser, removed, same_channels))
            trained = row.get("training", {}).get(f"epochs {epochs}", {})
            if epochs and trained.get("recipe") != _recipe(epochs).to_json():
                bench.train(row, epochs)
                results.put(row)
            print(f"{bench.network} -{removed}% {chooser}: {row['accuracy']} kl {row['kl']}", flush=True)


def main() -> None:
    """Run what is asked, keep the other rows, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default=",".join(REMOVED))
    parser.add_argument("--removed", type=int, nargs="*", help="percent of the MACs; default: those of the README's table")
    parser.add_argument("--epochs", type=int, default=0)
    options = parser.parse_args()
    results = Results(RESULTS)
    choosers = [OURS, *([PEER] if peer_pruning.version() else [])]
    for network in options.network.split(","):
        loaded = ep.load_model(DATA / "weights" / WEIGHTS[network], factory=f"benchmarks.networks:{network}", input_shape=(1, 3, 32, 32))
        data = ep.load_data(datasets())
        bench = Bench(network, loaded.model, data.train, data.val, sizes=Sizes(), work=Path("runs") / "bench" / "accuracy")
        run(bench, results, tuple(options.removed or REMOVED[network]), choosers, options.epochs)
    print(table(results.rows, results.dense))


if __name__ == "__main__":
    main()
