"""Predicted memory of an inference against what ONNX Runtime and LiteRT take on this machine.

    python -m benchmarks.cost_memory            # measures what is not measured yet, fits, prints, writes benchmarks/results/cost_memory.*
    python -m benchmarks.cost_memory --write    # and puts the constants into devices/*.toml

Measured: what a fresh process has resident at most while it runs the network on one thread, beyond what it had when the runtime was
imported (`Measurement.network_memory_bytes`). What loading left behind is given back to the system before; the largest size of the whole
process, Python and loading included, stands beside it. The constants of a runtime (card.Memory) are fitted to FITTED, and judged on
JUDGED, which they have not seen, and on FRESH, which nobody looked at while the model was made. Exporting the networks takes minutes
once; measurements are kept in the results and not repeated. What the model counts in a network is counted anew every time.
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
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor, nn

from benchmarks.cost_tables import timm_network
from edgeprune.device.arena import arena_bytes
from edgeprune.device.card import KernelKind, Memory
from edgeprune.device.kernels import Kernels, kernels
from edgeprune.device.measure import measure_host
from edgeprune.device.store import with_memory
from edgeprune.export import export
from edgeprune.graph.channels import ChannelGraph
from edgeprune.graph.trace import trace

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
FRESH = (("inception_v3", 299), ("mobilenetv4_conv_small", 256), ("resnext50_32x4d", 224), ("fbnetc_100", 192), ("hardcorenas_a", 320))
RUNTIMES = {"onnxruntime": ("onnx", "ONNX Runtime", "onnxruntime"), "litert": ("tflite", "LiteRT", "ai-edge-litert")}
# What exists twice while it runs. ONNX Runtime on x86: kernels without its blocked layout read and write copies in the plain one; LiteRT:
# the padded input of a pooling.
COPIED: dict[str, tuple[KernelKind, ...]] = {"onnxruntime": ("cat", "grouped"), "litert": ("pool",)}
TERMS = ("weights", "activations", "pointers", "kernel_bytes", "base_bytes")
# ONNX Runtime keeps no pointers, and its arena is run, so that nothing is left to a constant per kernel.
WEIGHED = {"onnxruntime": ("weights", "activations", "base_bytes"), "litert": TERMS}
RUNS: dict[str, Any] = {"processes": 3, "min_runs": 5, "min_seconds": 0.0, "warmup_runs": 3, "warmup_seconds": 0.0}
_BESIDE = ("least_bytes", "whole_process_bytes")
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
    for name, side in (*JUDGED, *FRESH, *FITTED):
        known = [r for r in rows if (r["network"], r["side"]) == (name, side)]
        network, example, graph = built(name, side)
        if not known:
            known = measured(name, side, network, example, folder=chosen.artifacts)
            rows += known
            print(f"{name} {side}: {', '.join(str(r['resident_bytes']) for r in known)} bytes", flush=True)
        for row in known:
            row.update(counted(graph, row["runtime"]))
        store.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    fits = {runtime: fitted(rows, runtime) for runtime in RUNTIMES}
    report(rows, fits)
    if chosen.write:
        for card in sorted(DEVICES.glob("*.toml")):
            with_memory(card, fits)


def built(name: str, side: int) -> tuple[nn.Module, Tensor, ChannelGraph]:
    """The network with random weights, an example input, and its graph."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network, example = timm_network(name), torch.zeros(1, 3, side, side)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # some start at zero, and a converter keeps equal weights once
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network, example, trace(network, example)


def counted(graph: ChannelGraph, runtime: str) -> dict[str, float]:
    """What the model counts in the network."""
    made, dense = kernels(graph), graph.dense_widths
    activations = arena_bytes if runtime == "onnxruntime" else Kernels.live_bytes
    return {
        "weight_bytes": float(made.weight_bytes(dense)[0]),
        "pointer_bytes": made.pointer_bytes,
        "kernels": len(made.names),
        "activation_bytes": float(activations(made, dense, COPIED[runtime])[0]),
        "least_bytes": float(made.peak_memory_bytes(dense)[0]),
    }


def measured(name: str, side: int, network: nn.Module, example: Tensor, *, folder: Path) -> list[Row]:
    """What the processes that run the network had resident, on every runtime."""
    rows = []
    for runtime, (form, _, _) in RUNTIMES.items():
        path = folder / f"{name}-{side}.{form}"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            export(network, example, path, format=form)
        found = measure_host(path, **RUNS)
        resident = {"resident_bytes": found.network_memory_bytes, "whole_process_bytes": found.peak_memory_bytes}
        rows.append({"network": name, "side": side, "runtime": runtime, **resident})
    return rows


def fitted(rows: Sequence[Row], runtime: str) -> Memory:
    """The constants of a runtime from FITTED, with their error on JUDGED and FRESH."""
    x, y = terms(rows, runtime, FITTED)
    constants = np.array([float(f"{c:.4g}") for c in nnls(x / y[:, None], np.ones(len(y)))[0]])
    x, y = terms(rows, runtime, (*JUDGED, *FRESH))
    error = 100 * np.abs(x @ constants / y - 1)
    _, name, package = RUNTIMES[runtime]
    return Memory(
        **dict(zip(TERMS, map(float, constants), strict=True)),
        arena=runtime == "onnxruntime",
        copied=COPIED[runtime],
        networks=len(y),
        mape=round(float(error.mean()), 1),
        worst=round(float(error.max()), 1),
        source=f"{name} {version(package)}, 1 thread, {platform.machine()}; other machines were not tried",
    )


def terms(rows: Sequence[Row], runtime: str, networks: Sequence[tuple[str, int]]) -> tuple[Floats, Floats]:
    """(what the constants multiply (networks, TERMS), resident bytes (networks,))."""
    chosen = [r for n in networks for r in rows if (r["network"], r["side"]) == n and r["runtime"] == runtime]
    x = np.array([[r["weight_bytes"], r["activation_bytes"], r["pointer_bytes"], r["kernels"], 1.0] for r in chosen])
    return x * np.isin(TERMS, WEIGHED[runtime]), np.array([float(r["resident_bytes"]) for r in chosen])


def report(rows: Sequence[Row], fits: dict[str, Memory]) -> None:
    """Prints, and writes results/cost_memory.json and .md."""
    title = "# Memory of an inference: predicted against measured on this machine"
    head = ("network, input", "runtime", "predicted MB", "measured MB", "off", "weights and live activations MB", "whole process MB")
    lines = [title, "", "Written by `python -m benchmarks.cost_memory`.", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    judged: list[Row] = []
    for runtime, memory in fits.items():
        for network in (*JUDGED, *FRESH):
            row = next(r for r in rows if (r["network"], r["side"], r["runtime"]) == (*network, runtime))
            x, y = terms(rows, runtime, [network])
            p, m = float((x @ np.array([getattr(memory, name) for name in TERMS]))[0]), float(y[0])
            judged.append({"network": network[0], "side": network[1], "runtime": runtime, "predicted_bytes": p, "resident_bytes": m})
            figures = (f"{p / 1e6:.1f}", f"{m / 1e6:.1f}", f"{p / m - 1:+.1%}", *(f"{row[k] / 1e6:.1f}" for k in _BESIDE))
            named = f"{network[0]} {network[1]}{' (fresh)' if network in FRESH else ''}"
            lines.append(f"| {named} | {RUNTIMES[runtime][1]} | {' | '.join(figures)} |")
    for runtime, memory in fits.items():
        own = f"{memory.base_bytes / 1e6:.1f} MB + {memory.weights} weights + {memory.activations} activations"
        rest = "" if memory.arena else f" + {memory.pointers} pointers + {memory.kernel_bytes / 1e3:.0f} KB a kernel"
        how = "by its allocator" if memory.arena else "by liveness"
        error = f"{memory.mape:.1f} % off on average, {memory.worst:.1f} % at worst"
        fresh = [100 * abs(j["predicted_bytes"] / j["resident_bytes"] - 1) for j in judged if _is_fresh(j) and j["runtime"] == runtime]
        tail = f"; on the {len(fresh)} fresh ones {np.mean(fresh):.1f} % and {max(fresh):.1f} % ({memory.source})"
        lines += ["", f"{RUNTIMES[runtime][1]}: {own} ({how}){rest}, fitted to {len(FITTED)} other networks; {error} on these{tail}."]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cost_memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = {"rows": list(rows), "judged": judged, "constants": {runtime: m.model_dump(mode="json") for runtime, m in fits.items()}}
    (RESULTS / "cost_memory.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _is_fresh(row: Row) -> bool:
    return (row["network"], row["side"]) in FRESH


if __name__ == "__main__":
    main()
