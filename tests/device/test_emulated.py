"""The emulated ARM board, end to end: real OpenSSH, real aarch64 Python, onnxruntime and LiteRT. Skips with the reason where it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import edgeprune as ep
from benchmarks.instructions import NETWORKS, RESULTS, exported
from edgeprune import pipeline
from edgeprune.device import calibrate, emulated
from edgeprune.device.calibrate import Probe
from edgeprune.device.card import Device, device
from edgeprune.device.check import check
from edgeprune.device.connection import Local, connect
from edgeprune.device.measure import Schedule, measure, measure_on
from edgeprune.device.parity import compared, outputs
from edgeprune.device.session import sitting
from edgeprune.device.store import replace_profile
from edgeprune.errors import DeviceError, Unreachable
from tests.colours import colour_data, colour_net
from tests.device.boards import Board, Client, children, is_agent, need_sshd

BRIEF: Schedule = {"processes": 3, "min_runs": 5, "min_seconds": 0.0, "warmup_runs": 1, "warmup_seconds": 0.0}
MODEL = "Raspberry Pi 4 Model B Rev 1.4 (emulated)"


@pytest.fixture(scope="session")
def root() -> Path:
    """The prepared root of the board."""
    folder = emulated.default_folder()
    if missing := emulated.missing_tools():
        apt = shutil.which("apt-get")
        if not apt or os.getuid():
            pytest.skip(f"not installed and not root to install it: {', '.join(missing)}")
        done = subprocess.run([apt, "install", "-y", "--no-install-recommends", *missing], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"apt-get cannot install {', '.join(missing)}: {done.stderr.strip().splitlines()[-1]}")
    try:
        emulated.prepare(folder)
    except DeviceError as error:
        pytest.skip(str(error))
    return folder


def sys_tree(folder: Path) -> Path:
    """The board's /sys: its model, a temperature, a power sensor."""
    files = {
        "firmware/devicetree/base/model": MODEL,
        "class/thermal/thermal_zone0/temp": "48312\n",
        "class/hwmon/hwmon2/name": "ina226\n",
        "class/hwmon/hwmon2/power1_input": "3000000\n",
        "devices/platform/soc/soc:firmware/get_throttled": "50000\n",
        "devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def started(folder: Path, root: Path, home: Path, cpu: str = "cortex-a72") -> Board:
    need_sshd()
    made = Board(folder, shell=emulated.session_script(root, sys_tree(folder.parent / f"{folder.name} sys"), home, cpu=cpu))
    made.start()
    return made


@pytest.fixture(scope="session")
def arm(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    home = tmp_path_factory.mktemp("arm home")
    made = started(tmp_path_factory.mktemp("arm") / "arm", root, home)
    made.home = home
    yield made
    made.stop()


@pytest.fixture
def pi(arm: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The board as a device with one thread that predicts as a Raspberry Pi 4."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    client = Client(tmp_path / "user")
    client.configure(client.knows("arm", arm))
    client.trust(arm)
    shipped = Path(__file__).parents[2] / "devices" / "rpi4.toml"
    (tmp_path / "arm.toml").write_text(shipped.read_text().replace("rpi4-", "arm-").replace("threads = 4", "threads = 1"))
    return device(tmp_path / "arm.toml", host="arm")


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ep.export(colour_net(), torch.zeros(1, 3, 8, 8), tmp_path_factory.mktemp("net") / "net.onnx").path


pytestmark = pytest.mark.board


def test_profile(pi: Device, net: Path) -> None:
    found = sitting(net, pi, energy=False, **BRIEF)
    facts = found.measurement.fingerprint
    assert (facts["machine"], facts["cpu"], facts["board"]) == ("aarch64", "0xd08", MODEL)
    assert facts["runtime"].startswith("onnxruntime")
    assert facts["states"][0]["after"]["temperatures_c"] == [48.312]
    assert facts["states"][0]["after"]["throttle_word"] == 0x50000
    assert found.measurement.parity
    assert found.measurement.parity.relative < 1e-5
    assert {o.op for o in found.operations} & {"Conv", "FusedConv"}
    rows = {f.what: f for f in check(pi)}
    assert rows["onnxruntime"].ok
    assert rows["LiteRT"].ok
    assert rows["power"].found == "ina226 hwmon2 (board): supply"


def test_evaluate_agrees_with_the_host(pi: Device, net: Path) -> None:
    x = np.random.default_rng(0).random((8, 3, 8, 8), dtype=np.float32)
    with connect(pi.host) as there, Local() as here:
        (found,), _ = outputs(there, net, {"x": x})
        (expected,), _ = outputs(here, net, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (found.argmax(1) == expected.argmax(1)).all()
    on_board, on_host = ep.evaluate(net, colour_data(), host=pi.host), ep.evaluate(net, colour_data())
    assert (on_board.accuracy, on_board.images) == (on_host.accuracy, on_host.images)


def test_the_closed_loop_meets_a_budget_by_measurements_only(
    pi: Device, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "QUICK", BRIEF)  # emulated milliseconds need no care
    monkeypatch.setattr(pipeline, "FULL", BRIEF)
    with connect(pi.host) as there:
        dense = measure_on(there, net, **BRIEF)
    result = ep.compress(
        colour_net(), torch.zeros(1, 3, 8, 8), budget=ep.Budget(latency_ms=3 * dense.high_ms), device=pi, out=tmp_path / "run"
    )
    (budget,) = result.facts["budgets"]
    assert budget["basis"] == "measured"
    assert budget["met"] == (budget["reached"] <= budget["asked"])
    assert result.facts["rounds"]


def test_a_killed_agent(pi: Device, arm: Board) -> None:
    assert arm.process
    with connect(pi.host) as there:
        assert there.hello()
        for pid in children(arm.process.pid):
            if is_agent(pid):
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(Unreachable, match=r"killed by signal|connection to arm was lost"):
            there.ask("measure", artifact="x.onnx")
    deadline = time.monotonic() + 15
    while children(arm.process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children(arm.process.pid) == []


def test_refused_keys(pi: Device, tmp_path: Path) -> None:
    (tmp_path / "user/.ssh/known_hosts").write_text("")
    with pytest.raises(Unreachable, match=r"host key of arm is unknown: its .* key is SHA256:"):
        connect(pi.host)


def test_a_full_disk_on_the_board(root: Path, pi: Device, tmp_path: Path, net: Path) -> None:
    home = tmp_path / "small"
    home.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(home)], check=False).returncode:
        pytest.skip("only root can mount a small disk")
    small = started(tmp_path / "server", root, home)
    try:
        client = Client(tmp_path / "user")
        client.configure(client.knows("small", small))
        client.trust(small)
        big = tmp_path / "big.onnx"
        big.write_bytes(bytes(400_000))
        with connect("small") as there:
            with pytest.raises(DeviceError, match=r"the disk of small is full: .* bytes are free, 400,000 are needed"):
                there.push(big)
            assert there.hello()
        assert not list(home.rglob("*.part"))
    finally:
        small.stop()
        subprocess.run(["umount", "-l", str(home)], check=True)


def test_a_tflite_artifact_agrees_with_the_host(pi: Device, tflite_artifact: Path) -> None:
    with connect(pi.host) as there:
        assert compared(there, tflite_artifact)[0]
    assert measure(tflite_artifact, pi, **BRIEF).fingerprint["runtime"].startswith("ai-edge-litert")


@pytest.mark.parametrize("cpu", list(emulated.CPUS))
@pytest.mark.parametrize("name", NETWORKS)
def test_reference_networks_execute_as_many_instructions_as_before(root: Path, tmp_path: Path, name: str, cpu: str) -> None:
    """The gate on what is exported: at most one percent more or less than was written down, where the runtime is the same."""
    known = json.loads(RESULTS.read_text())
    if known["runtime"] != emulated.runtime(root):
        pytest.skip(f"counted with {known['runtime']}, the board has {emulated.runtime(root)}: `make bench-instructions` counts anew")
    count = emulated.arm_insns_per_inference(exported(name, tmp_path), root, cpu=cpu)
    assert count == pytest.approx(known["arm_insns_per_inference"][name][cpu], rel=emulated.TOLERANCE)


def test_two_boards_share_a_calibration(pi: Device, arm: Board, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tuple(Probe(kind, 8, 8, 2) for kind in ("conv1x1", "conv3x3", "depthwise", "elementwise", "block"))
    monkeypatch.setattr(calibrate, "probes", lambda quick: plan)
    monkeypatch.setattr(calibrate, "_SCHEDULE", BRIEF)
    home = tmp_path / "second home"
    home.mkdir()
    second = started(tmp_path / "second", root, home)
    try:
        client = Client(tmp_path / "user")
        client.configure(client.knows("arm", arm) + client.knows("second", second))
        client.trust(arm, second)
        made = calibrate.calibrate(replace(pi, host="arm,second"), quick=True, store=tmp_path / "kept.json").profile
    finally:
        second.stop()
    assert made.fit.source == "5 small networks measured on arm at arm and second"
    assert any(home.rglob("*.onnx")) and any(arm.home.rglob("*.onnx"))
    path = replace_profile(pi, made, tmp_path / "out/arm.toml")
    assert device(path).constants.network_us == pytest.approx(made.network_us)


@pytest.mark.parametrize("cpu", list(emulated.CPUS))
def test_instructions_repeat_within_a_percent_and_follow_the_width(root: Path, tmp_path: Path, cpu: str) -> None:
    counts = {}
    for width in (32, 16):
        net = torch.nn.Sequential(torch.nn.Conv2d(3, width, 3), torch.nn.ReLU(), torch.nn.Conv2d(width, width, 3)).eval()
        file = ep.export(net, torch.zeros(1, 3, 32, 32), tmp_path / f"{width}.onnx").path
        counts[width] = [emulated.arm_insns_per_inference(file, root, cpu=cpu) for _ in range(2)]
    for first, second in counts.values():
        assert emulated.within(second, first)
        assert emulated.within(first, second)
    assert not emulated.within(counts[32][0], counts[16][0])
    assert counts[32][0] > 2 * counts[16][0]
