from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.cost_fit import COLUMNS, ORDERS, conformal, features, fit, rates, seen_shares
from benchmarks.cost_models import kernels_at
from benchmarks.cost_tables import DATA, Layer, Row, count_layers, yolo_rows
from edgeprune.device.card import device
from edgeprune.device.cost import CostModel
from edgeprune.device.kernels import kernels
from edgeprune.graph.trace import trace

needs_tables = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public latency tables are not at {DATA} (EDGEPRUNE_DATA)")


class Mixed(nn.Module):
    """Depthwise, grouped, residual, concat, squeeze-and-excite and a norm that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.grouped = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(16))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 16, 1, bias=False))
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depth(x)
        y = torch.relu(self.grouped(y) + x)
        z = torch.relu(self.norm(torch.cat([x, y * torch.sigmoid(self.gate(y))], 1)))
        out: torch.Tensor = self.head(z.mean((2, 3)))
        return out


def test_two_independent_counts_agree() -> None:
    graph = trace(Mixed(), torch.zeros(1, 3, 32, 32))
    ours = kernels(graph).at(graph.dense_widths)
    theirs = kernels_at(count_layers(Mixed().to("meta"), 32))
    assert ours.kinds == theirs.kinds
    for figure in ("macs", "input_elements", "output_elements"):
        np.testing.assert_array_equal(getattr(ours, figure), getattr(theirs, figure), err_msg=figure)


def test_fit_recovers_constants_and_leaves_unseen_columns_at_the_shape() -> None:
    rng = np.random.default_rng(0)
    orders = np.array(list(ORDERS.values()))
    seen = np.array([not any(kind in column for kind in ("depthwise", "grouped", "linear")) for column in COLUMNS])
    x = rng.lognormal(sigma=1.5, size=(300, len(COLUMNS))) / orders * seen
    truth = orders * rng.uniform(1, 3, len(COLUMNS))
    got = fit(x, x @ truth, orders, 1e-9)
    np.testing.assert_allclose(got[seen], truth[seen], rtol=1e-3)
    speed = 1 / np.median(x @ orders / (x @ truth))
    np.testing.assert_allclose(got[~seen], speed * orders[~seen], rtol=1e-6)


def test_conformal_holds_nine_of_ten() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(200):
        low, high = conformal(rng.lognormal(sigma=0.1, size=110))
        fresh = rng.lognormal(sigma=0.1, size=200)
        held.append(np.mean((fresh >= low) & (fresh <= high)))
    assert 0.89 < np.mean(held) < 0.93


def test_shares_and_rates_describe_the_same_constants() -> None:
    orders = np.array(list(ORDERS.values()))
    row = Row("n", "n", 1.0, (Layer("conv3x3", 1e9, 1e5, 1e5, 1e4), Layer("pool", 0, 1e5, 1e5, 0)))
    shares = seen_shares([row], orders)
    assert shares["cat"] == shares["pool"] > 0
    assert shares["depthwise"] == 0
    assert shares["conv3x3"] + shares["pool"] == pytest.approx(1 - ORDERS["network_us"] * 1e3 / (features(row.layers) @ orders))
    assert rates(orders)["conv3x3"]["mac_ns"] == ORDERS["mac_ns conv3x3"]


@needs_tables
def test_the_shipped_rpi4_constants_describe_the_table() -> None:
    model = CostModel(device("rpi4-ort"))
    rows = yolo_rows("pi4_ort_latency")
    bounds = np.array([np.ravel(model.interval_ms(kernels_at(row.layers))) for row in rows])
    predicted = np.array([float(model.total_ms(kernels_at(row.layers))[0]) for row in rows])
    measured = np.array([row.latency_ms for row in rows])
    assert np.mean(np.abs(predicted / measured - 1) <= 0.1) >= 0.95
    assert 0.85 <= np.mean((measured >= bounds[:, 0]) & (measured <= bounds[:, 1])) <= 0.97
