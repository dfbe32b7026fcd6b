"""Every allocator on CIFAR-10 ResNets: same scores, same budgets, loss and accuracy after BN recalibration and after reconstruction.

    python -m benchmarks.allocation                                    # goes on where it was; ResNet-20, then ResNet-56
    python -m benchmarks.allocation --network resnet20 --allocators knapsack,layer-compensated --limit-minutes 9
    python -m benchmarks.allocation --network resnet56 --allocators "LeGR bare 400" --jobs 2

Scores: the default criterion, on augmented training images. Budgets: 36% and half of the MACs, and a latency on this machine as its cost
model predicts it (halfway between the dense network and all layers at their narrowest). Channels in any number. What an allocator learns
it learns once, at the budget that leaves the fewest MACs, and reads its plans for the others from that. Figures are on 2,000 augmented
training images that neither scores nor searches see; the loss is the divergence (KL, nats) from the dense network's answers, because the
networks saw all training images in their own training. The 10,000 test images are seen once, at the end, by networks chosen on the others
(--test).
Random searches run with several seeds, all others with one; they are small ones (see Sizes), but for "LeGR bare 400", one search of the
published size. A plan is measured once, whichever allocators find it. For ResNet-20 at half of the MACs also one epoch of fine-tuning with
the product's recipe. Seconds are CPU-seconds of one process and thread, or of the clock where several processes search (--jobs).
One row per combination in benchmarks/results/allocation.json, written as it is measured, with the revision of the code that made its plan;
allocation.md and runs/bench/allocation.html from them. Needs EDGEPRUNE_DATA with cifar10/ and weights/.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgeprune as ep
from benchmarks.accuracy import AUGMENT, DATA, RESULTS, WEIGHTS, Bench
from benchmarks.accuracy import Sizes as ImagesFor
from benchmarks.allocation_report import LEARNED, TUNED, chart, table
from benchmarks.cifar10 import datasets
from benchmarks.criteria import Clock, OutOfTime
from edgeprune.allocate import Planner
from edgeprune.allocate.judge import divergence
from edgeprune.allocate.layer_compensated import CLOSER
from edgeprune.allocate.search import Search
from edgeprune.device.card import device
from edgeprune.device.cost import CostModel
from edgeprune.errors import DataError
from edgeprune.plan import Budget, Plan
from edgeprune.run import write_atomic
from edgeprune.train.evaluate import refit_norms
from edgeprune.train.finetune import finetune
from edgeprune.train.reconstruct import reconstruct
from edgeprune.widths import WidthRules

BARE: dict[str, Any] = {"start": (), "per_cost": False, "loss": "cross_entropy", "recover": "bn"}  # what the papers add to nothing
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "knapsack": ("knapsack", {}),
    "global": ("global", {"per_cost": False}),
    "global per cost": ("global", {}),
    LEARNED: ("layer_compensated", {}),
    "uniform": ("uniform", {}),
    "DI per cost": ("di_greedy", {}),
    "DI structure (ours)": ("di_greedy", {"layer_choice": "structure"}),
    "LeGR bare": ("layer_compensated", BARE),
    "LcP bare": ("layer_compensated", BARE | {"form": "additive"}),
    "LeGR bare 400": ("layer_compensated", BARE | {"evaluations": 400, "population": 64, "samples": 16}),
    "DI greedy by accuracy": ("di_greedy", {"layer_choice": "accuracy", "share": 0.05, "images": 256}),
}
BUDGETS = ("macs-64", "macs-50", "latency")


@dataclass(frozen=True)
class Sizes:
    """Images for each purpose, and the candidates that a random search judges."""

    recalibration: int = 1000
    reconstruction: int = 512
    training: int = 48_000
    fitness: int = 256
    fitness_recalibration: int = 256
    evaluations: int = 100
    population: int = 24
    samples: int = 8


@dataclass(frozen=True)
class Learner:
    """One allocator on one network with one seed; it makes one row per budget."""

    network: str
    allocator: str
    seed: int


class Arena:
    """One network, its scores and images, and what the figures of a row are made of."""

    def __init__(self, bench: Bench, sizes: Sizes) -> None:
        self.bench, self.sizes = bench, sizes
        self.cost = CostModel(device("host"))

    @cached_property
    def searching(self) -> list[tuple[Tensor, Tensor]]:
        """Augmented training images for searches; not those that the figures are on."""
        total = max(1024, CLOSER * (self.sizes.fitness + self.sizes.fitness_recalibration))  # what the last look at candidates takes
        return list(self.bench.rest.batches(128, shuffle_seed=1, limit=total, augment=AUGMENT))

    @cached_property
    def recalibrating(self) -> list[tuple[Tensor]]:
        """Augmented training images for batch norms."""
        batches = self.bench.rest.batches(128, shuffle_seed=2, limit=self.sizes.recalibration, augment=AUGMENT)
        return [(x.contiguous(memory_format=torch.channels_last),) for x, _ in batches]

    @cached_property
    def held(self) -> list[tuple[Tensor, Tensor]]:
        """The augmented images that the figures are on."""
        batches = self.bench.held.batches(100, shuffle_seed=5, augment=AUGMENT)
        return [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]

    @cached_property
    def answers(self) -> Tensor:
        """The dense network's logits for them."""
        return self._logits(self.bench.dense)

    @cached_property
    def budgets(self) -> dict[str, Budget]:
        """By name."""
        graph = self.bench.graph
        search = Search(graph, self.bench.scores, Budget(latency_ms=1.0), self.cost, rules=WidthRules(round_to=1))
        ends = [float(search.figures(w[None])["latency_ms"][0]) for w in (search.smallest, graph.dense_widths)]
        return {"macs-64": Budget(macs=0.36), "macs-50": Budget(macs=0.5), "latency": Budget(latency_ms=round(sum(ends) / 2, 4))}

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Accuracy in percent, and divergence from the dense network in nats, on the held images."""
        logits, labels = self._logits(model), torch.cat([y for _, y in self.held])
        right = float((logits.argmax(1) == labels).double().mean())
        return {"accuracy": round(100 * right, 2), "divergence": round(divergence([self.answers], [logits]), 5)}

    def test_accuracy(self, plan: Plan) -> float:
        """Of the reconstructed network, percent of the 10,000 test images."""
        return self.bench.accuracy(self.small(plan, "reconstructed"))

    def small(self, plan: Plan, stage: str) -> nn.Module:
        """The slim network after "recalibrated" or "reconstructed"."""
        bench = self.bench
        small = ep.slim(bench.dense, bench.graph, plan)
        if stage == "recalibrated":
            fast: Any = small.to
            network: nn.Module = fast(memory_format=torch.channels_last)
            refit_norms(network, self.recalibrating)
            return network
        return reconstruct(small, bench.dense, bench.graph, plan, bench.rest, images=self.sizes.reconstruction, augment=AUGMENT)

    def tuned(self, plan: Plan) -> nn.Module:
        """The reconstructed network after one epoch with the product's recipe."""
        bench = self.bench
        chosen = bench.rest.subset(np.random.default_rng(0).permutation(len(bench.rest))[: self.sizes.training])
        return finetune(self.small(plan, "reconstructed"), bench.dense, chosen, None, ep.Recipe(epochs=1), seed=0)[0]

    def _logits(self, model: nn.Module) -> Tensor:
        fast: Any = copy.deepcopy(model).eval().to
        network = fast(memory_format=torch.channels_last)
        with torch.inference_mode():
            return torch.cat([F.log_softmax(network(x).double(), dim=1) for x, _ in self.held])

    def learn(self, learner: Learner, budgets: Sequence[str], *, jobs: int = 1) -> list[dict[str, Any]]:
        """A row per budget, without figures: the plans, and what finding them took."""
        bench, sizes, asked = self.bench, self.sizes, {name: self.budgets[name] for name in budgets}
        method, options = METHODS[learner.allocator]
        if method == "layer_compensated":
            size = {"evaluations": sizes.evaluations, "population": sizes.population, "samples": sizes.samples, "images": sizes.fitness}
            options = size | {"seed": learner.seed} | options
        if method == "layer_compensated" or options.get("layer_choice") == "accuracy":
            options = {"recalibration_images": sizes.fitness_recalibration, "jobs": jobs} | options
        planner = Planner(
            bench.graph, bench.scores, method=method, model=bench.dense, data=self.searching, rules=WidthRules(round_to=1), **options
        )
        clock, started = time.monotonic(), time.process_time()
        order = [budgets[number] for number in planner.hardest_first(list(asked.values()), self.cost)]
        plans = {name: planner.plan(asked[name], self.cost) for name in order}
        spent = {"cpu_seconds": round(time.process_time() - started, 2), "seconds": round(time.monotonic() - clock, 2), "jobs": jobs}
        said = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        return [
            {
                **vars(learner),
                "budget": name,
                "limit": asked[name].limits(),
                "learned_at": order[0],
                "options": said,
                "search": {**spent, **planner.facts},
                "widths": plan.widths(bench.graph).tolist(),
                "plan_sha256": plan.sha256,
                "macs_share": round(float(bench.graph.macs_at(plan.widths(bench.graph))[0]) / bench.graph.macs, 4),
                "revision": revision(),
                "after": {},
            }
            for name, plan in plans.items()
        ]

    def plan(self, row: dict[str, Any]) -> Plan:
        """The best-scored channels at the widths of a row."""
        names = (g.name for g in self.bench.graph.groups)
        plan = Plan.from_widths(self.bench.graph, dict(zip(names, row["widths"], strict=True)), self.bench.scores)
        if plan.sha256 != row["plan_sha256"]:
            raise DataError(
                "the scores are others than when this row was begun: remove the file of results, or measure with that revision."
            )
        return plan


def revision() -> str:
    """The commit, and whether the package or the benchmarks differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "edgeprune", "benchmarks/allocation.py") else "")


class Results:
    """The rows on disk; every change is a whole new file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content = json.loads(path.read_text()) if path.exists() else {"dense": {}, "rows": []}
        self.dense: dict[str, dict[str, float]] = content["dense"]
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {_key(r): r for r in content["rows"]}

    def of(self, learner: Learner) -> list[dict[str, Any]]:
        """The rows of one learner, the hardest budget first."""
        keys = ((learner.network, learner.allocator, learner.seed, budget) for budget in BUDGETS)
        return [self.rows[key] for key in keys if key in self.rows]

    def known(self, row: dict[str, Any], stage: str) -> dict[str, float] | None:
        """The figures of the same plan in another row."""
        same = (r for r in self.rows.values() if (r["network"], r["plan_sha256"]) == (row["network"], row["plan_sha256"]))
        return next((r["after"][stage] for r in same if stage in r["after"]), None)

    def put(self, *rows: dict[str, Any]) -> None:
        """Add or replace rows."""
        self.rows |= {_key(row): row for row in rows}
        machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        lines = ",\n".join(json.dumps(self.rows[k]) for k in sorted(self.rows))
        head = f'{{"machine": {json.dumps(machine)},\n"dense": {json.dumps(self.dense)},\n"rows": [\n'
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, (head + lines + "\n]}\n").encode())


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["network"], row["allocator"], row["seed"], row["budget"]


def learners(network: str, allocators: Sequence[str], seeds: int) -> Iterator[Learner]:
    """All of them, the first seed of all before the others; more than one seed for the small random searches only."""
    for seed in range(seeds):
        for allocator in allocators:
            method, options = METHODS[allocator]
            if not seed or (method == "layer_compensated" and "evaluations" not in options):
                yield Learner(network, allocator, seed)


def run(
    arena: Arena, results: Results, wanted: Sequence[Learner], clock: Clock, *, budgets: Sequence[str], training: bool, jobs: int = 1
) -> None:
    """Everything for one network that is not on disk yet."""
    dense = results.dense.setdefault(arena.bench.network, {})
    dense |= arena.figures(arena.bench.dense) if "accuracy" not in dense else {}
    for learner in wanted:
        if missing := [name for name in budgets if name not in {row["budget"] for row in results.of(learner)}]:
            clock.check()
            results.put(*arena.learn(learner, missing, jobs=jobs))
        for row in results.of(learner):
            for stage in ("recalibrated", "reconstructed") if row["budget"] in budgets else ():
                if stage not in row["after"]:
                    clock.check()
                    row["after"][stage] = results.known(row, stage) or arena.figures(arena.small(arena.plan(row), stage))
                    results.put(row)
                    print(*_key(row), stage, row["after"][stage], f"{row['search']['cpu_seconds']} CPU-s", flush=True)
    for row in (row for learner in wanted if training for row in results.of(learner)):
        if row["budget"] == TUNED and not row["seed"] and "fine-tuned" not in row["after"]:
            clock.check()
            row["after"]["fine-tuned"] = results.known(row, "fine-tuned") or arena.figures(arena.tuned(arena.plan(row)))
            results.put(row)
            print(*_key(row), "fine-tuned", row["after"]["fine-tuned"], flush=True)


def examine(arena: Arena, results: Results, clock: Clock) -> None:
    """The test accuracy, after reconstruction, of what has the least divergence there, at every budget, and of plain global ranking."""
    dense = results.dense[arena.bench.network]
    dense["test"] = dense.get("test") or arena.bench.accuracy(arena.bench.dense)
    for budget in BUDGETS:
        rows = [r for r in results.rows.values() if (r["network"], r["budget"]) == (arena.bench.network, budget)]
        rows = [r for r in rows if "reconstructed" in r["after"]]
        best = sorted(rows, key=lambda r: float(r["after"]["reconstructed"]["divergence"]))[:1]
        for row in best + [r for r in rows if r["allocator"] == "global"]:
            if "test" not in row:
                clock.check()
                row["test"] = arena.test_accuracy(arena.plan(row))
                results.put(row)
                print(*_key(row), "test", row["test"], flush=True)


def load(network: str) -> Bench:
    """The network with its public checkpoint, and CIFAR-10."""
    loaded = ep.load_model(DATA / "weights" / WEIGHTS[network], factory=f"benchmarks.networks:{network}", input_shape=(1, 3, 32, 32))
    data = ep.load_data(datasets())
    return Bench(network, loaded.model, data.train, data.val, sizes=ImagesFor(), work=Path("runs") / "bench" / "allocation")


def main() -> None:
    """Measure what is missing, then write the table and the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(WEIGHTS), help="one network (default: resnet20, then resnet56)")
    parser.add_argument("--allocators", help="names of the table, comma-separated without spaces around (default: all)", default="")
    parser.add_argument("--budgets", help="that get figures (default: all)", default=",".join(BUDGETS))
    parser.add_argument("--evaluations", type=int, default=Sizes().evaluations, help="of every random search (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of random searches (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes of searches (default: %(default)s); their seconds are wall-clock then"
    )
    parser.add_argument("--no-training", action="store_true", help="without the epoch of ResNet-20")
    parser.add_argument("--test", action="store_true", help="the test images, at the end")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="start nothing after that")
    parser.add_argument("--results", type=Path, default=RESULTS / "allocation.json")
    options = parser.parse_args()
    allocators = [a for a in METHODS if not options.allocators or a in options.allocators.split(",")]
    clock, results = Clock(time.monotonic() + 60 * options.limit_minutes), Results(options.results)
    try:
        for network in [options.network] if options.network else sorted(WEIGHTS):
            arena = Arena(load(network), Sizes(evaluations=options.evaluations))
            wanted = list(learners(network, allocators, options.seeds))
            training = network == "resnet20" and not options.no_training
            run(arena, results, wanted, clock, budgets=options.budgets.split(","), training=training, jobs=options.jobs)
            if options.test:
                examine(arena, results, clock)
    except OutOfTime:
        print("the time limit is over: run again to go on.")
    rows = list(results.rows.values())
    text = table(rows, results.dense)
    options.results.with_suffix(".md").write_text(text)
    page = Path("runs") / "bench" / "allocation.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, chart(rows, results.dense).encode())
    print(text)


if __name__ == "__main__":
    main()
