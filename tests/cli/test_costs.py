from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edgeprune.cli.costs import print_cost
from edgeprune.device.calibrate import probes
from edgeprune.device.card import device
from edgeprune.device.cost import predict_graph
from tests.cli.conftest import NET, Command
from tests.device.test_kernels import tiny


def test_every_layer_with_what_bounds_it(capsys: pytest.CaptureFixture[str]) -> None:
    pi = device("rpi4")
    cost = predict_graph(tiny(), None, pi)
    print_cost(cost, pi)
    out = capsys.readouterr().out
    table = out.split("\n\n")[0].splitlines()
    assert table[0].split() == ["layer", "kind", "bound", "by", "ms", "M", "MACs", "KB", "moved", "share"]
    assert [line.split()[0] for line in table[1:5]] == ["a", "b", "silu", "fc"]
    assert all(f"{layer.kind} " in line and f" {layer.bound} " in line for line, layer in zip(table[1:5], cost.per_layer, strict=True))
    assert "rpi4 means its default profile rpi4-ort" in out
    assert "90% interval; predicted, not measured" in out
    assert "above idle" in out and "in total" in out
    assert all(note in out for note in cost.notes)


def test_anchors_show_the_error_before_and_after_and_later_predictions_use_them(
    edgeprune: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / "config"))
    (here / "nets.py").write_text("import torch\ndef a(): return torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU())\n")
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU()).state_dict(), here / "a.pt")
    asked, sides = ("profile", "a.pt", "--model", "nets.py:a", "--device", "rpi4", "--json", "--input-shape"), (64, 128, 256)
    dense = [edgeprune(*asked, f"1,3,{s},{s}") for s in sides]
    before = [json.loads(done.out)["latency_ms"]["value"] for done in dense]
    entries = [{"model": "nets.py:a", "input_shape": [1, 3, s, s], "latency_ms": 2 * ms} for s, ms in zip(sides, before, strict=True)]
    (here / "measurements.json").write_text(json.dumps(entries))
    done = edgeprune("device", "calibrate", "rpi4", "--anchors", "measurements.json")
    assert done.code == 0
    head, *rows = done.out.strip().splitlines()
    assert "error before" in head and "error after" in head
    assert all("-50.0%" in row and abs(float(row.split()[-1].rstrip("%"))) < 5 for row in rows[-3:])
    assert "rpi4.toml" in done.err and "3 anchors on this board" in done.err
    again = json.loads(edgeprune(*asked, "1,3,128,128").out)
    assert again["latency_ms"]["value"] == pytest.approx(2 * before[1], rel=0.05)
    assert "3 anchors on this board" in again["basis"]


def test_a_calibration_that_was_measured_before_is_fitted_written_and_used(
    edgeprune: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    kept = here / "cache/edgeprune/calibration-rpi4-ort-int8-pi@gone.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({probe.name: 0.1 + 1e-7 * probe.channels * probe.side**2 for probe in probes(quick=True)}))
    asked = ("device", "calibrate", "rpi4", "--quick", "--host", "pi@gone", "--precision")
    assert edgeprune(*asked, "fp64").code == 2
    assert "leave --precision out" in edgeprune(*asked, "int8", "--anchors", "measurements.json").message
    done = edgeprune(*asked, "int8")  # nothing is left to measure, so nobody is called
    assert done.code == 0, done.err
    assert "rpi4-ort-int8: " in done.err and "within ±10 %" in done.err
    shown = edgeprune("profile", *NET, "--input-shape", "1,3,8,8", "--device", "rpi4-ort-int8")
    assert "five folds" in shown.out and "unseen kinds and widths" in shown.out
    assert edgeprune("device", "show", "rpi4").out.count("14 small int8 networks measured on rpi4") == 1
    refused = edgeprune("profile", *NET, "--input-shape", "1,3,8,8", "--device", "rpi4-ort-int8", "--host", "pi@gone")
    assert refused.code == 2 and "export it with --quantize int8" in refused.message
