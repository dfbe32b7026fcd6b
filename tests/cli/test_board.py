from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import NET, Command
from tests.colours import colour_net

BRIEF = {"processes": 3, "min_runs": 10, "min_seconds": 0.0, "warmup_runs": 1, "warmup_seconds": 0.0}


def test_devices(edgeprune: Command) -> None:
    done = edgeprune("device", "list")
    assert {("host", "measured"), ("rpi4", "predicted")} <= {(w[0], w[2]) for w in map(str.split, done.out.splitlines()[1:])}
    shown = edgeprune("device", "show", "rpi4")
    card = json.loads(edgeprune("device", "show", "rpi4", "--json").out)
    assert card["board"]["soc"] in shown.out
    assert all(f"{name}" in shown.out and f"{p['fit']['mape']:.1f} % on average" in shown.out for name, p in card["profiles"].items())
    assert "not validated" in shown.out and "rpi4-ort" in shown.err
    assert "there is no profile to predict with" in edgeprune("device", "show", "rpi3").out
    assert edgeprune("device", "show", "rpi9").code == 4


def test_devices_as_json(edgeprune: Command) -> None:
    listed = json.loads(edgeprune("device", "list", "--json").out)
    assert listed["rpi4-ort"]["board"] == "rpi4"
    assert listed["rpi4-ort"]["figures"] == "predicted"
    assert {name for name, entry in listed.items() if entry["figures"] == "measured"} == {"host-ort", "host-litert"}


def test_boards_of_which_nothing_is_predicted_yet_say_so(edgeprune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(__file__).parents[2] / "devices" / "rpi4.toml"
    bare = shipped.read_text().split("# Written by")[0].replace('default_profile = "rpi4-ort"\n', "")
    (tmp_path / "config/edgeprune/devices").mkdir(parents=True)
    (tmp_path / "config/edgeprune/devices/toaster.toml").write_text(bare)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    rows = [line.split() for line in edgeprune("device", "list").out.splitlines()]
    assert ["toaster", "toaster", "measured", "only"] in [row[:4] for row in rows]
    refused = edgeprune("profile", *NET, "--input-shape", "1,3,8,8", "--device", "toaster")
    assert refused.code == 4
    assert "no fitted profile" in refused.message


def test_profile_of_an_artifact_is_a_measurement(edgeprune: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgeprune as ep
    from edgeprune.device import measure

    ep.export(colour_net(), torch.zeros(1, 3, 8, 8), here / "net.onnx")
    monkeypatch.setattr(measure, "FULL", BRIEF)
    done = edgeprune("profile", "net.onnx", "--no-energy")
    assert done.code == 0
    for words in ("ms measured", "95% interval", "p99", "peak memory of the process", "load ", "Conv", "throttle word"):
        assert words in done.out
    found = json.loads(edgeprune("profile", "net.onnx", "--no-energy", "--json", "--out", "other.json").out)
    assert found["low_ms"] <= found["latency_ms"] <= found["high_ms"]
    assert found["operations"]
    assert json.loads((here / "other.json").read_text())["net"]["latency_ms"] == found["latency_ms"]
    assert (here / "measurements.json").is_file()
    refused = edgeprune("profile", "net.onnx", "--device", "rpi4")
    assert refused.code == 4
    assert "not attached" in refused.message


def test_a_model_is_exported_and_measured_where_a_board_is_attached(
    edgeprune: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeprune.device import measure

    monkeypatch.setattr(measure, "FULL", BRIEF)
    done = edgeprune("profile", *NET, "--input-shape", "1,3,8,8", "--no-energy")
    assert done.code == 0, done.err
    assert "on host-ort" in done.out
    assert not list(here.glob("*.onnx"))


def test_hosts_that_make_no_sense(edgeprune: Command) -> None:
    refused = edgeprune("profile", "net.onnx", "--host", "pi@board")
    assert refused.code == 4
    assert "--device rpi4" in refused.message
    several = edgeprune("device", "check", "rpi4", "--host", "pi@a,pi@b")
    assert several.code == 4
    assert "names several boards" in several.message
    model = edgeprune("evaluate", "net.pt", "--data", "data.npz", "--host", "pi@board")
    assert model.code == 2
    assert "net.pt is none: export it first" in model.message
    lost = edgeprune("device", "check", "rpi4", "--host", "127.0.0.1:1")
    assert lost.code == 4
    assert "no connection to 127.0.0.1:1" in lost.message
    no_meter = edgeprune("profile", "net.onnx", "--meter", "gone.csv")
    assert no_meter.code == 2
    assert "gone.csv cannot be read" in no_meter.message


def test_check_of_this_machine(edgeprune: Command) -> None:
    done = edgeprune("device", "check", "host")
    assert done.code == 0, done.err
    assert {"numpy", "onnxruntime", "CPUs"} <= {line.split()[1] for line in done.out.splitlines()[1:]}
    assert all(f["ok"] for f in json.loads(edgeprune("device", "check", "host", "--json").out) if f["needed"])
