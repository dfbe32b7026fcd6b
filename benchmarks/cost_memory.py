"""Predicted peak memory against what ONNX Runtime takes on this machine: `python -m benchmarks.cost_memory`.

Measured: resident bytes of a fresh process after it has loaded the network with one thread and run it three times, minus those of
a process that did the same with one ReLU. That is weights, arena and whatever the runtime keeps besides; the peak
while loading (the file beside the weights made from it) is given apart. Predicted: weights and the largest set of live activations.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NETWORKS = (
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
_CHILD = """
import sys, numpy as np, onnxruntime as ort
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x = np.zeros([d if isinstance(d, int) else 1 for d in session.get_inputs()[0].shape], np.float32)
for _ in range(3):
    session.run(None, {session.get_inputs()[0].name: x})
print(status("VmRSS"), status("VmHWM"))
"""


def main() -> None:
    """Exports, measures, prints, writes."""
    import torch
    from torch import nn

    from benchmarks.cost_tables import timm_network
    from edgeprune.device.kernels import kernels
    from edgeprune.export import export
    from edgeprune.graph.trace import trace

    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        empty = measured(export(nn.ReLU(), torch.zeros(1, 3, 8, 8), Path(folder) / "empty").path)
        for name, side in NETWORKS:
            network, example = timm_network(name), torch.zeros(1, 3, side, side)
            graph = trace(network, example)
            predicted = float(kernels(graph).peak_memory_bytes(graph.dense_widths)[0])
            resident, peak = (a - b for a, b in zip(measured(export(network, example, Path(folder) / name).path), empty, strict=True))
            rows.append({"network": f"{name} {side}", "predicted_bytes": predicted, "resident_bytes": resident, "peak_bytes": peak})
            print(f"{name} {side}: {predicted / 1e6:.1f} MB predicted, {resident / 1e6:.1f} MB resident, {peak / 1e6:.1f} MB at its peak")
    write(rows)


def measured(path: Path) -> tuple[int, int]:
    """(resident bytes after three runs, the most there ever were)."""
    output = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, check=True).stdout
    resident, peak = map(int, output.split())
    return resident, peak


def write(rows: Sequence[dict[str, object]]) -> None:
    """results/cost_memory.json and .md."""
    mega = [[float(str(row[key])) / 1e6 for key in ("predicted_bytes", "resident_bytes", "peak_bytes")] for row in rows]
    lines = [
        "# Memory: predicted against ONNX Runtime on this machine",
        "",
        "| network, input | predicted MB | resident MB | predicted / resident | peak while loading MB |",
        "|---|---|---|---|---|",
        *(f"| {row['network']} | {p:.1f} | {r:.1f} | {p / r:.2f} | {top:.1f} |" for row, (p, r, top) in zip(rows, mega, strict=True)),
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cost_memory.md").write_text("\n".join(lines), encoding="utf-8")
    (RESULTS / "cost_memory.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
