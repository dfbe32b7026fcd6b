"""CPU-seconds of every allocator that needs no images, on large networks and several figures: how long a user waits for a plan.

    python -m benchmarks.allocation_speed

Networks: ResNet-50 (torchvision), and a chain of 200 convolutions whose widths are free. Budgets: half of the MACs, and latency, memory and
size on a Raspberry Pi 4 at once (halfway between the least and the dense). Widths in multiples of 8 and in any number. The knapsack also
says how much of the value that plain ranking keeps it gains. Writes benchmarks/results/allocation_speed.json and .md.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from torch import nn

import edgeprune as ep
from benchmarks.accuracy import RESULTS
from benchmarks.graph import library_model
from edgeprune.allocate.search import Search
from edgeprune.device.card import device
from edgeprune.device.cost import CostModel
from edgeprune.plan import Budget
from edgeprune.run import write_atomic, write_json
from edgeprune.widths import WidthRules

METHODS = ("uniform", "global", "knapsack")


def chain(groups: int = 200) -> nn.Module:
    """Convolutions of 32 to 128 channels, one group each."""
    layers: list[nn.Module] = []
    before = 3
    for number in range(groups):
        width = 32 * (1 + number * 4 // groups)
        layers += [nn.Conv2d(before, width, 3, 2 if number % 50 == 0 else 1, 1), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Untrained networks and an input."""
    return {"resnet50": (library_model("resnet50"), torch.zeros(1, 3, 224, 224)), "chain of 200": (chain(), torch.zeros(1, 3, 64, 64))}


def halfway(search: Search, names: tuple[str, ...]) -> Budget:
    """A budget between the least and the dense figure."""
    low, high = (search.figures(w[None]) for w in (search.smallest, search.graph.dense_widths))
    return Budget(**{name: float(low[name][0] + high[name][0]) / 2 for name in names})


def measure(name: str, model: nn.Module, x: torch.Tensor, round_to: int) -> list[dict[str, Any]]:
    """One row per method and budget."""
    graph, cost = ep.trace(model, x), CostModel(device("rpi4"))
    scores = ep.score(graph, model, "l1")
    rules = WidthRules(round_to=round_to)
    rows = []
    for figures in (("macs",), ("latency_ms", "peak_memory_bytes", "size_bytes")):
        budget = halfway(Search(graph, scores, Budget(**dict.fromkeys(figures, 1e12)), cost, rules=rules), figures)
        search = Search(graph, scores, budget, cost, rules=rules, concave=True)
        for method in METHODS:
            started = time.process_time()
            plan = ep.allocate(graph, scores, budget, method=method, cost=cost, round_to=round_to)
            seconds = time.process_time() - started
            levels = [list(a).index(len(plan.keep[g.name])) for g, a in zip(graph.groups, search.allowed, strict=True)]
            value = float(sum(v[level] for v, level in zip(search.values, levels, strict=True)))
            use = float(search.use(search.from_levels(np.array(levels))[None]).max())
            rows.append(
                {
                    "network": name,
                    "groups": len(graph.groups),
                    "round_to": round_to,
                    "budget": "+".join(figures),
                    "allocator": method,
                    "cpu_seconds": round(seconds, 2),
                    "log_importance": round(value, 4),
                    "budget_used": round(use, 4),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure all and write the table."""
    rows = [row for name, (model, x) in networks().items() for round_to in (8, 1) for row in measure(name, model, x, round_to)]
    write_json(RESULTS / "allocation_speed.json", {"torch": torch.__version__, "rows": rows})
    head = "| network | groups | widths | budget | allocator | CPU-s | log importance kept | budget used |\n" + "|---" * 8 + "|\n"
    lines = [
        f"| {r['network']} | {r['groups']} | multiples of {r['round_to']} | {r['budget']} | {r['allocator']} | {r['cpu_seconds']} | "
        f"{r['log_importance']:.2f} | {r['budget_used']:.1%} |"
        for r in rows
    ]
    write_atomic(RESULTS / "allocation_speed.md", (head + "\n".join(lines) + "\n").encode())
    print(json.dumps(rows[-1]))


if __name__ == "__main__":
    main()
