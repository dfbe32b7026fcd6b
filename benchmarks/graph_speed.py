"""What tracing and slimming cost: against Torch-Pruning, against one forward pass, and as networks get deeper.

    python -m benchmarks.graph speed [NAME …]           # beside Torch-Pruning: pip install --no-deps torch-pruning==1.6.1
    python -m benchmarks.graph depth                    # CIFAR ResNets of 20 to 1202 layers

Times are CPU-seconds (time.process_time) on one thread: the median of ROUNDS rounds after one that is not counted. A round measures
a forward pass, ours and the peer's one after the other in one process, with the garbage collected before each, so that whatever
else the machine does meets all of them alike. Ours is `trace`, then `slim` to half of every group; the peer's is its dependency
graph with an L1 magnitude pruner, then one step to half of every layer but the classifier, on a copy made outside the timing.

Peak memory is the resident set's high-water mark (ru_maxrss) of a fresh process that does one thing once: a forward pass, or trace
and slim (which hold a forward pass themselves); the extra is the difference of the two.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import edgeprune as ep
from benchmarks.graph import DETECTORS, RESULTS, library_model
from benchmarks.networks import resnet

ROUNDS = 5
PEER = "torch-pruning==1.6.1"
DEPTHS = (20, 56, 110, 218, 434, 866, 1202)
# Network -> what trace + slim may take at most, CPU-seconds on one thread.
LIMITS_S: dict[str, float | None] = {
    "resnet18": None,
    "resnet50": 0.6,
    "mobilenet_v2": 0.3,
    "densenet121": 0.8,
    "cifar_resnet110": 0.4,
    "efficientnet_b0": None,
    "vgg16_bn": None,
    "convnext_tiny": None,
    "swin_t": None,
}
EXTRA_LIMIT_MB = 300
PROCESS_SECONDS = 180
PROCESS_BYTES = 6 * 2**30  # of address space: the peer's index lists have taken all there is


def network(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A network with random weights in eval mode, and an example: cifar_resnetN at 32², detectors at 320², everything else at 224²."""
    if name.startswith("cifar_resnet"):
        torch.manual_seed(0)
        return resnet(int(name.removeprefix("cifar_resnet"))).eval(), (torch.randn(1, 3, 32, 32),)
    model = library_model(name)
    if any(d in name for d in DETECTORS):
        return model, ([torch.rand(3, 320, 320)],)
    return model, (torch.randn(1, 3, 224, 224),)


def times(name: str, rounds: int = ROUNDS, *, with_peer: bool = True) -> dict[str, Any]:
    """Medians of one network in this process. The peer's are None where it is absent or fails; `peer_note` says what went wrong with it."""
    model, example = network(name)
    seconds: dict[str, list[float]] = {}
    peer_note = None if with_peer else "not asked for"
    pruned: nn.Module = model
    for counted in range(-1, rounds):
        found = _ours(model, example)
        if peer_note is None:
            try:
                pruned = copy.deepcopy(model)
                found |= _peers(pruned, example)
            except ImportError:
                peer_note = f"not installed: pip install --no-deps {PEER}"
            except Exception as error:  # noqa: BLE001  the peer may raise anything
                peer_note = _one_line(error)
        if counted >= 0:
            for key, value in found.items():
                seconds.setdefault(key, []).append(value)
    medians: dict[str, Any] = {key: round(statistics.median(values), 4) for key, values in seconds.items() if len(values) == rounds}
    peer = ("peer_graph_cpu_s", "peer_step_cpu_s")
    if peer_note is None:
        peer_note = _flaw(pruned, example)
    return {"network": name, **medians, **{key: medians.get(key) for key in peer}, "peer_note": peer_note}


def _flaw(pruned: nn.Module, example: tuple[Any, ...]) -> str | None:
    """Why a pruned network does not run, if so."""
    try:
        with torch.no_grad():
            pruned(*example)
    except Exception as error:  # noqa: BLE001  a broken network may raise anything
        return f"its pruned network does not run ({_one_line(error)})"
    return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _ours(model: nn.Module, example: tuple[Any, ...]) -> dict[str, float]:
    with torch.no_grad():
        forward, _ = _timed(lambda: model(*example))
    tracing, graph = _timed(lambda: ep.trace(model, example))
    slimming, _ = _timed(lambda: ep.slim(model, graph, ep.Plan.uniform(graph, keep=0.5)))
    return {"forward_cpu_s": forward, "trace_cpu_s": tracing, "slim_cpu_s": slimming, "trace_and_slim_cpu_s": tracing + slimming}


def _peers(own: nn.Module, example: tuple[Any, ...]) -> dict[str, float]:
    """Torch-Pruning, which prunes the network it is given; raises ImportError where it is not installed, and whatever it raises itself."""
    import torch_pruning

    last = [m for m in own.modules() if isinstance(m, nn.Linear)][-1:]
    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    options = {"importance": importance, "pruning_ratio": 0.5, "ignored_layers": last}
    building, pruner = _timed(lambda: torch_pruning.pruner.MagnitudePruner(own, example, **options))
    stepping, _ = _timed(pruner.step)
    return {"peer_graph_cpu_s": building, "peer_step_cpu_s": stepping}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def peak_mb(name: str, what: str) -> int:
    """High-water mark of this process, MiB, after one forward pass ("forward") or trace and slim ("slim"); for fresh processes."""
    model, example = network(name)
    if what == "forward":
        with torch.no_grad():
            model(*example)
    else:
        graph = ep.trace(model, example)
        ep.slim(model, graph, ep.Plan.uniform(graph, keep=0.5))
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def exponent(depths: Iterable[float], seconds: Iterable[float]) -> float:
    """The p of seconds ~ depth^p, by least squares on logarithms."""
    return statistics.linear_regression([math.log(d) for d in depths], [math.log(s) for s in seconds]).slope


def fresh(*arguments: str) -> Any:
    """What this file prints for these arguments in a process of its own; a network that fails there gives {"error": its last line}."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.graph_speed", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_SECONDS, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {PROCESS_SECONDS} s"}
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def speed(names: list[str]) -> dict[str, Any]:
    """Times and peak memory of every network, each in fresh processes; asked for by name, they replace their rows of the last result."""
    last = RESULTS / "graph_speed.json"
    rows = [row for row in json.loads(last.read_text())["rows"] if row["network"] not in names] if names and last.is_file() else []
    for name in names or LIMITS_S:
        row = fresh("times", name)
        if "error" in row:  # a peer that takes all memory or never ends takes us with it
            row = fresh("times", name, "--no-peer") | {"peer_note": f"the process that ran both: {row['error']}"}
        if "error" not in row:
            forward, slim = (fresh("peak", name, what) for what in ("forward", "slim"))
            row |= {"forward_peak_mb": forward, "peak_mb": slim, "extra_mb": slim - forward, "limit_cpu_s": LIMITS_S.get(name)}
        rows.append({"network": name} | row)
        print(json.dumps(rows[-1]), flush=True)
    return {"machine": machine(), "rounds": ROUNDS, "extra_limit_mb": EXTRA_LIMIT_MB, "peer": PEER, "rows": rows}


def depth() -> dict[str, Any]:
    """Times of CIFAR ResNets, each in a fresh process, and the exponents of their growth."""
    rows = []
    for layers in DEPTHS:
        rows.append({"depth": layers} | fresh("times", f"cifar_resnet{layers}", "--no-peer"))
        print(json.dumps(rows[-1]), flush=True)
    parts = ("forward_cpu_s", "trace_cpu_s", "slim_cpu_s", "trace_and_slim_cpu_s")
    exponents = {part: round(exponent(DEPTHS, [row[part] for row in rows]), 3) for part in parts}
    return {"machine": machine(), "rounds": ROUNDS, "rows": rows, "exponents": exponents}


def machine() -> dict[str, str]:
    """What the figures depend on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": model, "python": platform.python_version(), "torch": torch.__version__, "edgeprune": version("edgeprune")}


def speed_table(result: dict[str, Any]) -> str:
    """The speed part as Markdown."""
    title = f"CPU-seconds on one thread, median of {result['rounds']}; {result['machine']['cpu']}, torch {result['machine']['torch']}."
    lines = [
        "# Trace and slim beside Torch-Pruning",
        "",
        f"{title} Peer: {result['peer']}. Memory: high-water mark of a fresh process, MiB.",
        "",
        "| network | forward | trace | slim | trace + slim | limit | peer graph + pruner | peer step | peer total | peer | extra memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"| {row['network']} | {row['error']} |" + " |" * 9)
            continue
        graph, step = row["peer_graph_cpu_s"], row["peer_step_cpu_s"]
        peer = [f"{graph:.3f}", f"{step:.3f}", f"{graph + step:.3f}"] if graph is not None else ["", "", ""]
        own = [f"{row[k]:.3f}" for k in ("forward_cpu_s", "trace_cpu_s", "slim_cpu_s", "trace_and_slim_cpu_s")]
        limit = "" if row["limit_cpu_s"] is None else f"{row['limit_cpu_s']}"
        lines.append(f"| {' | '.join([row['network'], *own, limit, *peer, row['peer_note'] or '', str(row['extra_mb'])])} |")
    return "\n".join(lines) + "\n"


def depth_table(result: dict[str, Any]) -> str:
    """The depth part as Markdown."""
    parts = ("forward_cpu_s", "trace_cpu_s", "slim_cpu_s", "trace_and_slim_cpu_s")
    lines = [
        "# Trace and slim of CIFAR ResNets by depth",
        "",
        f"CPU-seconds on one thread, 32x32, median of {result['rounds']}; {result['machine']['cpu']}. Last row: p of seconds ~ depth^p.",
        "",
        "| layers | forward | trace | slim | trace + slim | per layer, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        values = [f"{row[part]:.3f}" for part in parts]
        lines.append(f"| {row['depth']} | {' | '.join(values)} | {1000 * row[parts[-1]] / row['depth']:.2f} |")
    lines.append(f"| p | {' | '.join(str(result['exponents'][part]) for part in parts)} | |")
    return "\n".join(lines) + "\n"


def write(part: str, result: dict[str, Any], table: str) -> None:
    """benchmarks/results/graph_<part>.json and .md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"graph_{part}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / f"graph_{part}.md").write_text(table, encoding="utf-8")


def main() -> None:
    """One measurement in this process, printed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("times", "peak"))
    parser.add_argument("network")
    parser.add_argument("what", nargs="?", choices=("forward", "slim"), default="slim")
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (PROCESS_BYTES, PROCESS_BYTES))
    if options.part == "times":
        print(json.dumps(times(options.network, with_peer=not options.no_peer)))
    else:
        print(json.dumps(peak_mb(options.network, options.what)))


if __name__ == "__main__":
    main()
