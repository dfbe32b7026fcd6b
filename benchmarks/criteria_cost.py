"""What each criterion costs on top of running the network: CPU-seconds of one thread over the same images.

    python -m benchmarks.criteria_cost                                  # every criterion, both networks, median of 3
    python -m benchmarks.criteria_cost --network resnet56 --criteria nuclear_norm,di --repeats 1

ResNet-56 on 1,024 CIFAR-10 training images in batches of 128, torchvision's ResNet-50 on 128 images of noise at 224 x 224 in batches of 16
(EDGEPRUNE_DATA: cifar10/, weights/, peers/). A ratio is the criterion's whole cost over that of the bare forward pass, or of
forward and backward where the criterion takes gradients; one that runs the network many times also has its passes over the images
per second beside the bare network's; filter_ensemble has its masks judged per second, on the first batch, eight masks per layer. Criteria
and the bare pass take turns, so that a machine that slows down slows both. Writes benchmarks/results/criteria_cost.json and .md; rows that
are not asked for again stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import edgeprune as ep
from benchmarks import cifar10
from edgeprune import criteria
from edgeprune.registry import entries, find

DATA = cifar10.data_folder()
RESULTS = Path(__file__).parent / "results"
Batches = list[tuple[Tensor, Tensor]]
BRIEF: dict[str, dict[str, Any]] = {"filter_ensemble": {"masks": 8}}  # a rate is asked of it; all its masks would take hours


def resnet56() -> tuple[nn.Module, Batches]:
    """The trained network and 1,024 training images."""
    weights = DATA / "weights" / "resnet56-4bfd9763.th"
    model = ep.load_model(weights, factory="benchmarks.networks:resnet56", input_shape=(1, 3, 32, 32)).model
    train = ep.load_data(cifar10.datasets(), mean=cifar10.MEAN, std=cifar10.STD).train
    assert train is not None
    return model.eval(), list(train.batches(128, limit=1024))


def resnet50() -> tuple[nn.Module, Batches]:
    """Random weights, 128 images of noise of 10 classes."""
    sys.path.insert(0, str(DATA / "peers"))
    import torchvision_cpu_shim  # type: ignore[import-not-found]  # noqa: F401  before anything that imports torchvision

    from benchmarks.graph import library_model

    images = torch.randn(128, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(128) % 10
    model: nn.Module = library_model("resnet50")
    return model, list(zip(images.split(16), labels.split(16), strict=True))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Batches]]] = {"resnet56": resnet56, "resnet50": resnet50}


def forward(model: nn.Module, batches: Batches) -> None:
    """The bare forward pass."""
    with torch.no_grad():
        for x, _ in batches:
            model(x)


def forward_backward(model: nn.Module, batches: Batches) -> None:
    """Forward and backward, gradients of all parameters."""
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        torch.autograd.grad(loss, list(model.parameters()))


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(network: str, names: Iterable[str], repeats: int) -> list[dict[str, Any]]:
    """One row per criterion."""
    model, batches = NETWORKS[network]()
    graph = ep.trace(model, batches[0][0][:1])
    seen: list[int] = []
    forward(model, batches[:1])
    rows = []
    for name in names:
        used = batches[:1] if name in BRIEF else batches
        images = sum(len(x) for x, _ in used)
        bare: Callable[[nn.Module, Batches], None] = forward
        if "gradients" in find("criteria", name, "criterion").NEEDS:
            bare = forward_backward
        pairs = []
        for _ in range(repeats):
            base = cpu_seconds(partial(bare, model, used))
            seen.clear()
            counting = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
            started = time.process_time()
            scores = criteria.score(graph, model, name, data=used, **BRIEF.get(name, {}))
            pairs.append((base, time.process_time() - started))
            counting.remove()
        base, total = median(b for b, _ in pairs), median(t for _, t in pairs)
        passes = sum(fit["masks"] for fit in scores.facts["fits"]) if name in BRIEF else sum(seen) / images
        row = {"network": network, "criterion": name, "images": images, "repeats": repeats, "passes": round(passes, 3)}
        row |= {"against": bare.__name__, "bare_cpu_s": round(base, 3), "cpu_s": round(total, 3), "ratio": round(total / base, 3)}
        row["passes_per_s"], row["bare_passes_per_s"] = round(passes / total, 3), round(1 / base, 3)
        rows.append(row)
        print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| network | criterion | images | bare pass, CPU-s | criterion, CPU-s | ratio | passes | passes per s (bare) | repeats |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        against = "" if r["against"] == "forward" else " (forward and backward)"
        speed = f"{r['passes_per_s']:.2f} ({r['bare_passes_per_s']:.2f})" if r["passes"] > 1 else "-"
        lines.append(
            f"| {r['network']} | {r['criterion']} | {r['images']} | {r['bare_cpu_s']:.2f}{against} | {r['cpu_s']:.2f} | "
            f"{r['ratio']:.2f} | {r['passes']:g} | {speed} | {r['repeats']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked, keep the other rows, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(NETWORKS))
    parser.add_argument("--criteria", default=",".join(e.name for e in entries("criteria")))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "criteria_cost.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for network in [options.network] if options.network else NETWORKS:
        found = measure(network, options.criteria.split(","), options.repeats)
        new = {(r["network"], r["criterion"]) for r in found}
        rows = sorted([r for r in rows if (r["network"], r["criterion"]) not in new] + found, key=lambda r: (r["network"], r["criterion"]))
        RESULTS.mkdir(exist_ok=True)
        machine = {"cpu_count": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__, "threads": 1}
        file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
        (RESULTS / "criteria_cost.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
