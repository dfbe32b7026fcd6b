"""Every criterion in the registry on CIFAR-10 ResNets: accuracy after pruning, BN recalibration, reconstruction and fine-tuning.

    python -m benchmarks.criteria                                    # goes on where it was; ResNet-20, then ResNet-56
    python -m benchmarks.criteria --network resnet20 --criteria l1,reconstruction --budgets 50 --limit-minutes 20

Each criterion meets three budgets (percent of the MACs removed) under three allocations, in channels of any number. Criteria that take
a seed run with three at -50% (--all-seeds: everywhere); filter_ensemble with 64 masks per layer on 128 images. Reconstruction goes layer by
layer (without the step of train/pairs.py, which takes as long again). All figures are on
2,000 training images that nothing else reads (the first 1,000 right after pruning). The networks saw them in their own training, so
they compare criteria; they do not predict test accuracy.
The winners on them, and only these, see the 10,000 test images, once. One epoch of fine-tuning, the answers distilled: of ResNet-20 at -50%
each criterion under its best allocation, of ResNet-56 the three best and Torch-Pruning's, which takes part where it is installed (see
benchmarks/peer_pruning.py). One row per combination in benchmarks/results/criteria.json, written as it is measured; a
criterion whose file has changed is scored again, and rows whose plan is another one then are measured again. Needs EDGEPRUNE_DATA with
cifar10/ and weights/.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import edgeprune as ep
from benchmarks import peer_pruning
from benchmarks.accuracy import DATA, RESULTS, WEIGHTS
from benchmarks.cifar10 import datasets
from benchmarks.criteria_report import chart, table, winners
from edgeprune.data import Split
from edgeprune.export.fold import fold_batchnorm
from edgeprune.graph import ChannelGraph
from edgeprune.plan import Plan, Scores
from edgeprune.registry import entries, find
from edgeprune.run import write_atomic
from edgeprune.train.evaluate import recalibrate
from edgeprune.train.finetune import finetune
from edgeprune.train.reconstruct import reconstruct

ALLOCATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "global": ("global", {"per_cost": False}),
    "global per cost": ("global", {"per_cost": True}),
}
BUDGETS = (50, 64, 35)  # percent of the MACs that go, the most telling first
TUNED = 50
TRAINING = 48_000  # images of the epoch: all that do not judge
SEEDS = 3
BATCH = 50
OPTIONS: dict[str, dict[str, Any]] = {"filter_ensemble": {"masks": 64}}  # its default of 512 per layer takes hours on two cores
SCORING = {"filter_ensemble": 128}  # images, for a criterion that runs the network once for every mask


@dataclass(frozen=True)
class Sizes:
    """Images for each purpose; glance: those of the validation images that judge networks right after pruning."""

    scoring: int = 1024
    recalibration: int = 1000
    reconstruction: int = 256
    validation: int = 2000
    glance: int = 1000


@dataclass(frozen=True)
class Cell:
    """One combination."""

    network: str
    criterion: str
    seed: int
    removed: int
    allocation: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What rows are found by."""
        return tuple(asdict(self).values())


class Bench:
    """One network, its images, and the scores that were asked for."""

    def __init__(self, network: str, model: nn.Module, train: Split, test: Split, *, sizes: Sizes, work: Path) -> None:
        self.network, self.sizes, self.work = network, sizes, work
        self.dense = model.eval()
        self.test = test
        self.rest, self.held = train.hold_out(sizes.validation, seed=0)
        self.example = next(test.batches(1))[0]
        self.graph: ChannelGraph = ep.trace(self.dense, self.example)

    @cached_property
    def scoring(self) -> list[tuple[Tensor, Tensor]]:
        """Labelled batches for criteria."""
        return list(self.rest.batches(128, shuffle_seed=0, limit=self.sizes.scoring))

    @cached_property
    def validation(self) -> list[tuple[Tensor, Tensor]]:
        """The held images, in the format in which small networks run fastest."""
        return [(x.contiguous(memory_format=torch.channels_last), y) for x, y in self.held.batches(BATCH)]

    def accuracy(self, model: nn.Module, images: int | None = None) -> float:
        """Top-1 on the held images (the first `images`), percent."""
        return _accuracy(model, self.example, self.validation[: None if images is None else -(-images // BATCH)])

    def test_accuracy(self, model: nn.Module) -> float:
        """Top-1 on the test images, percent."""
        return _accuracy(model, self.example, list(self.test.batches(BATCH)))

    def scores(self, criterion: str, seed: int) -> Scores:
        """From the last run where the criterion's file is unchanged. `facts` holds the CPU-seconds that scoring took."""
        path = self.work / f"{self.network}-{criterion}-s{seed}-{code_of(criterion)}-{self.sizes.scoring}.safetensors"
        seconds = path.with_suffix(".json")
        if not seconds.exists():
            started = time.process_time()
            options = OPTIONS.get(criterion, {}) | ({"seed": seed} if _seeded(criterion) else {})
            data = self.scoring[: -(-SCORING[criterion] // 128)] if criterion in SCORING else self.scoring
            found = ep.score(self.graph, self.dense, criterion, data=data, **options)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in found.values.items()}, path)
            cost = {"cpu_seconds": round(time.process_time() - started, 2), "additive": found.additive}
            write_atomic(seconds, json.dumps(cost).encode())
        values = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        cost = json.loads(seconds.read_text())
        return Scores(criterion, values, {"cpu_seconds": cost["cpu_seconds"]}, cost["additive"])

    def plan(self, cell: Cell) -> tuple[Plan, float]:
        """The channels that stay, and the CPU-seconds of their scores."""
        share = 1 - cell.removed / 100
        if cell.criterion in peer_pruning.PEERS:
            started = time.process_time()
            return peer_pruning.plan(cell.criterion, self.dense, self.graph, self.scoring, share), time.process_time() - started
        scores = self.scores(cell.criterion, cell.seed)
        method, options = ALLOCATIONS[cell.allocation]
        plan = ep.allocate(self.graph, scores, ep.Budget(macs=share), method=method, round_to=1, **options)
        return plan, float(scores.facts["cpu_seconds"])

    def small(self, plan: Plan, stage: str) -> nn.Module:
        """The slim network after "pruned", "recalibrated" or "reconstructed"."""
        small = ep.slim(self.dense, self.graph, plan)
        if stage == "recalibrated":
            fast: Any = small.to
            return recalibrate(fast(memory_format=torch.channels_last), self.rest, images=self.sizes.recalibration)
        if stage == "reconstructed":
            return reconstruct(small, self.dense, self.graph, plan, self.rest, images=self.sizes.reconstruction, in_pairs=False)
        return small

    def measure(self, cell: Cell, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """One row: everything that needs no training. A known row whose plan comes out the same keeps its figures."""
        started = time.process_time()
        plan, scoring = self.plan(cell)
        if known and (known["plan_sha256"], known["sizes"]) == (plan.sha256, asdict(self.sizes)):
            return known | {"code": code_of(cell.criterion), "scoring_cpu_seconds": round(scoring, 2)}
        small = self.small(plan, "pruned")
        slimmed = ep.trace(small, self.example)
        glance = {"pruned": self.accuracy(small, self.sizes.glance)}
        return {
            **asdict(cell),
            "code": code_of(cell.criterion),
            "macs_share": round(slimmed.macs / self.graph.macs, 4),
            "params_share": round(slimmed.params / self.graph.params, 4),
            "validation": glance | {stage: self.accuracy(self.small(plan, stage)) for stage in ("recalibrated", "reconstructed")},
            "scoring_cpu_seconds": round(scoring, 2),
            "cpu_seconds": round(time.process_time() - started, 2),
            "plan_sha256": plan.sha256,
            "sizes": asdict(self.sizes),
        }

    def tuned(self, cell: Cell, images: int) -> nn.Module:
        """The reconstructed network after one pass over `images` training images, the answers distilled; kept on disk."""
        plan, _ = self.plan(cell)
        recipe = ep.Recipe(epochs=1)
        name = hashlib.sha256(f"{self.network}{plan.sha256}{asdict(self.sizes)}{images}{recipe}".encode()).hexdigest()[:16]
        path = self.work / f"{name}.safetensors"
        small = self.small(plan, "reconstructed")
        if path.exists():
            small.load_state_dict(load_file(path))
            return small
        chosen = self.rest.subset(np.random.default_rng(0).permutation(len(self.rest))[:images])
        small, _ = finetune(small, self.dense, chosen, None, recipe, seed=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in small.state_dict().items()}, path)
        return small


def _accuracy(model: nn.Module, example: Tensor, batches: list[tuple[Tensor, Tensor]]) -> float:
    fast: Any = fold_batchnorm(model, example)
    fast = fast.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        right = sum(int((fast(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum()) for x, y in batches)
    return round(100 * right / sum(len(y) for _, y in batches), 3)


def code_of(criterion: str) -> str:
    """Changes when the criterion, another one whose parts it uses, or how it is run here, does."""
    if criterion in peer_pruning.PEERS:
        return f"torch-pruning {peer_pruning.version()}"
    module = find("criteria", criterion, "criterion")
    parts = {getattr(part, "__module__", None) for part in vars(module).values()}
    names = [e.module for e in entries("criteria") if e.module in parts | {module.__name__}]
    files = [sys.modules[name].__file__ or "" for name in names]
    return hashlib.sha256(b"".join(Path(f).read_bytes() for f in files) + repr(OPTIONS.get(criterion)).encode()).hexdigest()[:12]


def _seeded(criterion: str) -> bool:
    module = find("criteria", criterion, "criterion")
    return "seed" in inspect.signature(getattr(module, "statistic", module.score)).parameters


def cells(network: str, criteria: list[str], budgets: list[int], *, all_seeds: bool = False) -> Iterator[Cell]:
    """All combinations, budget by budget; more than one seed at -50% only, unless `all_seeds`."""
    for removed in budgets:
        for criterion in criteria:
            peer = criterion in peer_pruning.PEERS
            several = not peer and (all_seeds or removed == TUNED) and _seeded(criterion)
            for seed in range(SEEDS if several else 1):
                for allocation in [peer_pruning.ALLOCATION] if peer else ALLOCATIONS:
                    yield Cell(network, criterion, seed, removed, allocation)


class Results:
    """The rows on disk; every change is a whole new file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content = json.loads(path.read_text()) if path.exists() else {"dense": {}, "rows": []}
        self.dense: dict[str, dict[str, float]] = content["dense"]
        self.rows = {_cell(r).key: r for r in content["rows"]}

    def has(self, cell: Cell, sizes: Sizes) -> bool:
        """Whether the cell was measured with the criterion as it is now and as many images."""
        row = self.rows.get(cell.key)
        return row is not None and row["code"] == code_of(cell.criterion) and row["sizes"] == asdict(sizes)

    def put(self, *rows: dict[str, Any]) -> None:
        """Add or replace rows."""
        self.rows |= {_cell(r).key: r for r in rows}
        lines = [json.dumps(self.rows[key]) for key in sorted(self.rows)]
        machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        head = f'{{"machine": {json.dumps(machine)},\n"dense": {json.dumps(self.dense)},\n"rows": [\n'
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, (head + ",\n".join(lines) + "\n]}\n").encode())


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(row["network"], row["criterion"], row["seed"], row["removed"], row["allocation"])


def best_of_each(rows: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    """The best row of every criterion (its first seed), best criterion first."""
    found: dict[str, dict[str, Any]] = {}
    first = (r for r in rows if r["seed"] == 0 and stage in r["validation"])
    for row in sorted(first, key=lambda r: (-r["validation"][stage], r["allocation"])):
        found.setdefault(row["criterion"], row)
    return list(found.values())


def to_tune(rows: list[dict[str, Any]], network: str) -> list[dict[str, Any]]:
    """Rows to fine-tune: of each criterion its best allocation; of the large network the three best criteria, and the peer's."""
    best = best_of_each([r for r in rows if r["network"] == network and r["removed"] == TUNED], "reconstructed")
    if network == "resnet20":
        return best
    ours = [r for r in best if r["criterion"] not in peer_pruning.PEERS]
    return ours[:3] + [r for r in best if r not in ours]


class OutOfTime(Exception):
    """The time limit is over; what was measured is on disk."""


@dataclass(frozen=True)
class Clock:
    """A limit on the whole run, looked at between rows."""

    stop: float

    def check(self) -> None:
        """Raises OutOfTime."""
        if time.monotonic() > self.stop:
            raise OutOfTime


def run(bench: Bench, results: Results, wanted: Sequence[Cell], clock: Clock, *, training: int = TRAINING) -> None:
    """Everything for one network that is not on disk yet; fine-tuned on `training` images, 0 for not at all."""
    if "validation" not in (dense := results.dense.setdefault(bench.network, {})):
        dense["validation"] = bench.accuracy(bench.dense)
    for cell in wanted:
        if results.has(cell, bench.sizes):
            continue
        clock.check()
        row = bench.measure(cell, results.rows.get(cell.key))
        results.put(row)
        print(f"{cell.key} {row['validation']} {row['cpu_seconds']} CPU-s", flush=True)
    for row in to_tune(list(results.rows.values()), bench.network) if training else ():
        if row.get("training_images") == training or _cell(row) not in wanted:
            continue
        clock.check()
        started = time.process_time()
        row["validation"]["fine-tuned"] = bench.accuracy(bench.tuned(_cell(row), training))
        row["training_images"] = training
        row.get("test", {}).pop("fine-tuned", None)
        row["tuning_cpu_seconds"] = round(time.process_time() - started, 2)
        results.put(row)
        print(f"{_cell(row).key} fine-tuned {row['validation']['fine-tuned']} {row['tuning_cpu_seconds']} CPU-s", flush=True)


def judge(bench: Bench, results: Results, clock: Clock) -> None:
    """The winners' test accuracy."""
    if "test" not in (dense := results.dense[bench.network]):
        dense["test"] = bench.test_accuracy(bench.dense)
    for row, stage in winners([r for r in results.rows.values() if r["network"] == bench.network]):
        if stage not in row.setdefault("test", {}):
            clock.check()
            plan, _ = bench.plan(_cell(row))
            model = bench.tuned(_cell(row), row["training_images"]) if stage == "fine-tuned" else bench.small(plan, stage)
            row["test"][stage] = bench.test_accuracy(model)
            results.put(row)
            print(f"{_cell(row).key} {stage}: test {row['test'][stage]}", flush=True)


def load(network: str, sizes: Sizes, work: Path) -> Bench:
    """The network with its public checkpoint, and CIFAR-10."""
    loaded = ep.load_model(DATA / "weights" / WEIGHTS[network], factory=f"benchmarks.networks:{network}", input_shape=(1, 3, 32, 32))
    data = ep.load_data(datasets())
    return Bench(network, loaded.model, data.train, data.val, sizes=sizes, work=work)


def main() -> None:
    """Measure what is missing, then write the table and the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(WEIGHTS), help="one network (default: resnet20, then resnet56)")
    parser.add_argument("--criteria", help="names, comma-separated (default: all in the registry, and Torch-Pruning)")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="percent of the MACs that go (default: %(default)s)")
    parser.add_argument("--limit-minutes", type=float, default=float("inf"), help="stop after the row that passes this")
    parser.add_argument("--training-images", type=int, default=TRAINING, help="default %(default)s, all; 0: no fine-tuning")
    parser.add_argument("--all-seeds", action="store_true", help="three seeds at every budget, not at -50%% only")
    parser.add_argument("--no-test", action="store_true", help="without the winners' test images")
    parser.add_argument("--results", type=Path, default=RESULTS / "criteria.json")
    options = parser.parse_args()
    peers = list(peer_pruning.PEERS) if peer_pruning.version() else []
    if not peers:
        print("no rows of Torch-Pruning: it is not installed (see benchmarks/peer_pruning.py).")
    criteria = options.criteria.split(",") if options.criteria else [e.name for e in entries("criteria")] + peers
    clock = Clock(time.monotonic() + 60 * options.limit_minutes)
    results = Results(options.results)
    try:
        for network in [options.network] if options.network else sorted(WEIGHTS):
            bench = load(network, Sizes(), Path("runs") / "bench" / "criteria")
            wanted = list(cells(network, criteria, [int(b) for b in options.budgets.split(",")], all_seeds=options.all_seeds))
            run(bench, results, wanted, clock, training=options.training_images)
            if not options.no_test:
                judge(bench, results, clock)
    except OutOfTime:
        print("the time limit is over: run again to go on.")
    rows = list(results.rows.values())
    options.results.with_suffix(".md").write_text(table(rows, results.dense))
    picture = Path("runs") / "bench" / "criteria.html"
    write_atomic(picture, chart(rows, results.dense).encode())
    print(table(rows, results.dense), f"chart: {picture}", sep="\n")


if __name__ == "__main__":
    main()
