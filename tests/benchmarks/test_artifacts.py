from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.artifacts import NETWORKS, calibrate, table, written
from benchmarks.artifacts_speed import WAYS, _together, rounds
from benchmarks.artifacts_speed import table as speed_table
from edgeprune.allocate import RULES
from tests.export.export_nets import Plain, settle


def test_the_list_has_25_networks() -> None:
    assert len(set(NETWORKS)) == len(NETWORKS) == 25


def test_a_row_holds_figures_or_the_users_error(tmp_path: Path) -> None:
    class Bessel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = torch.special.bessel_j0(x)
            return made

    x = torch.rand(4, 3, 12, 12)
    row = written(settle(Plain()), x[:1], x, tmp_path / "m.onnx", "onnx")
    assert row["relative"] < 1e-5 and row["operations"]["Conv"] == 2
    failed = written(Bessel(), x[:1], x, tmp_path / "n.onnx", "onnx")
    assert failed["exit"] == 5 and "bessel_j0" in failed["error"]
    found: dict[str, Any] = {"network": "plain", "macs": 1, "macs_removed": 0.5}
    text = table([found | {f"{k} {f}": row if f == "onnx" else failed for k in ("dense", "pruned") for f in ("onnx", "tflite")}])
    assert "dense onnx 1, dense tflite 0" in text
    assert "bessel_j0" in text.splitlines()[-1]
    assert "killed" in table([{"network": "plain", "error": "killed"}])


def test_calibration_sees_the_images_and_trains_nothing_else() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    images = torch.rand(8, 3, 4, 4) + 5
    calibrate(model, images)
    norm: Any = model[0]
    assert torch.allclose(norm.running_mean, images.mean((0, 2, 3)))
    assert not norm.training


def test_speed_table() -> None:
    ran: list[str] = []
    found = rounds({"dense onnx 1": lambda: ran.append("d"), "pruned onnx 1": lambda: ran.append("p")}, total=3, block_seconds=0)
    assert len(found["dense onnx 1"]) == len(found["pruned onnx 1"]) and {"d", "p"} == set(ran)
    row = {"latency_ms": 2.0, "speedup": 1.8, "speedup_low": 1.7, "speedup_high": 1.9}
    sizes = {"dense fp32 onnx": 4_000_000, "plain int8 onnx": 2_000_000}
    removed = {"dense fp32": 0.0, "plain int8": 0.5}
    rows = {"dense fp32 onnx 1": row, "plain int8 onnx 1": row}
    network = {"network": "mobilenet_v2", "macs_removed": removed, "size_bytes": sizes, "rows": rows}
    text = speed_table({"machine": "m", "versions": {"torch": "2"}, "rounds": 3, "networks": [network]})
    assert "| mobilenet_v2 | int8, --macs 0.5 | ONNX Runtime | 1 | 2.00 | 2.00 | 1.80 (1.70 to 1.90) | 50.0% | 0.90 |  |" in text
    fast = {**network, "macs_removed": {"plain fp32": 0.5}, "size_bytes": {"plain fp32 onnx": 1}, "rows": {"plain fp32 onnx 1": row}}
    ways = speed_table({"machine": "m", "versions": {}, "rounds": 3, "networks": [fast]})
    assert ways.splitlines()[-1] == "| mobilenet_v2 | --macs 0.5 | 50.0% | 1.80 | 0.90 |  |"
    judged = speed_table({"machine": "m", "versions": {}, "rounds": 3, "networks": [network | {"kept_right": {"dense": 99.5}}]})
    assert "| mobilenet_v2 | dense fp32 | ONNX Runtime | 1 | 4.00 | 2.00 | 1 | 0.0% |  | 99.5 |" in judged


def test_rows_that_are_measured_later_join_the_earlier_ones() -> None:
    first, *_, last = WAYS["cifar:resnet56"]
    keys = ("macs_removed", "size_bytes", "kept_right", "rows")
    earlier = {"network": "cifar:resnet56", "macs": 7, **{key: {"dense fp32 onnx 1": 1, f"{last} fp32 onnx 1": 2} for key in keys}}
    found = {"network": "cifar:resnet56", **{key: {"dense fp32 onnx 1": 3, f"{first} fp32 onnx 1": 4} for key in keys}}
    both = _together(earlier, found)
    assert both["rows"] == {"dense fp32 onnx 1": 1, f"{first} fp32 onnx 1": 4, f"{last} fp32 onnx 1": 2}
    assert list(both["rows"]) == ["dense fp32 onnx 1", f"{first} fp32 onnx 1", f"{last} fp32 onnx 1"] and both["macs"] == 7


def test_ways_are_options_that_allocators_take() -> None:
    for ways in WAYS.values():
        for typed, asked in ways.values():
            assert f"--macs {asked['macs']}" in typed and ("--latency-ms" in typed) == ("speedup" in asked)
            assert asked.keys() <= {"macs", "speedup", "device", *RULES}
