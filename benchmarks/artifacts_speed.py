"""How much faster artifacts become on this machine: dense and pruned, ONNX Runtime and LiteRT, 1 and 2 threads, in one run.

    python -m benchmarks.artifacts latency

All sessions are open at once in one process. In each of ROUNDS rounds every session runs one block of inferences, in an order drawn
anew, and the fastest of the block counts: what else the machine does hits all of them alike, and a ratio is taken within its round.
Proportional: the speed-up if time fell exactly with the MACs. Writes benchmarks/results/artifacts_latency.json and .md.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.artifacts import CALIBRATION_IMAGES, CIFAR, calibrate, network
from benchmarks.graph import RESULTS

NETWORKS = ("cifar:resnet56", "mobilenet_v2")
KEEP_MACS = 0.5
ROUND_TO = 8
THREADS = (1, 2)
ROUNDS = 40
BLOCK_SECONDS = 0.05  # of one session in one round
FORMATS = {"onnx": "ONNX Runtime", "tflite": "LiteRT"}


def latency() -> None:
    """Measure every network and write the table."""
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "ai-edge-litert")},
        "rounds": ROUNDS,
        "networks": [],
    }
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            result["networks"].append(measured(name, Path(folder)))
        path = RESULTS / "artifacts_latency.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(result))


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Sizes, latencies and ratios of one network."""
    import edgeprune as ep

    model, images = network(name)
    graph = ep.trace(model, images[:1])
    plan = ep.allocate(graph, ep.score(graph, model, "l1"), ep.Budget(macs=KEEP_MACS), method="uniform", round_to=ROUND_TO)
    pruned = ep.slim(model, graph, plan)
    if name not in CIFAR:
        for net in (model, pruned):
            calibrate(net, images[:CALIBRATION_IMAGES])
    left = ep.trace(pruned, images[:1]).macs / graph.macs
    sessions: dict[str, Callable[[], None]] = {}
    sizes: dict[str, int] = {}
    for kind, net in (("dense", model), ("pruned", pruned)):
        for form in FORMATS:
            artifact = ep.export(net, images[:1], folder / f"{kind}.{form}", format=form, samples=images[-2:])
            sizes[f"{kind} {form}"] = artifact.size_bytes
            for threads in THREADS:
                sessions[f"{kind} {form} {threads}"] = session(artifact.path, threads)
    fastest_ms = rounds(sessions)
    rows = {}
    for key, values in fastest_ms.items():
        base = fastest_ms[key.replace("pruned", "dense")]
        ratios = sorted(b / v for b, v in zip(base, values, strict=True))
        rows[key] = {
            "latency_ms": statistics.median(values),
            "speedup": statistics.median(ratios),
            "speedup_low": ratios[len(ratios) // 10],
            "speedup_high": ratios[-1 - len(ratios) // 10],
        }
    return {"network": name, "macs": graph.macs, "macs_removed": 1 - left, "size_bytes": sizes, "rows": rows}


def session(path: Path, threads: int) -> Callable[[], None]:
    """A function that runs one inference on noise."""
    import numpy as np

    noise = np.random.default_rng(0)
    if path.suffix == ".tflite":
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
        (given,) = interpreter.get_input_details()
        interpreter.set_tensor(given["index"], noise.standard_normal(given["shape"], dtype=np.float32))
        run: Callable[[], None] = interpreter.invoke
        return run
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    loaded = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (node,) = loaded.get_inputs()
    feed = {node.name: noise.standard_normal([d if isinstance(d, int) else 1 for d in node.shape], dtype=np.float32)}
    return lambda: loaded.run(None, feed)


def rounds(sessions: dict[str, Callable[[], None]], *, total: int = ROUNDS, block_seconds: float = BLOCK_SECONDS) -> dict[str, list[float]]:
    """For every session the fastest inference of each of `total` rounds, in ms."""
    counts = {}
    for key, run in sessions.items():
        for _ in range(3):
            run()
        started = time.perf_counter()
        run()
        counts[key] = max(3, round(block_seconds / (time.perf_counter() - started)))
    order, shuffle = list(sessions), random.Random(0)
    found: dict[str, list[float]] = {key: [] for key in sessions}
    for _ in range(total):
        shuffle.shuffle(order)
        for key in order:
            run = sessions[key]
            run()  # the caches of this network
            times = []
            for _ in range(counts[key]):
                started = time.perf_counter()
                run()
                times.append(time.perf_counter() - started)
            found[key].append(1000 * min(times))
    return found


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Latency of artifacts on this machine",
        "",
        f"Measured on {result['machine']}, {', '.join(f'{n} {v}' for n, v in result['versions'].items())}. Every figure is the median of "
        f"{result['rounds']} interleaved rounds; brackets: the middle 80% of them. `make bench-artifacts`.",
        "",
        "| network | artifact | runtime | threads | MB | ms | speed-up over dense | MACs removed | of the proportional speed-up |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in result["networks"]:
        proportional = 1 / (1 - found["macs_removed"])
        for key, row in found["rows"].items():
            kind, form, threads = key.split()
            gained = "1" if kind == "dense" else f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
            share = "" if kind == "dense" else f"{row['speedup'] / proportional:.2f}"
            removed = "" if kind == "dense" else f"{found['macs_removed']:.1%}"
            lines.append(
                f"| {found['network']} | {kind} fp32 | {FORMATS[form]} | {threads} | {found['size_bytes'][f'{kind} {form}'] / 1e6:.2f} "
                f"| {row['latency_ms']:.2f} | {gained} | {removed} | {share} |"
            )
    return "\n".join(lines) + "\n"
