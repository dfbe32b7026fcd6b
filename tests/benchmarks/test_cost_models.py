from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.cost_models import CORE, CPU, GPU, LITERT, macs_only, noise
from benchmarks.cost_tables import DATA, Layer, kernels_of, layers_of, nb201_kernels, nb201_rows, yolo_rows
from edgeprune.device.card import device
from edgeprune.device.cost import CostModel
from edgeprune.device.fit import COLUMNS, Sample
from edgeprune.device.kernels import kernels
from edgeprune.graph.trace import trace

needs_tables = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public latency tables are not at {DATA} (EDGEPRUNE_DATA)")
# Every operation, a node without input, one that is read twice.
CELL = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_3x3~2|"


class Cell(nn.Module):
    """A NAS-Bench-201 cell as its authors build it."""

    def __init__(self, text: str, width: int) -> None:
        super().__init__()
        self.text = text
        parts = [edge.split("~") for node in text.split("+") for edge in node.strip("|").split("|")]
        self.ops = nn.ModuleList(_operation(op, width) for op, _ in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, ops = [x], iter(self.ops)
        for node in self.text.split("+"):
            ends = [next(ops)(values[int(edge.split("~")[1])]) for edge in node.strip("|").split("|")]
            values.append(sum(ends[1:], ends[0]))
        return values[-1]


class Zero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul(0.0)


def _operation(op: str, width: int) -> nn.Module:
    if op.startswith("nor_conv"):
        side = int(op[-1])
        return nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, side, padding=side // 2, bias=False), nn.BatchNorm2d(width))
    return {"none": Zero(), "skip_connect": nn.Identity(), "avg_pool_3x3": nn.AvgPool2d(3, 1, 1)}[op]


@needs_tables
@pytest.mark.parametrize("framework", ["onnx", "litert"])
def test_the_table_s_networks_are_counted_as_edgeprune_counts_them(framework: str) -> None:
    whole = Counter(layer[:6] for layer in layers_of(nb201_kernels(CELL, framework)))
    graph = trace(Cell(CELL, 16).eval(), torch.zeros(1, 16, 32, 32))
    cell = Counter(layer[:6] for layer in layers_of(kernels(graph).at(graph.dense_widths)))
    convs = {layer: count for layer, count in cell.items() if layer[1]}
    assert convs and all(whole[layer] >= 5 * count for layer, count in convs.items())
    counted = Counter(layer[0] for layer in cell.elements())
    assert counted == {"conv3x3": 2, "conv1x1": 1, "pool": 1, "elementwise": counted["elementwise"]}


def test_layers_and_kernels_are_the_same() -> None:
    layers = [Layer("conv3x3", 9e6, 1e5, 1e5, 9e2, 9e5, 10), Layer("pool", 0, 1e5, 1e5)]
    assert layers_of(kernels_of(layers)) == layers


def test_priors_name_every_column() -> None:
    assert all(set(prior) == set(COLUMNS) for prior in (CPU, LITERT, CORE))
    assert set(COLUMNS) - set(GPU) == {"patch_byte_ns", "far_byte_ns", "far_weight_byte_ns"}


def test_noise_is_what_equal_networks_differ_by() -> None:
    at = kernels_of([Layer("conv3x3", 9e6, 1e5, 1e5, 9e2, 9e5, 10)])
    pair = [Sample(str(i), str(i), ms, at) for i, ms in enumerate((9.2, 10.0, 10.8))]
    assert noise(pair) == "3 rows share their kernels with another: 5.3 % from their median, 100 % within ±10 %"
    assert noise(pair[:1]) == "no two rows have the same kernels"
    mape, within = macs_only([Sample(s.network, s.family, s.at.macs.sum() * 2e-6, s.at) for s in pair * 4])
    assert mape == pytest.approx(0, abs=1e-9)
    assert within == 100


@needs_tables
@pytest.mark.parametrize(
    ("profile", "column", "share"),
    [("rpi4-ort", "pi4_ort_latency", 0.95), ("rpi4-litert", "raspi4_tflite_latency", 0.65), ("rpi5-ort", "pi5_ort_latency", 0.85)],
)
def test_the_shipped_constants_describe_the_yolo_tables(profile: str, column: str, share: float) -> None:
    _holds(profile, yolo_rows(column), share)


@needs_tables
@pytest.mark.parametrize(("profile", "framework"), [("rpi5-ort-1t", "onnx"), ("rpi5-litert", "litert")])
def test_the_shipped_constants_describe_the_cells(profile: str, framework: str) -> None:
    _holds(profile, nb201_rows(framework, 20), 0.95)


def _holds(profile: str, rows: list[Sample], share: float) -> None:
    model = CostModel(device(profile))
    bounds = np.array([np.ravel(model.interval_ms(row.at)) for row in rows])
    predicted = np.array([float(model.total_ms(row.at)[0]) for row in rows])
    measured = np.array([row.latency_ms for row in rows])
    assert np.mean(np.abs(predicted / measured - 1) <= 0.1) >= share
    assert 0.8 <= np.mean((measured >= bounds[:, 0]) & (measured <= bounds[:, 1])) <= 1.0


def test_results_and_cards_say_the_same() -> None:
    import json

    results = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "cost_models.json").read_text())["held_out"]
    for name, figures in results.items():
        fit = device(name).constants.fit
        assert (fit.mape, fit.within_10, fit.coverage) == (figures["mape"], figures["within_10"], figures["coverage"])
        assert 85 <= fit.coverage <= 95
