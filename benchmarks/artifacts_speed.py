"""How much faster artifacts become on this machine: dense, pruned, pruned int8 and mixed, ONNX Runtime and LiteRT, 1 and 2 threads.

    python -m benchmarks.artifacts latency [--keep DIR]   # artifacts that DIR holds from an earlier run are not written again

All sessions of a network are open at once in one process. In each of ROUNDS rounds every session runs one block of inferences, in an
order drawn anew, and the fastest of the block counts: what else the machine does hits all of them alike, and a ratio is taken within
its round. Proportional: the speed-up over dense fp32 if time fell exactly with the MACs. Ways to prune are options of `edgeprune
compress --device host`, all with the allocator knapsack and l1 scores; each network's first is the one that is quantized, calibrated on
32 images. The mixed plan is chosen by onnxruntime's timings, for both formats. Writes benchmarks/results/artifacts_latency.json and .md.
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

# What is asked for, by network and by the name of the way: (options as they are typed, the same for allocate()).
WAYS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "cifar:resnet56": {
        "layer1-whole": ("--macs 0.5 --keep-dense 'layer1.*'", {"macs": 0.5, "keep_dense": ("layer1.*",)}),
        "plain": ("--macs 0.5", {"macs": 0.5}),
        "by-16": ("--macs 0.58 --round-to 16", {"macs": 0.58, "round_to": 16}),
    },
    "mobilenet_v2": {"plain": ("--macs 0.5", {"macs": 0.5}), "by-16": ("--macs 0.5 --round-to 16", {"macs": 0.5, "round_to": 16})},
}
QUANTIZED = ("int8", "mixed")
THREADS = (1, 2)
ROUNDS = 40
BLOCK_SECONDS = 0.05  # of one session in one round
FORMATS = {"onnx": "ONNX Runtime", "tflite": "LiteRT"}


def latency(keep: Path | None = None) -> None:
    """Measure every network and write the table; `keep`: a folder for the artifacts."""
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "ai-edge-litert")},
        "rounds": ROUNDS,
        "networks": [],
    }
    for name in WAYS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (keep or Path(temporary)) / name.rpartition(":")[2]
            result["networks"].append(measured(name, folder))
        path = RESULTS / "artifacts_latency.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(result))


def prepared(name: str, folder: Path) -> dict[str, Any]:
    """Writes every artifact of a network as KIND.FORMAT; returns their sizes and the MACs that each kind has lost, as a share."""
    facts = folder / "facts.json"
    if facts.is_file():
        kept: dict[str, Any] = json.loads(facts.read_text())
        return kept
    import edgeprune as ep
    from edgeprune.device.cost import CostModel

    folder.mkdir(parents=True, exist_ok=True)
    model, images = network(name)
    example = images[:1]
    graph = ep.trace(model, example)
    scores, cost = ep.score(graph, model, "l1"), CostModel(ep.device("host"))
    networks = {"dense fp32": model}
    for way, (_, asked) in WAYS[name].items():
        rules = {"round_to": 8} | {option: value for option, value in asked.items() if option != "macs"}
        plan = ep.allocate(graph, scores, ep.Budget(macs=asked["macs"]), method="knapsack", cost=cost, **rules)
        networks[f"{way} fp32"] = ep.slim(model, graph, plan)
    removed: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for number, (kind, net) in enumerate(networks.items()):
        if name not in CIFAR:
            calibrate(net, images[:CALIBRATION_IMAGES])
        for precision in ("fp32", *(QUANTIZED if number == 1 else ())):
            label = f"{kind.split()[0]} {precision}"
            removed[label] = 1 - ep.trace(net, example).macs / graph.macs
            quantizer = _quantizer(precision, images[:CALIBRATION_IMAGES])
            for form in FORMATS:
                file = folder / f"{label.replace(' ', '-')}.{form}"
                sizes[f"{label} {form}"] = ep.export(net, example, file, format=form, samples=images[-2:], quantizer=quantizer).size_bytes
    found = {"macs": graph.macs, "macs_removed": removed, "size_bytes": sizes}
    facts.write_text(json.dumps(found))
    return found


def _quantizer(precision: str, images: Any) -> Any:
    """One for both formats, so that they share a mixed plan. A network that was only pruned may be far from its fp32 self: no gate."""
    import numpy as np

    from edgeprune.data import load_data
    from edgeprune.quantize import quantizer_for

    labels = np.arange(len(images)) % 2
    made = quantizer_for("none" if precision == "fp32" else precision, load_data(((images.numpy(), labels), (images.numpy(), labels))))
    if made is not None:
        made.least_sqnr_db = -100.0
    return made


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Sizes, latencies and ratios of one network."""
    found = prepared(name, folder)
    sessions = {
        f"{key} {threads}": session(folder / f"{kind.replace(' ', '-')}.{form}", threads)
        for key in found["size_bytes"]
        for kind, _, form in [key.rpartition(" ")]
        for threads in THREADS
    }
    fastest_ms = rounds(sessions)
    rows = {}
    for key, values in fastest_ms.items():
        rest = " ".join(key.split()[2:])
        ratios = sorted(b / v for b, v in zip(fastest_ms[f"dense fp32 {rest}"], values, strict=True))
        rows[key] = {
            "latency_ms": statistics.median(values),
            "speedup": statistics.median(ratios),
            "speedup_low": ratios[len(ratios) // 10],
            "speedup_high": ratios[-1 - len(ratios) // 10],
        }
    return {"network": name, **found, "rows": rows}


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
        "Pruned by the knapsack with the options named. This CPU computes convolutions 16 channels at a time: widths that are multiples of",
        "16 gain what their MACs promise, and halving a layer of 16 gains little.",
        "",
        "| network | artifact | runtime | threads | MB | ms | speed-up over dense fp32 | MACs removed | of the proportional speed-up |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in result["networks"]:
        for key, row in found["rows"].items():
            way, precision, form, threads = key.split()
            removed, what, gained, share = found["macs_removed"][f"{way} {precision}"], f"dense {precision}", "1", ""
            if key.split()[:2] != ["dense", "fp32"]:
                what = f"{precision}, {WAYS[found['network']][way][0]}"
                gained = f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
                share = f"{row['speedup'] * (1 - removed):.2f}"
            size = f"{found['size_bytes'][f'{way} {precision} {form}'] / 1e6:.2f}"
            cells = (found["network"], what, FORMATS[form], threads, size, f"{row['latency_ms']:.2f}", gained, f"{removed:.1%}", share)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
