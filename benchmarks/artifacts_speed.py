"""How much faster artifacts become on this machine: dense, pruned, pruned int8 and mixed, ONNX Runtime and LiteRT, 1 and 2 threads.

    python -m benchmarks.artifacts latency [NETWORK …] [--keep DIR]   # artifacts that DIR holds from an earlier run are not written again
    python -m benchmarks.artifacts latency NETWORK --ways A,B         # these ways beside dense alone; other rows stay as they were
    python -m benchmarks.artifacts make [NETWORK …] --keep DIR        # only writes them; goes on where it was

All sessions of a network are open at once in one process. In each of ROUNDS rounds every session runs one block of inferences, in an
order drawn anew, and the fastest of the block counts: what else the machine does hits all of them alike, and a ratio is taken within
its round. Proportional: the speed-up over dense fp32 if time fell exactly with the MACs.

Ways to prune are options of `edgeprune compress --device host`; the allocator is knapsack. "dense / 1.8" stands for the milliseconds of
the dense network over 1.8, by prediction (compress itself measures, and corrects the plan). Channels of ResNet-56 are chosen by the
default criterion and refitted without labels, as in benchmarks/accuracy.py; "kept right" is top-1 on 2,000 training images that no step
reads (the public checkpoint was trained on them: compare, do not believe the level). MobileNetV2 has random weights, l1 scores and
recalibrated batch norms. Each network's first way is the one that is quantized, calibrated on 32 images; the mixed plan is chosen by
onnxruntime's timings, for both formats. Writes benchmarks/results/artifacts_latency.json and .md.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.artifacts import CALIBRATION_IMAGES, CIFAR, calibrate, network
from benchmarks.graph import RESULTS

# What is asked for, by network and by the name of the way: (options as they are typed, the same for `_Source`).
FAST = {"macs": 0.5, "speedup": 1.8, "device": "host-litert"}
FAST_OPTIONS = "--device host-litert --macs 0.5 --latency-ms (dense / 1.8)"
WAYS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "cifar:resnet56": {
        "branches-by-32": ("--macs 0.5 --round-to 32 --min-channels 0", {"macs": 0.5, "round_to": 32, "min_channels": 0}),
        "branches-by-16": ("--macs 0.5 --round-to 16 --min-channels 0", {"macs": 0.5, "round_to": 16, "min_channels": 0}),
        "branches": ("--macs 0.5 --round-to 64 --min-channels 0", {"macs": 0.5, "round_to": 64, "min_channels": 0}),
        "fast": (FAST_OPTIONS, FAST),
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


def latency(names: list[str], keep: Path | None = None, ways: Collection[str] = ()) -> None:
    """Measure networks (default: all) and write the table, with the earlier rows of the others; `keep`: a folder for the artifacts.

    `ways`: only these are made and measured, beside the dense network, whose own rows stay those of the run that measured all.
    """
    warnings.simplefilter("ignore")
    path = RESULTS / "artifacts_latency.json"
    known = {found["network"]: found for found in json.loads(path.read_text())["networks"]} if path.is_file() else {}
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "ai-edge-litert")},
        "rounds": ROUNDS,
    }
    for name in names or WAYS:
        with tempfile.TemporaryDirectory() as temporary:
            found = measured(name, _folder(name, keep or Path(temporary)), ways)
        known[name] = _together(known[name], found) if ways and name in known else found
        result["networks"] = [known[n] for n in WAYS if n in known]
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(result))


def make(names: list[str], keep: Path) -> None:
    """Write the artifacts of networks (default: all), measuring none."""
    warnings.simplefilter("ignore")
    for name in names or WAYS:
        prepared(name, _folder(name, keep))


def _together(earlier: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run and those that another one added; what both have stays as it was."""
    both = {key: found[key] | earlier[key] for key in ("macs_removed", "size_bytes", "kept_right", "rows")}
    order = ["dense", *WAYS[earlier["network"]]]
    both["rows"] = dict(sorted(both["rows"].items(), key=lambda row: order.index(row[0].split()[0])))
    return earlier | both


def _folder(name: str, keep: Path) -> Path:
    return keep / name.rpartition(":")[2]


def prepared(name: str, folder: Path, ways: Collection[str] = ()) -> dict[str, Any]:
    """Writes the artifacts of a network that are not there as KIND.FORMAT; their sizes, MACs lost as a share, and images kept right.

    `ways`: only those, and the dense one.
    """
    import edgeprune as ep

    facts = folder / "facts.json"
    found: dict[str, Any] = json.loads(facts.read_text()) if facts.is_file() else {"macs_removed": {}, "size_bytes": {}, "kept_right": {}}
    labels = [("dense", "fp32"), *((way, p) for n, way in enumerate(WAYS[name]) for p in ("fp32", *(QUANTIZED if n == 0 else ())))]
    wanted = [label for label in labels if not ways or label[0] in ("dense", *ways)]
    missing = [label for label in wanted if " ".join(label) not in found["macs_removed"]]
    if not missing:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    source = _Source(name)
    found["macs"] = source.graph.macs
    for way, precision in missing:
        label = f"{way} {precision}"
        net, kept_right = source.network(way)
        if kept_right is not None:
            found["kept_right"][way] = kept_right
        quantizer = _quantizer(precision, source.images[:CALIBRATION_IMAGES])
        for form in FORMATS:
            file = folder / f"{label.replace(' ', '-')}.{form}"
            made = ep.export(net, source.example, file, format=form, samples=source.images[-2:], quantizer=quantizer)
            found["size_bytes"][f"{label} {form}"] = made.size_bytes
        found["macs_removed"][label] = 1 - ep.trace(net, source.example).macs / source.graph.macs
        facts.write_text(json.dumps(found))
        print(f"{name} {label}: {found['macs_removed'][label]:.1%} of the MACs gone, kept right {kept_right}", flush=True)
    return found


class _Source:
    """One network, and what each way makes of it."""

    def __init__(self, name: str) -> None:
        import edgeprune as ep
        from benchmarks.accuracy import Bench, Sizes
        from benchmarks.cifar10 import datasets
        from edgeprune.data import load_data

        self.name = name
        self.model, self.images = network(name)
        self.example = self.images[:1]
        if name in CIFAR:
            data = load_data(datasets())
            self.bench: Any = Bench(name, self.model, data.train, data.val, sizes=Sizes(), work=Path("runs") / "bench" / "artifacts")
            self.graph = self.bench.graph
        else:
            self.bench, self.graph = None, ep.trace(self.model, self.example)
        self._made: dict[str, tuple[Any, float | None]] = {}

    def network(self, way: str) -> tuple[Any, float | None]:
        """(the network, percent of the held-out images that it gets right where there are labels)."""
        if way not in self._made:
            self._made = {way: self._network(way)}
        return self._made[way]

    def _network(self, way: str) -> tuple[Any, float | None]:
        import edgeprune as ep
        from benchmarks.accuracy import AUGMENT
        from edgeprune.train.evaluate import evaluate
        from edgeprune.train.reconstruct import reconstruct

        net, bench = self.model, self.bench
        if way != "dense":
            plan = self._plan(way)
            net = ep.slim(self.model, self.graph, plan)
            if bench:
                net = reconstruct(net, self.model, self.graph, plan, bench.rest, images=bench.sizes.reconstruction, augment=AUGMENT)
        if bench:
            return net, round(100 * evaluate(net, bench.held).accuracy, 2)
        calibrate(net, self.images[:CALIBRATION_IMAGES])
        return net, None

    def _plan(self, way: str) -> Any:
        import edgeprune as ep
        from edgeprune.device.cost import CostModel
        from edgeprune.device.kernels import kernels

        asked = dict(WAYS[self.name][way][1])
        cost = CostModel(ep.device(asked.pop("device", "host")))
        macs, faster = asked.pop("macs"), asked.pop("speedup", None)
        dense_ms = float(cost.total_ms(kernels(self.graph).at(self.graph.dense_widths))[0])
        budget = ep.Budget(macs=macs, latency_ms=dense_ms / faster if faster else None)
        scores = self.bench.scores if self.bench else ep.score(self.graph, self.model, "l1")
        return ep.allocate(self.graph, scores, budget, method="knapsack", cost=cost, **asked)


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


def measured(name: str, folder: Path, ways: Collection[str] = ()) -> dict[str, Any]:
    """Sizes, latencies and ratios of one network."""
    found = prepared(name, folder, ways)
    sessions = {
        f"{key} {threads}": session(folder / f"{kind.replace(' ', '-')}.{form}", threads)
        for key in found["size_bytes"]
        for kind, _, form in [key.rpartition(" ")]
        if not ways or key.split()[0] in ("dense", *ways)
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
        "16 gain what their MACs promise, and halving a layer of 16 gains little. A latency budget counts whole blocks. Kept right: of",
        "2,000 training images that no step reads, in percent, refitted without labels; the dense network was trained on them.",
        "",
        "| network | artifact | runtime | threads | MB | ms | speed-up over dense fp32 | MACs removed | of the proportional speed-up "
        "| kept right |",
        "|---|---|---|---|---|---|---|---|---|---|",
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
            kept = str(found.get("kept_right", {}).get(way, "")) if precision == "fp32" else ""
            cells = (
                found["network"],
                what,
                FORMATS[form],
                threads,
                size,
                f"{row['latency_ms']:.2f}",
                gained,
                f"{removed:.1%}",
                share,
                kept,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_ways(result["networks"])]) + "\n"


def _ways(networks: list[dict[str, Any]]) -> list[str]:
    """What is asked for and what it gives, fp32 on one thread: ONNX Runtime, LiteRT."""
    lines = [
        "### Ways to ask",
        "",
        "| network | asked | MACs removed | faster | of the proportional speed-up | kept right |",
        "|---" * 6 + "|",
    ]
    for found in networks:
        for way, (typed, _) in WAYS[found["network"]].items():
            rows = [found["rows"][key] for form in FORMATS if (key := f"{way} fp32 {form} 1") in found["rows"]]
            if rows:
                removed = found["macs_removed"][f"{way} fp32"]
                faster, share = (", ".join(f"{r['speedup'] * by:.2f}" for r in rows) for by in (1, 1 - removed))
                kept = found.get("kept_right", {}).get(way, "")
                lines.append(f"| {found['network']} | {typed} | {removed:.1%} | {faster} | {share} | {kept} |")
    return lines
