"""The public latency tables as samples (network, family, milliseconds, kernels), the form that edgeprune.device.fit takes.

Counting is that of edgeprune/device/kernels.py: norms folded, activations fused where ONNX Runtime fuses them, views free, what is
computed twice computed once. No row of the tables is copied here: they lie where EDGEPRUNE_DATA says.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, reduce
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune.device import kernels as counting
from edgeprune.device.fit import Sample
from edgeprune.device.kernels import KernelsAt, kernels
from edgeprune.graph.trace import trace

DATA = Path(os.environ.get("EDGEPRUNE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "latency"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeprune"

# Recurrent and MLP networks of the timm table: not what a CNN cost model is for.
_NOT_CNN = ("sequencer", "gmlp", "gmixer")


class Layer(NamedTuple):
    """One kernel: its kind, MACs, elements read, written, held as weights and gathered as patches, output channels, groups."""

    kind: str
    macs: float = 0.0
    reads: float = 0.0
    writes: float = 0.0
    weights: float = 0.0
    patches: float = 0.0
    channels: float = 1.0
    groups: float = 0.0


def kernels_of(layers: Sequence[Layer]) -> KernelsAt:
    """The layers as the cost model takes them, one plan."""
    kinds, *columns = zip(*layers, strict=True)
    return KernelsAt(kinds, kinds, *(np.array([column], dtype=np.float64) for column in columns))


def layers_of(at: KernelsAt) -> list[Layer]:
    """The inverse of `kernels_of`, for the first plan."""
    columns = (at.macs, at.input_elements, at.output_elements, at.weight_elements, at.patch_elements, at.channels, at.groups)
    return [Layer(kind, *map(float, row)) for kind, row in zip(at.kinds, np.stack([c[0] for c in columns], axis=1), strict=True)]


def yolo_rows(column: str) -> list[Sample]:
    """YOLOv5 variants (12 architectures x 11 resolutions; family: the architecture). Deeplite, YOLOBench, Apache-2.0."""
    tables = _yolo_kernels()
    return [
        Sample(r["model_name"], r["arch"], float(r["latency_ms"]), tables[r["model_name"]])
        for r in _read("yolobench_yolov5.csv")
        if r["col"] == column
    ]


@cache
def _yolo_kernels() -> dict[str, KernelsAt]:
    tables: dict[str, list[dict[str, str]]] = defaultdict(list)
    for r in _read("yolobench_yolov5_layers.csv.gz"):
        tables[r["model"]].append(r)
    return {name: kernels_of([_yolo_layer(*pair) for pair in pairwise((*rows, rows[0]))]) for name, rows in tables.items()}


def _yolo_layer(r: dict[str, str], after: dict[str, str]) -> Layer:
    """A row of the layer table, which says MACs, weights and the sum of elements read and written; the rest follows from the kind.

    c1: 1x1, c3: 3x3 of stride 1, cx: 3x3 of stride 2 (6x6 for the stem), elt: what has no MACs, after a convolution its SiLU.
    """
    macs, moved, weights = float(r["macs"]), float(r["act"]), float(r["weights"])
    if r["kind"] == "elt":
        return Layer("activation", 0, moved / 2, moved / 2)
    stem = r["kind"] == "cx" and weights % 108 == 0 and weights < 1e4
    side, stride = {"c1": (1, 1), "c3": (3, 1), "cx": (6 if stem else 3, 2)}[r["kind"]]
    positions = macs / weights
    # positions * (stride^2 * in + out) = moved and in * out = weights / side^2 leave two solutions.
    total, product = moved / positions, weights / side**2
    root = math.sqrt(max(total**2 - 4 * stride**2 * product, 0.0))
    solutions = ((total + root) / 2, (total - root) / 2)
    # The SiLU behind it reads and writes what this layer makes.
    wanted = float(after["act"]) / 2 / positions if after["kind"] == "elt" else solutions[0]
    out = min(solutions, key=lambda channels: abs(channels - wanted))
    reads = product / out * positions * stride**2
    kind = {"c1": "conv1x1", "c3": "conv3x3", "cx": "conv_other"}[r["kind"]]
    return Layer(kind, macs, reads, out * positions, weights, reads * side**2 / stride**2 if side > 1 else 0.0, out)


def nb201_rows(framework: str, every: int = 1) -> list[Sample]:
    """NAS-Bench-201 cells at 32x32 on one core of a Raspberry Pi 5, each `every`-th (family: the cell). HW-NAS-Bench-360."""
    rows = [r for r in _read("nb201_rpi5_latency_energy.csv.gz") if r["framework"] == framework][::every]
    return [Sample(r["arch_idx"], r["arch_idx"], float(r["latency_ms"]), nb201_kernels(r["arch_str"], framework)) for r in rows]


def nb201_energies(framework: str, every: int = 1) -> NDArray[np.float64]:
    """Core-rail energy above idle in mJ, in the order of `nb201_rows`."""
    rows = [r for r in _read("nb201_rpi5_latency_energy.csv.gz") if r["framework"] == framework][::every]
    return np.array([float(r["energy_mj"]) for r in rows])


def nb201_pi4_rows(every: int = 1) -> list[Sample]:
    """The same cells on a Raspberry Pi 4 with TFLite. HELP and HW-NAS-Bench, MIT."""
    rows = list(_read("nb201_rpi4_latency.csv.gz"))[::every]
    return [Sample(r["arch_id"], r["arch_id"], float(r["latency_ms"]), nb201_kernels(r["arch_str"], "litert")) for r in rows]


def nb201_kernels(text: str, framework: str, side: int = 32) -> KernelsAt:
    """The kernels of the network that has the cell `text`, for images of `side` pixels."""
    return kernels_of(list(_nb201_layers(_cell(text, framework), side)))


_ZERO = -1  # a value that the converter knows


def _cell(text: str, framework: str) -> list[str]:
    """The operations of one cell that the runtime executes: relu, zero, pool, conv1x1, conv3x3, add.

    "none" is a multiplication by zero. ONNX Runtime executes it, and what reads it. LiteRT's converter knows its result and what a ReLU
    or a pooling makes of it, and drops additions of zero; convolutions of it remain (the table says so: 1.5 % off on average instead
    of 2.2 %). The ReLU before the convolutions and the pooling of one node are computed once, whoever reads them.
    """
    cell = {
        (node, int(source)): op
        for node, part in enumerate(text.split("+"), start=1)
        for op, source in (edge.split("~") for edge in part.strip("|").split("|"))
    }
    made: dict[tuple[object, ...], int] = {}  # what is computed from what -> its number
    made_by: list[tuple[str, tuple[int, ...]]] = []

    def compute(op: str, *inputs: int, unique: object = None) -> int:
        if (op == "zero" and framework == "litert") or (max(inputs) == _ZERO and not op.startswith("conv")):
            return _ZERO
        if op == "add" and _ZERO in inputs:
            return max(inputs)
        key = (op, inputs, unique)
        if key not in made:
            made_by.append((op, inputs))
            made[key] = len(made_by)
        return made[key]

    values = [0]
    for node in (1, 2, 3):
        ends = [_edge(cell[node, source], values[source], (node, source), compute) for source in range(node)]
        values.append(reduce(lambda result, end: compute("add", result, end), ends))
    return list(_executed(made_by, values[3], framework))


def _edge(op: str, value: int, edge: tuple[int, int], compute: Callable[..., int]) -> int:
    if op.startswith("nor_conv"):
        return compute("conv3x3" if op == "nor_conv_3x3" else "conv1x1", compute("relu", value), unique=edge)
    return value if op == "skip_connect" else compute("zero" if op == "none" else "pool", value)


def _executed(made_by: Sequence[tuple[str, tuple[int, ...]]], result: int, framework: str) -> Iterator[str]:
    needed, kept = {result}, []
    for number in range(len(made_by), 0, -1):
        if number in needed:
            kept.append(number)
            needed.update(made_by[number - 1][1])
    uses = Counter(i for number in kept for i in made_by[number - 1][1])
    uses[result] += 1
    for number in reversed(kept):
        op, inputs = made_by[number - 1]
        source = made_by[inputs[0] - 1][0] if inputs[0] > 0 else ""
        fused = op == "relu" and uses[inputs[0]] == 1 and (source.startswith("conv") or (source == "add" and framework == "litert"))
        if not fused:
            yield op


def _nb201_layers(cell: Sequence[str], side: int) -> Iterator[Layer]:
    width = 16
    yield _conv(3, width, side, 3)
    for stage in range(3):
        for op in [*cell] * 5:
            if op.startswith("conv"):
                yield _conv(width, width, side, int(op[-1]))
            else:
                yield _map("pool" if op == "pool" else "elementwise", 2 if op == "add" else 1, width, side)
        if stage < 2:
            half = math.ceil(side / 2)
            yield _map("elementwise", 1, width, side)
            yield _conv(width, 2 * width, side, 3, stride=2)
            yield _conv(2 * width, 2 * width, half, 3)
            yield Layer("pool", 0, width * side**2, width * half**2, 0, 0, width)
            yield _conv(width, 2 * width, half, 1)
            side, width = half, 2 * width
            yield _map("elementwise", 2, width, side)
    yield _map("elementwise", 1, width, side)
    yield Layer("global_pool", 0, width * side**2, width, 0, 0, width)
    yield Layer("linear", width * 10, width, 10, width * 10 + 10, 0, 10)


def _conv(inputs: int, outputs: int, side: int, kernel: int, stride: int = 1) -> Layer:
    kind = "conv1x1" if kernel == 1 else "conv3x3" if stride == 1 else "conv_other"
    positions, weights = math.ceil(side / stride) ** 2, inputs * outputs * kernel * kernel
    patches = positions * inputs * kernel * kernel if kernel > 1 else 0
    return Layer(kind, positions * weights, inputs * side * side, outputs * positions, weights + outputs, patches, outputs)


def _map(kind: str, inputs: int, width: int, side: int) -> Layer:
    return Layer(kind, 0, inputs * width * side * side, width * side * side, 0, 0, width)


def timm_rows(processor: str) -> list[Sample]:
    """CNNs of timm on the Jetson Nano, "CPU" (four A57 cores) or "GPU" (family: the timm family). Deeplite, Apache-2.0.

    Needs timm. Tracing the networks takes some minutes once; their kernels are then remembered in the user's cache folder.
    """
    wanted = [r for r in _read("clsbench_timm_cnn.csv") if f"{r['device']} {r['backend']}".startswith(f"Jetson Nano {processor}")]
    known = _timm_kernels(tuple(sorted({r["model"] for r in wanted if r["family"] not in _NOT_CNN})))
    return [Sample(r["model"], r["family"], float(r["latency_ms"]), known[r["model"]]) for r in wanted if r["model"] in known]


@cache
def _timm_kernels(names: tuple[str, ...]) -> dict[str, KernelsAt]:
    counted = Path(counting.__file__).read_bytes()
    path = CACHE / f"timm-kernels-{hashlib.sha256(counted).hexdigest()[:12]}.json"
    stored: dict[str, list[Layer]] = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        if name not in stored:
            network, side = name.rsplit("_", 1)
            stored[name] = timm_layers(network.split(".")[0], int(side))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(stored))
    return {name: kernels_of([Layer(*row) for row in stored[name]]) for name in names}


def timm_layers(name: str, side: int) -> list[Layer]:
    """Kernels of a timm network for one (3, side, side) image, as edgeprune counts them."""
    graph = trace(timm_network(name), torch.zeros(1, 3, side, side))
    return layers_of(kernels(graph).at(graph.dense_widths))


def timm_network(name: str) -> torch.nn.Module:
    """The untrained network, in eval mode."""
    # A CPU-only torchvision has no compiled operators; timm imports it but needs none of them here.
    with suppress(RuntimeError):
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from timm import create_model

    network: torch.nn.Module = create_model(name).eval()
    return network


def _read(name: str) -> Iterator[dict[str, str]]:
    path = DATA / name
    if not path.exists():
        raise SystemExit(f"{path} is absent: set EDGEPRUNE_DATA to the folder that holds latency/{name}.")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as text:
        yield from csv.DictReader(text)
