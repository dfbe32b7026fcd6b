from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from benchmarks import graph_speed
from benchmarks.graph_speed import depth_table, exponent, fresh, network, speed_table, times

OURS = ("forward_cpu_s", "trace_cpu_s", "slim_cpu_s", "trace_and_slim_cpu_s")


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power: float) -> None:
    depths = [20, 56, 110, 1202]
    assert exponent(depths, [3e-3 * d**power for d in depths]) == pytest.approx(power)


def test_cifar_networks_are_named_by_their_depth() -> None:
    model, (x,) = network("cifar_resnet20")
    assert not model.training and x.shape == (1, 3, 32, 32)
    assert sum(1 for n, _ in model.named_parameters() if n.endswith(("conv1.weight", "conv2.weight"))) == 19


def test_a_measured_row_has_all_parts_and_makes_a_table() -> None:
    row = times("cifar_resnet8", rounds=2, with_peer=False)
    assert all(row[part] > 0 for part in OURS)
    assert row["peer_graph_cpu_s"] is None and row["peer_note"] == "not asked for"
    memory = {"extra_mb": 7, "limit_cpu_s": 0.4}
    result: dict[str, Any] = {"machine": {"cpu": "a board", "torch": "2"}, "rounds": 2, "peer": "peer 1"}
    table = speed_table(result | {"rows": [row | memory, {"network": "broken", "error": "KeyError: 'x'"}]})
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "not asked for" in lines[2] and "0.4" in lines[2]
    assert "KeyError" in lines[3]
    deep = depth_table(result | {"rows": [row | {"depth": 8}], "exponents": dict.fromkeys(OURS, 1.01)})
    powers = deep.splitlines()[-1]
    assert powers.startswith("| p |") and powers.count("1.01") == 4


@pytest.mark.skipif(importlib.util.find_spec("torch_pruning") is not None, reason="the peer is installed")
def test_an_absent_peer_is_named_with_the_way_to_install_it() -> None:
    row = times("cifar_resnet8", rounds=1)
    assert row["peer_step_cpu_s"] is None and row["trace_cpu_s"] > 0
    assert row["peer_note"] == f"not installed: pip install --no-deps {graph_speed.PEER}"


def test_a_network_that_fails_in_its_process_is_an_error_in_its_row() -> None:
    assert fresh("times", "cifar_resnet9")["error"].startswith("ValueError: a CIFAR ResNet has 6n + 2 layers")
    assert json.dumps(fresh("peak", "cifar_resnet8", "forward")).isdigit()
