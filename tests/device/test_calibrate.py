from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import edgeprune as ep
from edgeprune.cli import main
from edgeprune.device import calibrate as calibration
from edgeprune.device.calibrate import ANCHORS, Probe, anchored, best_multiple, calibrate, probes, start
from edgeprune.device.card import Device, device
from edgeprune.device.fit import MAC_KINDS
from edgeprune.device.kernels import kernels
from edgeprune.device.store import replace_profile, stored_measurements, user_cards
from edgeprune.errors import DeviceError, Unreachable
from edgeprune.export.flatbuffer import operations
from edgeprune.graph.trace import trace
from tests.device.boards import Board, Client


def test_probes_are_of_the_kind_they_name() -> None:
    for probe in {p.kind: p for p in probes(quick=False)}.values():
        network, example = probe.build()
        kinds = kernels(trace(network, example)).kinds
        if probe.kind in ANCHORS:
            assert len(set(kinds)) >= 4
            continue
        wanted = "depthwise" if probe.kind == "block" else probe.kind
        assert kinds.count(wanted) >= probe.depth - 1, probe
    assert set(MAC_KINDS) <= {p.kind for p in probes(quick=False)}
    assert len({p.name for p in probes(quick=False)}) == len(probes(quick=False))


@pytest.mark.parametrize("kind", ["cat", "scale"])
def test_converters_leave_the_probes_their_kernels(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    network, example = Probe(kind, 8, 8, 2).build()
    found = operations(ep.export(network, example, tmp_path / "probe", format="tflite").path.read_bytes())
    assert found[{"cat": "CONCATENATION", "scale": "MUL"}[kind]] == 2
    assert not found["TRANSPOSE"]


def test_what_the_runtime_does_not_run_is_left_out(tmp_path: Path) -> None:
    store, quick = tmp_path / "kept.json", probes(quick=True)
    times = {probe.name: 0.1 + 1e-7 * probe.channels * probe.side**2 for probe in quick}
    skipped = next(probe.name for probe in quick if probe.kind == "elementwise")
    store.write_text(json.dumps({**times, skipped: 0.0006}))
    fit = calibrate(device("rpi4", host="gone"), quick=True, store=store).profile.fit
    assert fit.rows == len(quick) - 1
    assert fit.source.endswith(f"(the runtime skips them): {skipped}")


def test_measurements_in_the_store_are_not_measured_again(tmp_path: Path) -> None:
    store, seen = tmp_path / "kept.json", []
    store.write_text(json.dumps({probe.name: 0.1 + 1e-7 * probe.channels * probe.side**2 for probe in probes(quick=True)}))
    made = calibrate(device("rpi4", host="gone"), quick=True, store=store, progress=lambda *state: seen.append(state))
    assert made.profile.fit.rows == len(probes(quick=True))
    assert seen == [("networks", 14, 14)]


def test_int8_is_a_profile_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    store, board = tmp_path / "kept.json", device("rpi4", host="gone")
    store.write_text(json.dumps({probe.name: 0.1 + 1e-7 * probe.channels * probe.side**2 for probe in probes(quick=True)}))
    made = calibrate(board, quick=True, precision="int8", store=store).profile
    assert (made.precision, made.fit.source) == ("int8", "14 small int8 networks measured on rpi4 at gone")
    assert "int8" in made.description and "fp32" not in made.description
    replace_profile(board, made, user_cards() / "rpi4.toml")
    assert (device("rpi4").profile, device("rpi4-ort-int8").constants) == ("rpi4-ort", made)
    assert stored_measurements(board, "int8") != stored_measurements(board)
    assert start(device("rpi4-ort-int8")).precision == "int8"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    assert ep.predict(model, torch.zeros(1, 3, 16, 16), "rpi4-ort-int8").latency_ms.value > 0


@pytest.mark.parametrize("kind", ["conv3x3", "linear", "block", "pool"])
def test_int8_probes_are_quantized(kind: str, tmp_path: Path) -> None:
    network, example = Probe(kind, 8, 1 if kind == "linear" else 8, 2).build()
    made = ep.export(network, example, tmp_path / "probe", quantizer=calibration._quantizer(example))
    names = {node.op_type for node in onnx.load(made.path).graph.node}
    assert "DequantizeLinear" in names


@pytest.fixture
def attached(card: Path) -> Device:
    """A board without a profile, which this machine plays."""
    return device(card, host="local")


TINY = tuple(Probe(kind, 8, 8, 2) for kind in ("conv1x1", "conv3x3", "depthwise", "elementwise", "block"))
BRIEF = {"processes": 3, "min_runs": 5, "min_seconds": 0.0, "warmup_runs": 1, "warmup_seconds": 0.0}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of seconds."""
    monkeypatch.setattr(calibration, "probes", lambda quick: TINY)
    monkeypatch.setattr(calibration, "_SCHEDULE", BRIEF)


@pytest.mark.usefixtures("tiny")
def test_two_boards_over_ssh_calibrate_a_card_without_a_profile(
    board: Board, client: Client, card: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, interrupted once: what was measured until then is not measured again."""
    tmp_path = card.parent
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "config/edgeprune/devices"
    folder.mkdir(parents=True)
    card.rename(folder / "pi4.toml")
    second = Board(tmp_path / "second")
    second.use_python()
    second.start()
    try:
        client.configure(client.knows("pi", board) + client.knows("other", second))
        client.trust(board, second)
        both = device("pi4", host="other,pi")
        store = stored_measurements(both)

        def stop(what: str, done: int, total: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(both, quick=True, store=store, progress=stop)
        kept = json.loads(store.read_text())
        assert len(kept) == 2
        monkeypatch.setattr(sys, "argv", ["edgeprune", "device", "calibrate", "pi4", "--host", "other,pi", "--quick"])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, capsys.readouterr().err
        assert board.empties() and second.empties()
        assert all(any((b.home / ".cache/edgeprune").rglob("*.onnx")) for b in (board, second))
    finally:
        second.stop()
    made = device("pi4")
    assert (made.profile, made.predicts, made.threads) == ("pi4-ort", True, 1)
    assert made.constants.fit.source == "5 small networks measured on pi4 at other and pi"
    assert "% off on average" in capsys.readouterr().err
    rows = dict(line.split(",") for line in (folder / "pi4-ort.csv").read_text().splitlines()[1:])
    assert set(rows) == {probe.name for probe in TINY}
    assert all(float(rows[name]) == pytest.approx(ms, rel=1e-5) for name, ms in kept.items())
    assert not store.exists()  # the next calibration measures anew
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    assert ep.predict(model, torch.zeros(1, 3, 16, 16), "pi4").latency_ms.value > 0


@pytest.mark.usefixtures("tiny")
def test_what_cannot_be_calibrated(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="not attached, so there is nothing to calibrate"):
        calibrate(device("rpi4"), quick=True, store=tmp_path / "kept.json")
    with pytest.raises(Unreachable, match=r"no connection to 127\.0\.0\.1:1"):
        calibrate(device("rpi4", host="127.0.0.1:1"), quick=True, store=tmp_path / "kept.json")


def test_a_board_without_a_profile_starts_as_another_one(attached: Device) -> None:
    begun = start(attached)
    assert (begun.threads, begun.power, begun.kernels) == (1, None, device("rpi4-ort").constants.kernels)
    assert start(device("rpi5")) is device("rpi5").constants


def test_the_staircase_gives_the_multiple_it_has() -> None:
    widths = tuple(range(40, 73, 4))
    for step in (4, 8, 16):
        rows = [[np.ceil(w / step) * step * scale for w in widths] for scale in (1.0, 2.5)]
        assert best_multiple(widths, rows) == step
    assert best_multiple(widths, [[float(w) for w in widths]]) == 4


def test_anchors_are_read_from_a_file(tmp_path: Path) -> None:
    profile = device("rpi4").constants
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "def make(c): return torch.nn.Sequential(torch.nn.Conv2d(3, c, 3), torch.nn.ReLU(), torch.nn.Conv2d(c, c, 3))\n"
        "def a(): return make(8)\ndef b(): return make(16)\ndef c(): return make(32)\n"
    )
    entries = [
        {"model": f"{tmp_path / 'nets.py'}:{name}", "input_shape": [1, 3, 32, 32], "latency_ms": ms}
        for name, ms in (("a", 2.0), ("b", 4.0), ("c", 10.0))
    ]
    path = tmp_path / "measurements.json"
    path.write_text(json.dumps(entries))
    made, before, after, names = anchored(profile, path)
    assert len(names) == len(before) == len(after) == 3
    assert np.abs(after).mean() < np.abs(before).mean()
    assert made.kernels["conv3x3"].mac_ns > profile.kernels["conv3x3"].mac_ns
    path.write_text('{"model": 1}')
    with pytest.raises(DeviceError, match="JSON list"):
        anchored(profile, path)


def test_a_probe_is_the_same_every_time() -> None:
    one, other = (Probe("conv3x3", 8, 8).build()[0].state_dict() for _ in range(2))
    assert all(bool((one[name] == other[name]).all()) for name in one)
