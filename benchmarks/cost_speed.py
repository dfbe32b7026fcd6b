"""How fast predictions are: `python -m benchmarks.cost_speed`. CPU-seconds on one thread, so other work on the machine hardly counts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
PLANS, REPEATS = 10_000, 5


def main() -> None:
    """Measures, prints, writes."""
    import torch

    from benchmarks.cost_tables import timm_network
    from edgeprune.device.card import device
    from edgeprune.device.cost import CostModel, predict_graph
    from edgeprune.device.kernels import kernels
    from edgeprune.graph.trace import trace

    torch.set_num_threads(1)
    graph = trace(timm_network("resnet50"), torch.zeros(1, 3, 224, 224))
    pi = device("rpi4")
    seconds = min(_seconds(lambda: predict_graph(graph, None, pi)) for _ in range(REPEATS))
    made, model = kernels(graph), CostModel(pi)
    plans = np.random.default_rng(0).integers(1, graph.dense_widths, size=(PLANS, len(graph.groups)))
    many = min(_seconds(lambda: model.of_widths_ms(made, plans)) for _ in range(REPEATS))
    found = {"network": "resnet50", "predict_ms": round(1e3 * seconds, 2), "plans_per_second": round(PLANS / many)}
    print(f"resnet50: {found['predict_ms']} CPU-ms for a prediction, {found['plans_per_second']:,} plans a CPU-second")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cost_speed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
