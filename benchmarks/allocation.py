"""Every allocator on CIFAR-10 ResNets: same scores, same budgets, accuracy and loss after BN recalibration and after reconstruction.

    python -m benchmarks.allocation                                    # goes on where it was; ResNet-20, then ResNet-56
    python -m benchmarks.allocation --network resnet20 --budgets macs-50 --evaluations 100 --limit-minutes 20

Scores: the criterion reconstruction. Budgets: half and 36% of the MACs, and a latency on this machine as its cost model predicts it
(halfway between the dense network and all layers at their narrowest). Channels in any number. Every figure is on 2,000 training images
that neither scores nor searches see; searches judge on others. The networks saw them all in their own training, so the figures compare
allocators and do not predict test accuracy; the loss is the divergence (KL, nats) from the dense network's answers beside the
cross-entropy. Random searches run with three seeds (ResNet-56: one). One epoch of fine-tuning, short, for ResNet-20 at -50%. Seconds are
CPU-seconds of one process.
One row per combination in benchmarks/results/allocation.json, written as it is measured. Needs EDGEPRUNE_DATA with cifar10/ and weights/.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import edgeprune as ep
from benchmarks.accuracy import RESULTS, WEIGHTS
from benchmarks.criteria import TRAINING, Bench, Clock, OutOfTime, Sizes, load
from edgeprune.allocate import Planner
from edgeprune.allocate.judge import divergence
from edgeprune.allocate.search import Search
from edgeprune.device.card import device
from edgeprune.device.cost import CostModel
from edgeprune.plan import Budget, Plan
from edgeprune.run import write_atomic
from edgeprune.train.finetune import finetune
from edgeprune.widths import WidthRules

LEARNED = "layer_compensated"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "global": ("global", {"per_cost": False}),
    "global per cost": ("global", {}),
    "knapsack": ("knapsack", {}),
    "DI per cost": ("di_greedy", {}),
    "DI structure (ours)": ("di_greedy", {"layer_choice": "structure"}),
    "layer-compensated": (LEARNED, {}),
    "LeGR as published": (LEARNED, {"start": (), "per_cost": False, "loss": "cross_entropy"}),
    "LcP as published": (LEARNED, {"start": (), "per_cost": False, "loss": "cross_entropy", "form": "additive"}),
    "LeGR by divergence": (LEARNED, {"start": (), "per_cost": False}),
    "DI greedy by accuracy": ("di_greedy", {"layer_choice": "accuracy", "share": 0.05, "images": 256}),
}
BUDGETS = ("macs-50", "macs-64", "latency")
TUNED = "macs-50"
SEEDS = 3
FITNESS = 256  # images that judge candidates, apart from all others


@dataclass(frozen=True)
class Cell:
    """One combination."""

    network: str
    budget: str
    allocator: str
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What rows are found by."""
        return tuple(asdict(self).values())


class Images:
    """Labelled batches that can be read again: the fitness images first, then others to recalibrate on and to learn DI from."""

    def __init__(self, bench: Bench) -> None:
        self._rest, self._held = bench.rest.hold_out(FITNESS, seed=1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._held.batches(128)
        yield from self._rest.batches(128, shuffle_seed=0, limit=1024)


def budget_of(bench: Bench, name: str, cost: CostModel) -> Budget:
    """The budget that a name stands for."""
    if name.startswith("macs-"):
        return Budget(macs=1 - int(name.removeprefix("macs-")) / 100)
    search = Search(bench.graph, bench.scores("reconstruction", 0), Budget(latency_ms=1.0), cost, rules=WidthRules(round_to=1))
    ends = [float(search.figures(w[None])["latency_ms"][0]) for w in (search.smallest, bench.graph.dense_widths)]
    return Budget(latency_ms=sum(ends) / 2)


def figures(bench: Bench, model: nn.Module) -> dict[str, float]:
    """Accuracy in percent, cross-entropy and divergence from the dense network in nats, on the validation images."""
    fast, dense = (_fast(copy.deepcopy(network)) for network in (model, bench.dense))
    with torch.inference_mode():
        logits = torch.cat([fast(x) for x, _ in bench.validation]).double()
        answers = torch.cat([dense(x) for x, _ in bench.validation]).double()
    labels = torch.cat([y for _, y in bench.validation])
    return {
        "accuracy": round(100 * float((logits.argmax(1) == labels).double().mean()), 3),
        "cross_entropy": round(float(nn.functional.cross_entropy(logits, labels)), 5),
        "divergence": round(divergence([answers], [logits]), 5),
    }


def _fast(network: nn.Module) -> nn.Module:
    convert: Any = network.eval().to  # torch's stubs lack this overload
    convert(memory_format=torch.channels_last)
    return network


def measure(bench: Bench, cell: Cell, evaluations: int) -> dict[str, Any]:
    """One row."""
    cost = CostModel(device("host"))
    budget, scores = budget_of(bench, cell.budget, cost), bench.scores("reconstruction", 0)
    method, options = METHODS[cell.allocator]
    searching = {"evaluations": evaluations, "seed": cell.seed} if method == LEARNED else {}
    started, clock = time.process_time(), time.monotonic()
    planner = Planner(
        bench.graph, scores, method=method, model=bench.dense, data=Images(bench), rules=WidthRules(round_to=1), **options, **searching
    )
    plan = planner.plan(budget, cost)
    seconds = time.process_time() - started
    row = {
        **asdict(cell),
        "plan": plan.to_json(),
        "plan_sha256": plan.sha256,
        "options": {k: v for k, v in options.items() if k != "start"},
        "search_cpu_seconds": round(seconds, 2),
        "search_seconds": round(time.monotonic() - clock, 2),
        "search": dict(planner.facts),
        "after": {stage: figures(bench, bench.small(plan, stage)) for stage in ("recalibrated", "reconstructed")},
        "macs_share": round(ep.trace(bench.small(plan, "pruned"), bench.example).macs / bench.graph.macs, 4),
    }
    evaluated = int(planner.facts.get("evaluations", 0))
    return row | ({"evaluations_per_cpu_second": round(evaluated / seconds, 3)} if evaluated else {})


def tune(bench: Bench, row: dict[str, Any]) -> None:
    """Adds the figures after one short epoch with the product's recipe."""
    plan = Plan.from_json(row["plan"])
    chosen = bench.rest.subset(np.random.default_rng(0).permutation(len(bench.rest))[:TRAINING])
    small, _ = finetune(bench.small(plan, "reconstructed"), bench.dense, chosen, None, ep.Recipe(epochs=1), seed=0)
    row["after"]["fine-tuned"] = figures(bench, small)


class Results:
    """The rows on disk; every change is a whole new file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content = json.loads(path.read_text()) if path.exists() else {"dense": {}, "rows": []}
        self.dense: dict[str, dict[str, float]] = content["dense"]
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {key(r): r for r in content["rows"]}

    def put(self, row: dict[str, Any]) -> None:
        """Add or replace a row."""
        self.rows[key(row)] = row
        machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        lines = ",\n".join(json.dumps(self.rows[k]) for k in sorted(self.rows))
        write_atomic(
            self._path, f'{{"machine": {json.dumps(machine)},\n"dense": {json.dumps(self.dense)},\n"rows": [\n{lines}\n]}}\n'.encode()
        )


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is found by."""
    return Cell(row["network"], row["budget"], row["allocator"], row["seed"]).key


def cells(network: str, allocators: list[str], budgets: list[str], seeds: int) -> Iterator[Cell]:
    """All combinations, budget by budget; more than one seed for random searches only, the first seed of all before the others."""
    for seed in range(seeds):
        for budget in budgets:
            for allocator in allocators:
                if not seed or METHODS[allocator][0] == LEARNED:
                    yield Cell(network, budget, allocator, seed)


def run(bench: Bench, results: Results, wanted: list[Cell], clock: Clock, *, evaluations: int, training: bool) -> None:
    """Everything for one network that is not on disk yet."""
    if bench.network not in results.dense:
        results.dense[bench.network] = figures(bench, bench.dense)
    for cell in wanted:
        row = results.rows.get(cell.key)
        if row is None or (row["search"].get("evaluations", evaluations) < evaluations and METHODS[cell.allocator][0] == LEARNED):
            clock.check()
            row = measure(bench, cell, evaluations)
            results.put(row)
            print(f"{cell.key} {row['after']} {row['search_cpu_seconds']} CPU-s", flush=True)
    for cell in wanted if training else ():
        row = results.rows[cell.key]
        if cell.budget == TUNED and not cell.seed and "fine-tuned" not in row["after"]:
            clock.check()
            tune(bench, row)
            results.put(row)
            print(f"{cell.key} fine-tuned {row['after']['fine-tuned']}", flush=True)


def table(rows: list[dict[str, Any]], dense: dict[str, dict[str, float]]) -> str:
    """One table per network and budget, the least loss after recalibration first, and whether the learned ranking beats plain global."""
    parts = []
    for network, budget in dict.fromkeys((r["network"], r["budget"]) for r in sorted(rows, key=key)):
        mine = [r for r in rows if (r["network"], r["budget"]) == (network, budget)]
        means = {name: _mean([r for r in mine if r["allocator"] == name]) for name in dict.fromkeys(r["allocator"] for r in mine)}
        lines = [
            f"### {network}, {budget} (dense: {dense[network]['accuracy']:.2f}%)\n",
            "| allocator | seeds | KL, recalibrated | accuracy | KL, reconstructed | accuracy | after 1 epoch | MACs | CPU-s "
            "| runs/CPU-s |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, m in sorted(means.items(), key=lambda item: item[1]["recalibrated divergence"]):
            lines.append(
                f"| {name} | {m['seeds']:.0f} | {m['recalibrated divergence']:.4f} | {m['recalibrated accuracy']:.2f} | "
                f"{m['reconstructed divergence']:.4f} | {m['reconstructed accuracy']:.2f} | {_word(m.get('fine-tuned accuracy'))} | "
                f"{m['macs_share']:.1%} | {m['search_cpu_seconds']:.1f} | {_word(m.get('evaluations_per_cpu_second'))} |"
            )
        parts.append("\n".join([*lines, *_verdict(means)]))
    return "\n\n".join(parts) + "\n"


def _mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    found = {f"{stage} {name}": v for stage, values in rows[0]["after"].items() for name, v in values.items()}
    for stage_name in found:
        stage, name = stage_name.rsplit(" ", 1)
        found[stage_name] = float(np.mean([r["after"][stage][name] for r in rows if stage in r["after"]]))
    plain = ("macs_share", "search_cpu_seconds", "evaluations_per_cpu_second")
    return found | {n: float(np.mean([r[n] for r in rows])) for n in plain if n in rows[0]} | {"seeds": float(len(rows))}


def _word(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _verdict(means: dict[str, dict[str, float]]) -> list[str]:
    if "layer-compensated" not in means or "global" not in means:
        return []
    mine, other = (means[name]["recalibrated divergence"] for name in ("layer-compensated", "global"))
    word = "beats" if mine < other else "does not beat"
    return [f"\nlayer-compensated {word} plain global on validation loss: {mine:.4f} against {other:.4f} nats after BN recalibration."]


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(WEIGHTS), help="one network (default: resnet20, then resnet56)")
    parser.add_argument("--allocators", help="names of the table, comma-separated without spaces around (default: all)", default="")
    parser.add_argument("--budgets", default=",".join(BUDGETS))
    parser.add_argument("--evaluations", type=int, default=400, help="of every random search (default: %(default)s)")
    parser.add_argument("--seeds", type=int, help="of random searches (default: 3, ResNet-56: 1)")
    parser.add_argument("--no-training", action="store_true", help="without the epoch of ResNet-20")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="stop after the row that passes this")
    parser.add_argument("--results", type=Path, default=RESULTS / "allocation.json")
    options = parser.parse_args()
    allocators = [a for a in METHODS if not options.allocators or a in options.allocators.split(",")]
    clock, results = Clock(time.monotonic() + 60 * options.limit_minutes), Results(options.results)
    try:
        for network in [options.network] if options.network else sorted(WEIGHTS):
            bench = load(network, Sizes(), Path("runs") / "bench" / "criteria")
            seeds = options.seeds or (SEEDS if network == "resnet20" else 1)
            wanted = list(cells(network, allocators, options.budgets.split(","), seeds))
            training = network == "resnet20" and not options.no_training
            run(bench, results, wanted, clock, evaluations=options.evaluations, training=training)
    except OutOfTime:
        print("the time limit is over: run again to go on.")
    text = table(list(results.rows.values()), results.dense)
    options.results.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
