"""Predicted memory of an inference against what ONNX Runtime and LiteRT take on this machine.

    python -m benchmarks.cost_memory            # measures what is not measured yet, fits, prints, writes benchmarks/results/cost_memory.*
    python -m benchmarks.cost_memory --write    # and puts the constants into devices/*.toml

Measured: what a fresh process has resident at most while it runs the network on one thread, beyond what it had when the runtime was
imported (`Measurement.network_memory_bytes`). What loading left behind is given back to the system before; the largest size of the whole
process, Python and loading included, stands beside it. The constants of a runtime (card.Memory) are fitted to FITTED, and judged on
JUDGED, which they have not seen. Exporting the networks takes minutes once; measurements are kept in the results and not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.device.card import KernelKind, Memory
from edgeprune.device.store import with_memory

RESULTS, DEVICES = Path(__file__).parent / "results", Path(__file__).parents[1] / "devices"
JUDGED = (
    ("resnet18", 224),
    ("resnet50", 224),
    ("mobilenetv2_100", 224),
    ("mobilenetv3_small_100", 224),
    ("efficientnet_lite0", 224),
    ("ghostnet_100", 224),
    ("densenet121", 224),
    ("regnetx_002", 224),
    ("resnet18", 448),
    ("mobilenetv2_100", 448),
)
FITTED = (
    ("mobilenetv3_large_100", 224),
    ("efficientnet_b0", 224),
    ("resnet34", 160),
    ("mobilenetv2_050", 128),
    ("regnety_004", 224),
    ("dla34", 224),
    ("lcnet_100", 224),
    ("repvgg_a0", 224),
    ("mnasnet_100", 320),
    ("resnet26", 96),
)
RUNTIMES = {"onnxruntime": ("onnx", "ONNX Runtime", "onnxruntime"), "litert": ("tflite", "LiteRT", "ai-edge-litert")}
# What exists twice while it runs. ONNX Runtime on x86: kernels without its blocked layout read and write copies in the plain one; LiteRT:
# the padded input of a pooling.
COPIED: dict[str, tuple[KernelKind, ...]] = {"onnxruntime": ("cat", "norm", "grouped"), "litert": ("pool",)}
TERMS = ("weights", "activations", "pointers", "kernel_bytes", "base_bytes")
RUNS: dict[str, Any] = {"processes": 3, "min_runs": 5, "min_seconds": 0.0, "warmup_runs": 3, "warmup_seconds": 0.0}
Floats = NDArray[np.float64]
Row = dict[str, Any]


def main() -> None:
    """Measures, fits, prints, writes."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--artifacts", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-memory", help="where artifacts are kept"
    )
    options.add_argument("--write", action="store_true", help="update devices/*.toml with the new constants")
    chosen = options.parse_args()
    store = RESULTS / "cost_memory.json"
    rows: list[Row] = json.loads(store.read_text(encoding="utf-8"))["rows"] if store.exists() else []
    for name, side in (*JUDGED, *FITTED):
        if not any((r["network"], r["side"]) == (name, side) for r in rows):
            rows += measured(name, side, chosen.artifacts)
            print(f"{name} {side}: {', '.join(str(r['resident_bytes']) for r in rows[-len(RUNTIMES) :])} bytes", flush=True)
            store.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    fits = {runtime: fitted(rows, runtime) for runtime in RUNTIMES}
    report(rows, fits)
    if chosen.write:
        for card in sorted(DEVICES.glob("*.toml")):
            with_memory(card, fits)


def measured(name: str, side: int, folder: Path) -> list[Row]:
    """One network on every runtime: what the model counts in it, and what its processes had resident."""
    import torch

    from benchmarks.cost_tables import timm_network
    from edgeprune.device.kernels import kernels
    from edgeprune.device.measure import measure_host
    from edgeprune.export import export
    from edgeprune.graph.trace import trace

    torch.manual_seed(0)
    torch.set_num_threads(1)
    network, example = timm_network(name), torch.zeros(1, 3, side, side)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # some start at zero, and a converter keeps equal weights once
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    graph = trace(network, example)
    made = kernels(graph)
    counted = {
        "weight_bytes": float(made.weight_bytes(graph.dense_widths)[0]),
        "pointer_bytes": made.pointer_bytes,
        "kernels": len(made.names),
    }
    rows = []
    for runtime, (form, _, _) in RUNTIMES.items():
        path = folder / f"{name}-{side}.{form}"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            export(network, example, path, format=form)
        found = measure_host(path, **RUNS)
        live = {"live_bytes": float(made.live_bytes(graph.dense_widths, COPIED[runtime])[0])}
        resident = {"resident_bytes": found.network_memory_bytes, "whole_process_bytes": found.peak_memory_bytes}
        rows.append({"network": name, "side": side, "runtime": runtime, **counted, **live, **resident})
    return rows


def fitted(rows: Sequence[Row], runtime: str) -> Memory:
    """The constants of a runtime from FITTED, with their error on JUDGED."""
    from scipy.optimize import nnls

    x, y = terms(rows, runtime, FITTED)
    constants = np.array([float(f"{c:.4g}") for c in nnls(x / y[:, None], np.ones(len(y)))[0]])
    x, y = terms(rows, runtime, JUDGED)
    error = 100 * np.abs(x @ constants / y - 1)
    _, name, package = RUNTIMES[runtime]
    return Memory(
        **dict(zip(TERMS, map(float, constants), strict=True)),
        copied=COPIED[runtime],
        networks=len(y),
        mape=round(float(error.mean()), 1),
        worst=round(float(error.max()), 1),
        source=f"{name} {version(package)}, 1 thread, {platform.machine()}; other machines were not tried",
    )


def terms(rows: Sequence[Row], runtime: str, networks: Sequence[tuple[str, int]]) -> tuple[Floats, Floats]:
    """(what the constants multiply (networks, TERMS), resident bytes (networks,))."""
    chosen = [r for n in networks for r in rows if (r["network"], r["side"]) == n and r["runtime"] == runtime]
    x = np.array([[r["weight_bytes"], r["live_bytes"], r["pointer_bytes"], r["kernels"], 1.0] for r in chosen])
    return x, np.array([float(r["resident_bytes"]) for r in chosen])


def report(rows: Sequence[Row], fits: dict[str, Memory]) -> None:
    """Prints, and writes results/cost_memory.json and .md."""
    title = "# Memory of an inference: predicted against measured on this machine"
    head = ("network, input", "runtime", "predicted MB", "measured MB", "off", "weights and live activations MB", "whole process MB")
    lines = [title, "", "Written by `python -m benchmarks.cost_memory`.", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    judged: list[Row] = []
    for runtime, memory in fits.items():
        x, y = terms(rows, runtime, JUDGED)
        predicted = x @ np.array([getattr(memory, name) for name in TERMS])
        for (name, side), p, m, least in zip(JUDGED, predicted, y, x[:, :2].sum(axis=1), strict=True):
            whole = next(r["whole_process_bytes"] for r in rows if (r["network"], r["side"], r["runtime"]) == (name, side, runtime))
            judged.append({"network": name, "side": side, "runtime": runtime, "predicted_bytes": float(p), "resident_bytes": float(m)})
            figures = f"{p / 1e6:.1f} | {m / 1e6:.1f} | {p / m - 1:+.1%} | {least / 1e6:.1f} | {whole / 1e6:.1f}"
            lines.append(f"| {name} {side} | {RUNTIMES[runtime][1]} | {figures} |")
    for runtime, memory in fits.items():
        x, _ = terms(rows, runtime, FITTED)
        own = f"{memory.base_bytes / 1e6:.1f} MB + {memory.kernel_bytes / 1e3:.0f} KB a kernel"
        constants = f"{own} + {memory.weights} weights + {memory.activations} live + {memory.pointers} pointers"
        error = f"{memory.mape:.1f} % off on average, {memory.worst:.1f} % at worst"
        lines += ["", f"{RUNTIMES[runtime][1]}: {constants}, fitted to {len(x)} other networks; {error} on these ({memory.source})."]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cost_memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = {"rows": list(rows), "judged": judged, "constants": {runtime: m.model_dump(mode="json") for runtime, m in fits.items()}}
    (RESULTS / "cost_memory.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
