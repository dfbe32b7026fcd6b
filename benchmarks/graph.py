"""Tracing and slimming against Torch-Pruning: coverage over library networks, speed, and growth with depth.

    python -m benchmarks.graph coverage [NAME …]        # 50% uniform, 224² (320² for detectors), classifier kept
    python -m benchmarks.graph speed [NAME …]           # CPU time and memory, beside Torch-Pruning (graph_speed.py)
    python -m benchmarks.graph depth                    # CIFAR ResNets of 20 to 1202 layers (graph_speed.py)

The list of networks and the peer's figures come from EDGEPRUNE_DATA/peers. Every network runs in a fresh process with a time limit.
Writes benchmarks/results/graph_<part>.json and .md. Times are CPU-seconds on one thread.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("EDGEPRUNE_DATA", "../shared/data"))
RESULTS = Path(__file__).parent / "results"
DETECTORS = ("ssdlite", "retinanet", "fcos", "fasterrcnn")
LIMIT_SECONDS = 240


def library_model(name: str) -> Any:
    """A torchvision or timm network with random weights and batch norms that are not trivial."""
    import torch

    sys.path.insert(0, str(DATA / "peers"))
    import torchvision_cpu_shim  # type: ignore[import-not-found]  # noqa: F401  makes torchvision importable on a CPU build

    import timm  # isort: skip  after the shim: it imports torchvision
    import torchvision  # isort: skip

    torch.manual_seed(0)
    if name.startswith("timm:"):
        model = timm.create_model(name[5:])
    else:
        extra = {"weights_backbone": None} if any(d in name for d in (*DETECTORS, "deeplab", "lraspp", "fcn")) else {}
        model = torchvision.models.get_model(name, weights=None, **extra)
    if hasattr(model, "transform_input"):
        setattr(model, "transform_input", False)  # noqa: B010  GoogLeNet and Inception
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


def examine(name: str) -> dict[str, Any]:
    """Trace one network, slim it to half the widths, prove it, and count."""
    warnings.simplefilter("ignore")
    import torch

    import edgeprune as ep

    torch.set_num_threads(1)
    model = library_model(name)
    detector = any(d in name for d in DETECTORS)
    example: Any = ([torch.rand(3, 320, 320)],) if detector else (torch.randn(2, 3, 224, 224),)
    if not detector:
        model.train()
        norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
        with torch.no_grad():
            model(torch.randn(4, 3, 224, 224))
        model.eval()
    with torch.no_grad():
        model(*example)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    graph = ep.trace(model, example)
    traced = time.process_time()
    plan = ep.Plan.uniform(graph, keep=0.5)
    small = ep.slim(model, graph, plan)
    slimmed = time.process_time()
    row: dict[str, Any] = {
        "network": name,
        "groups": len(graph.groups),
        "trace_cpu_s": round(traced - started, 3),
        "slim_cpu_s": round(slimmed - traced, 3),
        "extra_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
        "reasons": sorted(set(graph.frozen.values())),
    }
    proof = ep.prove(model, graph, plan, small, example)
    after = ep.trace(small, example)
    return row | {
        "status": "ok",
        "error": proof.max_relative_error,
        "dtype": proof.dtype,
        "macs_removed": 1 - after.macs / graph.macs,
        "params_removed": 1 - after.params / graph.params,
    }


def coverage(names: list[str]) -> list[dict[str, Any]]:
    """One fresh process per network."""
    with (DATA / "peers" / "torch_pruning_coverage.csv").open() as file:
        peer = {r["model"]: r for r in csv.DictReader(file) if r["hints"] != "True"}
    rows = []
    for name in names or list(peer):
        command = [sys.executable, "-m", "benchmarks.graph", "one", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
            lines = done.stdout.strip().splitlines()
            good = done.returncode == 0 and lines
            row = json.loads(lines[-1]) if good else {"network": name, "status": done.stderr.strip().splitlines()[-1][:300]}
        except subprocess.TimeoutExpired:
            row = {"network": name, "status": f"over {LIMIT_SECONDS} s"}
        other = peer.get(name, {})
        row["torch_pruning"] = {"status": other.get("status"), "macs_removed": float(other.get("macs_red") or 0) or None}
        rows.append(row)
        seconds = row.get("trace_cpu_s", 0) + row.get("slim_cpu_s", 0)
        print(f"{name:45} {row['status'][:90]:12} {row.get('macs_removed', 0):.0%} {seconds:.2f}s", flush=True)
    return rows


def main() -> None:
    """Run the asked part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("coverage", "speed", "depth", "one"))
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.part == "one":
        print(json.dumps(examine(options.names[0])))
        return
    if options.part in ("speed", "depth"):
        from benchmarks import graph_speed  # which needs this file's networks

        result = graph_speed.speed(options.names) if options.part == "speed" else graph_speed.depth()
        table = graph_speed.speed_table(result) if options.part == "speed" else graph_speed.depth_table(result)
        graph_speed.write(options.part, result, table)
        return
    rows = coverage(options.names)
    if not options.names:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"graph_{options.part}.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
