from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.device.card import device
from edgeprune.device.check import _machine, _quiet, _runtimes, check
from edgeprune.errors import DeviceError

FACTS = {"cores": 4, "cpus": [0, 1, 2, 3], "cpu": "0xd08", "os": "Debian", "machine": "aarch64", "board": "", "free_disk_bytes": 1 << 33}
FACTS |= {"python": "3.11", "executable": "/usr/bin/python3", "runtimes": {"numpy": "2.4", "onnxruntime": "1.31"}}


def test_this_machine_can_measure() -> None:
    found = {f.what: f for f in check(device("host"))}
    assert found["numpy"].ok
    assert found["onnxruntime"].ok
    assert found["CPUs"].ok
    assert not [f for f in found.values() if f.needed and not f.ok]
    assert "power" in found


def test_a_card_alone_cannot_be_checked() -> None:
    with pytest.raises(DeviceError, match="rpi4 is not attached: give --host"):
        check(device("rpi4"))


def test_what_is_missing_comes_with_the_command_that_installs_it(card: Path) -> None:
    pi = device(card, host="pi@board")
    rows = {f.what: f for f in _runtimes(pi, {**FACTS, "runtimes": {}})}
    assert all(f.needed and not f.ok for f in rows.values())
    assert rows["onnxruntime"].remedy.startswith("ssh pi@board 'python3 -m venv ~/.cache/edgeprune/venv && ")
    assert rows["onnxruntime"].remedy.endswith("pip install numpy onnxruntime'")
    one = {f.what: (f.ok, f.needed) for f in _runtimes(pi, FACTS)}
    assert one == {"numpy": (True, True), "onnxruntime": (True, False), "LiteRT": (False, False)}


def test_another_board_than_the_card_s_is_noticed() -> None:
    for model, expected in (("Raspberry Pi 4 Model B Rev 1.5", True), ("Raspberry Pi 5 Model B Rev 1.0", False), ("", True)):
        rows = {f.what: f for f in _machine(device("rpi4", host="pi"), {**FACTS, "board": model})}
        assert rows["board"].ok is expected
    two = {f.what: f for f in _machine(device("rpi4", host="pi"), {**FACTS, "cpus": [0, 1], "free_disk_bytes": 0})}
    assert (two["CPUs"].ok, two["free disk"].ok) == (False, False)


def test_what_spoils_measurements_is_named() -> None:
    state = {"governors": ["ondemand"], "temperatures_c": [41.0, 82.5], "throttle_word": 0x50000, "load_average": 1.5}
    rows = {f.what: f for f in _quiet(state)}
    assert set(rows) == {"governor", "temperature", "throttled", "load"}
    assert not any(f.ok for f in rows.values())
    calm = {"governors": ["performance"], "temperatures_c": [41.0], "throttle_word": 0, "load_average": 0.1}
    assert all(f.ok for f in _quiet(calm))
