from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import edgeprune as ep
from edgeprune import pipeline
from edgeprune.device import energy as energies
from edgeprune.device import power
from edgeprune.device.card import device
from edgeprune.device.measure import Schedule
from edgeprune.device.session import sitting
from edgeprune.errors import DeviceError
from tests.colours import colour_net
from tests.device.boards import children, is_agent

BRIEF: Schedule = {"processes": 3, "min_runs": 5, "min_seconds": 0.0, "warmup_runs": 1, "warmup_seconds": 0.0}


def test_everything_of_one_artifact(artifact: Path, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = tmp_path / "sys/class/hwmon/hwmon2"
    chip.mkdir(parents=True)
    (chip / "name").write_text("ina219\n")
    (chip / "power1_input").write_text("3000000\n")
    there = tmp_path / "power.py"
    text = Path(power.__file__).read_text().replace('root: str = "/"', f"root: str = {str(tmp_path)!r}")
    there.write_text(text.replace("max_hz = 10.0", "max_hz = 1000.0"))
    monkeypatch.setattr(energies, "POWER_FILE", there)
    monkeypatch.setattr(energies, "_HZ", 1000.0)  # a busy machine may miss most of the samples
    found = sitting(artifact, device(card, host="local"), trials=2, trial_seconds=0.3, **BRIEF)
    (operation,) = found.operations
    assert (operation.name, operation.op, operation.share) == ("the relu", "Relu", 1.0)
    assert found.measurement.energy
    assert found.measurement.energy.source == "ina219 hwmon2"
    assert found.missing == ()


def test_what_is_missing_is_said(artifact: Path, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "power.py"
    there.write_text(Path(power.__file__).read_text().replace('root: str = "/"', f"root: str = {str(tmp_path)!r}"))
    monkeypatch.setattr(energies, "POWER_FILE", there)
    found = sitting(artifact, device(card, host="local"), **BRIEF)
    assert found.measurement.energy is None
    assert found.missing == ("energy: this machine has no power sensor",)
    with pytest.raises(DeviceError, match="not attached: give --host"):
        sitting(artifact, device(card))


@contextmanager
def meter_on(chip: Path) -> Iterator[None]:
    """A power sensor that shows 2 W, and 3 W more times the share of a CPU that the measuring processes take."""
    over, tick = threading.Event(), os.sysconf("SC_CLK_TCK")
    chip.mkdir(parents=True)
    (chip / "name").write_text("ina226\n")

    def follow() -> None:
        spent: dict[int, tuple[float, float]] = {}
        while not over.is_set():
            share = 0.0
            for pid in filter(is_agent, children(os.getpid())):
                try:
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                now, used = time.monotonic(), (int(fields[11]) + int(fields[12])) / tick
                before, last = spent.get(pid, (now - 1, used))
                share += min(1.0, (used - last) / (now - before))
                spent[pid] = now, used
            (chip / "draft").write_text(f"{int(2e6 + 3e6 * share)}\n")
            (chip / "draft").replace(chip / "power1_input")
            over.wait(0.05)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_compress_meets_an_energy_budget_by_the_sensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is scripted but the sensor, and that follows what the machine does."""
    there, shipped = tmp_path / "power.py", Path(__file__).parents[2] / "devices" / "rpi4.toml"
    text = Path(power.__file__).read_text().replace('root: str = "/"', f"root: str = {str(tmp_path)!r}")
    there.write_text(text.replace("max_hz = 10.0", "max_hz = 50.0"))
    monkeypatch.setattr(energies, "POWER_FILE", there)
    monkeypatch.setattr(energies, "_HZ", 50.0)
    monkeypatch.setattr(energies.energy_on, "__kwdefaults__", (energies.energy_on.__kwdefaults__ or {}) | {"seconds": 1.0})
    monkeypatch.setattr(pipeline, "QUICK", BRIEF)
    monkeypatch.setattr(pipeline, "FULL", BRIEF)
    (tmp_path / "pi.toml").write_text(shipped.read_text().replace("rpi4-", "pi-").replace("threads = 4", "threads = 1"))
    pi, example = device(tmp_path / "pi.toml", host="local"), torch.zeros(1, 3, 64, 64)
    with meter_on(tmp_path / "sys/class/hwmon/hwmon2"):
        found = sitting(ep.export(colour_net(), example, tmp_path / "dense.onnx").path, pi, trials=2, trial_seconds=1.0, **BRIEF)
        assert found.measurement.energy and found.measurement.energy.net_mj > 0
        asked = 0.7 * found.measurement.energy.net_mj
        result = ep.compress(colour_net(), example, budget=ep.Budget(energy_mj=asked), device=pi, out=tmp_path / "run")
    (budget,), rounds = result.facts["budgets"], result.facts["rounds"]
    energy = next(f for f in result.facts["figures"] if f["name"] == "energy")
    assert (budget["basis"], energy["basis"]) == ("measured", "measured")
    assert "ina226 hwmon2" in budget["how"]
    assert budget["met"] == (budget["reached"] <= asked)
    assert any(r["others"][0]["high"] <= asked for r in rounds)
    assert 1 <= len(rounds) <= 5
    assert energy["after"]["value"] < energy["before"]["value"]
