"""Tracing and slimming against Torch-Pruning: coverage over library networks, speed, and growth with depth.

    python -m benchmarks.graph coverage [NAME …]        # 50% uniform, 224² (320² for detectors), classifier kept
    python -m benchmarks.graph more [NAME …]            # the same for networks of other kinds (networks.MORE), at their own sizes
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
from collections import Counter
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("EDGEPRUNE_DATA", "../shared/data"))
RESULTS = Path(__file__).parent / "results"
DETECTORS = ("ssd", "retinanet", "fcos", "rcnn")
BACKBONES = (*DETECTORS, "deeplab", "lraspp", "fcn")
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t", "mvit_v1_b", "mvit_v2_s")
LIMIT_SECONDS = 240


def library_model(name: str) -> Any:
    """A torchvision or timm network with random weights; no batch norm is trivial and no branch is silenced by constant parameters."""
    import torch

    sys.path.insert(0, str(DATA / "peers"))
    import torchvision_cpu_shim  # type: ignore[import-not-found]  # noqa: F401  makes torchvision importable on a CPU build

    import timm  # isort: skip  after the shim: it imports torchvision
    import torchvision  # isort: skip

    torch.manual_seed(0)
    if name.startswith("timm:"):
        model = timm.create_model(name[5:])
    else:
        extra = {"weights_backbone": None} if any(d in name for d in BACKBONES) else {}
        model = torchvision.models.get_model(name, weights=None, **extra)
    if hasattr(model, "transform_input"):
        setattr(model, "transform_input", False)  # noqa: B010  GoogLeNet and Inception; a plain assignment fails the type checker
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and float(parameter.std(correction=0)) == 0:  # zero or layer-scale initialisation
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def example_of(name: str, model: Any, samples: int) -> tuple[Any, ...]:
    """Noise of the shape a network takes: 320² for detectors, 16 frames for video, the size a network is bound to, else 224²."""
    import torch

    if any(d in name for d in DETECTORS):
        return ([torch.rand(3, 320, 320)],)
    if name in VIDEO:
        return (torch.randn(samples, 3, 16, *((224, 224) if "mvit" in name else (112, 112))),)
    config = getattr(model, "pretrained_cfg", None) or {}
    bound = config.get("min_input_size") or (config.get("fixed_input_size") and config.get("input_size"))
    return (torch.randn(samples, *(bound or (3, 224, 224))),)


def examine(name: str) -> dict[str, Any]:
    """Trace one network, slim it to half the widths, prove it, and count."""
    warnings.simplefilter("ignore")
    import torch

    import edgeprune as ep
    from edgeprune.graph.running import tensors_in

    torch.set_num_threads(1)
    model = library_model(name)
    detector = any(d in name for d in DETECTORS)
    example = example_of(name, model, 2)
    if not detector:
        norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.train()  # these alone: some networks run other branches when they train
        with torch.no_grad():
            model(*example_of(name, model, 4))
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
        "reasons": dict(Counter(graph.frozen.values()).most_common()),
        "kept_only": len(graph.mixing),
    }
    proof = ep.prove(model, graph, plan, small, example)
    after = ep.trace(small, example)
    with torch.no_grad():
        shapes = [[tuple(t.shape) for t in tensors_in(network(*example))] for network in (model, small)]
    if not detector and shapes[0] != shapes[1]:
        return row | {"status": f"outputs of shape {shapes[1]} instead of {shapes[0]}"}
    return row | {
        "status": "ok",
        "error": proof.max_relative_error,
        "dtype": proof.dtype,
        "macs_removed": 1 - after.macs / graph.macs,
        "params_removed": 1 - after.params / graph.params,
    }


def coverage(names: list[str], seconds: int, part: str = "coverage") -> None:
    """One fresh process per network; rows are kept as they come, and a network that has one is run again only when it is named.

    `part` "coverage": the networks that the peer was tried on; "more": networks.MORE, which it was not.
    """
    with (DATA / "peers" / "torch_pruning_coverage.csv").open() as file:
        peer = {r["model"]: r for r in csv.DictReader(file) if r["hints"] != "True"}
    if part == "more":
        from benchmarks.networks import MORE  # which imports torch

        peer = {name: {} for name in MORE}
    path = RESULTS / f"graph_{part}.json"
    rows = {row["network"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
    for name in names or [name for name in peer if name not in rows]:
        rows[name] = row = _in_a_process(name, seconds) | {"torch_pruning": _of_peer(peer.get(name, {}))}
        cpu_s = row.get("trace_cpu_s", 0) + row.get("slim_cpu_s", 0)
        print(f"{name:45} {row['status'][:90]:12} {row.get('macs_removed', 0):.1%} {row.get('error', -1):.0e} {cpu_s:.2f}s", flush=True)
        ordered = [rows[n] for n in [*peer, *(n for n in rows if n not in peer)] if n in rows]
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(ordered, indent=2) + "\n")
        path.with_suffix(".md").write_text(coverage_table(ordered, len(peer), part))


def _in_a_process(name: str, seconds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.graph", "one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"network": name, "status": f"over {seconds} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"network": name, "status": (done.stderr.strip().splitlines() or ["killed"])[-1][:300]}
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def _of_peer(row: dict[str, str]) -> dict[str, Any]:
    """What Torch-Pruning did with the same network: the MACs it removed where it ran, else where it stopped."""
    if row.get("status") != "ok":
        return {"status": f"{row.get('status', 'not run')} {row.get('stage', '')}".strip()}
    removed = [float(v) for v in (row["macs_red"],) if v and float(v) <= 1]
    return {"status": "ok", "macs_removed": removed[0] if removed else None}


def coverage_table(rows: list[dict[str, Any]], total: int, part: str = "coverage") -> str:
    """The results as Markdown."""
    good = [r for r in rows if r["status"] == "ok"]
    smaller = [r for r in good if r["macs_removed"] > 0]
    theirs = [r for r in rows if r["torch_pruning"]["status"] == "ok"]
    beside = f" Torch-Pruning ends without one on {len(theirs)} of the same {len(rows)}." if part == "coverage" else ""
    lines = [
        "# Library networks cut to half of every width" if part == "coverage" else "# Further library networks cut to half of every width",
        "",
        f"{len(rows)} of {total} networks run; {len(good)} end without an error; {len(smaller)} are smaller, with outputs of the "
        f"same shapes.{beside} `python -m benchmarks.graph {part}`.",
        "",
        "Error: largest difference between the slim network and the masked dense one, as a share of the output's range. *Kept only*: the",
        "norms and sums over channels that the dense one computes over the kept channels alone. CPU-seconds of tracing and slimming.",
        "",
        "| network | groups | MACs removed | parameters removed | error | precision | kept only | CPU-s | extra MB | Torch-Pruning "
        "| what stays |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        peer = r["torch_pruning"]
        theirs_removed = f"{peer['macs_removed']:.1%}" if peer.get("macs_removed") is not None else peer["status"]
        if r["status"] != "ok":
            lines.append(f"| {r['network']} | | {r['status'].replace('|', '/')} | | | | | | | {theirs_removed} | |")
            continue
        stays = "; ".join(f"{reason} ({n})" for reason, n in r["reasons"].items())
        lines.append(
            f"| {r['network']} | {r['groups']} | {r['macs_removed']:.1%} | {r['params_removed']:.1%} | {r['error']:.1e} | {r['dtype']} "
            f"| {r['kept_only']} | {r['trace_cpu_s'] + r['slim_cpu_s']:.2f} | {r['extra_mb']} | {theirs_removed} | {stays} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the asked part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("coverage", "more", "speed", "depth", "one"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=int, default=LIMIT_SECONDS, help="wall-clock limit for one network")
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
    coverage(options.names, options.seconds, options.part)


if __name__ == "__main__":
    main()
