"""The public latency tables as rows of (network, family, milliseconds, kernels), the form cost_models.py fits.

Counting is that of edgeprune/device/kernels.py: norms folded, activations fused where ONNX Runtime fuses them, views free.
"""

from __future__ import annotations

import csv
import gzip
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DATA = Path(os.environ.get("EDGEPRUNE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "latency"

# What ONNX Runtime computes inside the conv before it (SiLU and hard swish are not among them).
_FUSABLE = {"relu", "hardtanh", "clamp", "leaky_relu", "sigmoid", "hardsigmoid", "tanh"}
_ELEMENTWISE = _FUSABLE | {"silu", "hardswish", "gelu", "add", "mul", "sub", "div"}
_POOLS = {"max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "mean", "adaptive_max_pool2d", "sum"}
_COPIES = {"cat": "cat", "upsample_nearest2d": "resize", "upsample_bilinear2d": "resize", "constant_pad_nd": "other", "stack": "other"}
# Recurrent and MLP networks of the timm table: not what a CNN cost model is for.
_NOT_CNN = ("sequencer", "gmlp", "gmixer")


class Layer(NamedTuple):
    """One kernel: its kind, MACs, and elements read, written and held as weights."""

    kind: str
    macs: float
    reads: float
    writes: float
    weights: float


@dataclass(frozen=True)
class Row:
    """One measured network."""

    network: str
    family: str
    latency_ms: float
    layers: tuple[Layer, ...]

    @property
    def macs(self) -> float:
        """MACs of the whole network."""
        return sum(layer.macs for layer in self.layers)


def yolo_rows(column: str) -> list[Row]:
    """YOLOv5 variants (12 architectures x 11 resolutions; family: the architecture). Deeplite, YOLOBench, Apache-2.0."""
    tables = _yolo_layers()
    return [
        Row(r["model_name"], r["arch"], float(r["latency_ms"]), tables[r["model_name"]])
        for r in _read("yolobench_yolov5.csv")
        if r["col"] == column
    ]


@cache
def _yolo_layers() -> dict[str, tuple[Layer, ...]]:
    # c1: 1x1, c3: 3x3 of stride 1, cx: other; elt: everything without MACs. Only the sum of reads and writes is in the table.
    kinds = {"c1": "conv1x1", "c3": "conv3x3", "cx": "conv_other", "elt": "elementwise"}
    tables: dict[str, list[Layer]] = defaultdict(list)
    for r in _read("yolobench_yolov5_layers.csv.gz"):
        half = float(r["act"]) / 2
        tables[r["model"]].append(Layer(kinds[r["kind"]], float(r["macs"]), half, half, float(r["weights"])))
    return {name: tuple(layers) for name, layers in tables.items()}


def nb201_rows(framework: str, every: int) -> list[Row]:
    """NAS-Bench-201 cells at 32x32 on one core of a Raspberry Pi 5, each `every`-th (family: the cell). HW-NAS-Bench-360."""
    rows = [r for r in _read("nb201_rpi5_latency_energy.csv.gz") if r["framework"] == framework][::every]
    return [Row(r["arch_idx"], r["arch_idx"], float(r["latency_ms"]), tuple(_nb201_layers(r["arch_str"]))) for r in rows]


def _nb201_layers(text: str) -> Iterator[Layer]:
    cell = {
        (node, int(source)): op
        for node, part in enumerate(text.split("+"), start=1)
        for op, source in (edge.split("~") for edge in part.strip("|").split("|"))
        if op != "none"
    }
    edges = _live_edges(cell)
    side, width = 32, 16
    yield _conv(3, width, side, 3)
    for stage in range(3):
        for _ in range(5):
            yield from _nb201_cell(edges, width, side)
        if stage < 2:
            yield _map("elementwise", 1, width, side)
            yield _conv(width, 2 * width, side, 3, stride=2)
            yield _conv(2 * width, 2 * width, side // 2, 3)
            yield _map("pool", 1, width, side)
            yield _conv(width, 2 * width, side // 2, 1)
            side, width = side // 2, 2 * width
            yield _map("elementwise", 2, width, side)
    yield _map("elementwise", 1, width, side)
    yield Layer("pool", 0, width * side * side, width, 0)
    yield Layer("linear", width * 10, width, 10, width * 10 + 10)


def _live_edges(cell: dict[tuple[int, int], str]) -> dict[tuple[int, int], str]:
    """Edges on a path from the cell's input to its output: a runtime removes the others."""
    reached, needed = {0}, {3}
    for node in (1, 2, 3):
        if any(source in reached for target, source in cell if target == node):
            reached.add(node)
    for node in (3, 2, 1):
        if node in needed:
            needed.update(source for target, source in cell if target == node and source in reached)
    return {edge: op for edge, op in cell.items() if edge[0] in needed and edge[1] in reached}


def _nb201_cell(edges: dict[tuple[int, int], str], width: int, side: int) -> Iterator[Layer]:
    # The ReLU before a conv is shared by the convs that read the same node.
    for _ in {source for (_, source), op in edges.items() if op.startswith("nor_conv")}:
        yield _map("elementwise", 1, width, side)
    for op in edges.values():
        if op.startswith("nor_conv"):
            yield _conv(width, width, side, 3 if op == "nor_conv_3x3" else 1)
        elif op == "avg_pool_3x3":
            yield _map("pool", 1, width, side)
    for node in {target for target, _ in edges}:
        for _ in range(sum(target == node for target, _ in edges) - 1):
            yield _map("elementwise", 2, width, side)


def _conv(inputs: int, outputs: int, side: int, kernel: int, stride: int = 1) -> Layer:
    kind = "conv1x1" if kernel == 1 else "conv3x3" if stride == 1 else "conv_other"
    out, weights = (side // stride) ** 2, inputs * outputs * kernel * kernel
    return Layer(kind, out * weights, inputs * side * side, outputs * out, weights + outputs)


def _map(kind: str, inputs: int, width: int, side: int) -> Layer:
    return Layer(kind, 0, inputs * width * side * side, width * side * side, 0)


def timm_rows() -> list[Row]:
    """CNNs of timm on the Jetson Nano's four A57 cores (family: the timm family). Deeplite, Apache-2.0. Takes a minute, needs timm."""
    wanted = [r for r in _read("clsbench_timm_cnn.csv") if "CPU" in r["backend"] and r["family"] not in _NOT_CNN]
    rows = []
    for r in wanted:
        name, side = r["model"].rsplit("_", 1)
        layers = timm_layers(name.split(".")[0], int(side))
        if layers is not None:
            rows.append(Row(r["model"], r["family"], float(r["latency_ms"]), layers))
    return rows


def count_layers(model: torch.nn.Module, side: int) -> tuple[Layer, ...]:
    """Kernels of a model on the meta device asked for one (3, side, side) image; independent of edgeprune's own trace."""
    with torch.no_grad(), _Counter() as counter:
        model.eval()(torch.zeros(1, 3, side, side, device="meta"))
    return tuple(counter.layers)


@cache
def timm_layers(name: str, side: int) -> tuple[Layer, ...] | None:
    """Kernels of a timm network, counted on meta tensors (no arithmetic, no weights); None where it cannot run on those."""
    # A CPU-only torchvision has no compiled operators; timm imports it but needs none of them here.
    with suppress(RuntimeError):
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from timm import create_model

    try:
        with torch.device("meta"):
            model = create_model(name)
    except NotImplementedError:
        # RegNets compute their widths with tensors, which meta tensors cannot: build those for real.
        model = create_model(name).to("meta")
    try:
        return count_layers(model, side)
    except (NotImplementedError, RuntimeError):  # the forward needs values, which meta tensors have not: not counted
        return None


class _Counter(TorchDispatchMode):
    """Records one Layer per kernel a runtime would launch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.layers: list[Layer] = []
        self._conv_outputs: set[int] = set()
        self._alive: list[Any] = []  # keeps the tensors, so that their ids stay theirs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        out = result[0] if isinstance(result, tuple | list) else result
        if isinstance(out, torch.Tensor):
            self._alive.append(out)
            self._record(func.__name__.split(".")[0].rstrip("_"), args, out)
        return result

    def _record(self, name: str, args: Any, out: Any) -> None:
        flat = [t for a in args for t in (a if isinstance(a, tuple | list) else (a,)) if isinstance(t, torch.Tensor)]
        reads, writes = sum(t.numel() for t in flat), out.numel()
        follows_conv = bool(flat) and id(flat[0]) in self._conv_outputs
        if name == "convolution":
            weight = args[1]
            self.layers.append(
                Layer(_conv_kind(weight, args), writes // out.shape[1] * weight.numel(), args[0].numel(), writes, weight.numel())
            )
        elif name in ("addmm", "mm"):
            x, weight = args[-2:]
            self.layers.append(Layer("linear", x.shape[0] * weight.numel(), x.numel(), writes, weight.numel()))
        elif not (follows_conv and (name in _FUSABLE or "batch_norm" in name)):
            self._stands_alone(name, args, reads, writes)
            # In-place operations return their input: it is no longer what the conv left.
            self._conv_outputs.discard(id(out))
            return
        self._conv_outputs.add(id(out))

    def _stands_alone(self, name: str, args: Any, reads: int, writes: int) -> None:
        if "batch_norm" in name:
            self.layers.append(Layer("norm", 0, args[0].numel(), writes, 4 * args[1].numel()))
            return
        kind = "elementwise" if name in _ELEMENTWISE else "norm" if "_norm" in name else "pool" if name in _POOLS else _COPIES.get(name)
        if kind:
            self.layers.append(Layer(kind, 0, reads, writes, 0))


def _conv_kind(weight: Any, args: Any) -> str:
    kernel, stride, groups = tuple(weight.shape[2:]), args[3], args[-1]
    if groups > 1:
        return "depthwise" if weight.shape[1] == 1 else "grouped"
    if max(kernel) == 1:
        return "conv1x1"
    return "conv3x3" if kernel == (3, 3) and list(stride) == [1, 1] else "conv_other"


def _read(name: str) -> Iterator[dict[str, str]]:
    path = DATA / name
    if not path.exists():
        raise SystemExit(f"{path} is absent: set EDGEPRUNE_DATA to the folder that holds latency/{name}.")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as text:
        yield from csv.DictReader(text)
