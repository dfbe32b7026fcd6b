from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import NET, Command
from tests.colours import colour_net


def test_inspect(edgeprune: Command) -> None:
    done = edgeprune("inspect", *NET, "--input-shape", "1,3,8,8")
    assert done.code == 0
    assert done.out.splitlines()[0].split() == ["group", "channels", "parameter", "axes"]
    assert "2 group(s) of channels can shrink" in done.out
    assert "head.weight[0]" in done.out
    found = json.loads(edgeprune("inspect", *NET, "--input-shape", "1,3,8,8", "--json").out)
    assert {g["channels"] for g in found["groups"]} == {16, 32}
    assert list(found["frozen"]) == ["head.weight[0]"]


def test_profile_of_a_model_is_a_prediction(edgeprune: Command) -> None:
    words = ["profile", *NET, "--input-shape", "1,3,8,8", "--device", "rpi4"]
    done = edgeprune(*words)
    assert done.code == 0
    assert "predicted, not measured" in done.out
    assert {"a", "b", "c", "head"} <= {line.split()[0] for line in done.out.splitlines() if line}
    found = json.loads(edgeprune(*words, "--json").out)
    shares = [float(line.split()[-1].rstrip("%")) for line in done.out.splitlines() if line.endswith(("%", "% "))]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert found["latency_ms"]["low"] < found["latency_ms"]["value"] < found["latency_ms"]["high"]


def test_profile_of_an_artifact_is_a_measurement(edgeprune: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgeprune as ep
    from edgeprune.device import measure

    ep.export(colour_net(), torch.zeros(1, 3, 8, 8), here / "net.onnx")
    monkeypatch.setattr(measure, "FULL", {"processes": 3, "min_runs": 10, "min_seconds": 0.0, "warmup_runs": 1, "warmup_seconds": 0.0})
    done = edgeprune("profile", "net.onnx")
    assert done.code == 0
    assert "ms measured" in done.out
    found = json.loads(edgeprune("profile", "net.onnx", "--json").out)
    assert found["low_ms"] <= found["latency_ms"] <= found["high_ms"]
    refused = edgeprune("profile", "net.onnx", "--device", "rpi4")
    assert refused.code == 4
    assert "predicted" in refused.message


def test_evaluate(edgeprune: Command, here: Path) -> None:
    import edgeprune as ep

    expected = ep.evaluate(colour_net(), here / "data.npz")
    done = edgeprune("evaluate", *NET, "--data", "data.npz")
    assert done.out == f"{100 * expected.accuracy:.2f}% of 30 validation images right, loss {expected.loss:.4f}\n"
    ep.export(colour_net(), torch.zeros(1, 3, 8, 8), here / "net.onnx")
    found = json.loads(edgeprune("evaluate", "net.onnx", "--data", "data.npz", "--json").out)
    assert (found["accuracy"], found["images"]) == (expected.accuracy, 30)


@pytest.mark.parametrize(("command", "names"), [("criteria", ["l1", "nuclear_norm"]), ("allocators", ["uniform", "global", "knapsack"])])
def test_registries(edgeprune: Command, command: str, names: list[str]) -> None:
    done = edgeprune(command)
    assert set(names) <= {line.split()[0] for line in done.out.splitlines()}
    found = json.loads(edgeprune(command, "--json").out)
    assert set(names) <= found.keys()
    assert all(entry["summary"] and entry["source"] for entry in found.values())
