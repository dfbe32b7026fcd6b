from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.device import energy as energies
from edgeprune.device import power
from edgeprune.device.card import device
from edgeprune.device.measure import Schedule
from edgeprune.device.session import sitting
from edgeprune.errors import DeviceError

BRIEF: Schedule = {"processes": 3, "min_runs": 5, "min_seconds": 0.0, "warmup_runs": 1, "warmup_seconds": 0.0}


def test_everything_of_one_artifact(artifact: Path, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = tmp_path / "sys/class/hwmon/hwmon2"
    chip.mkdir(parents=True)
    (chip / "name").write_text("ina219\n")
    (chip / "power1_input").write_text("3000000\n")
    there = tmp_path / "power.py"
    text = Path(power.__file__).read_text().replace('root: str = "/"', f"root: str = {str(tmp_path)!r}")
    there.write_text(text.replace("max_hz = 10.0", "max_hz = 100.0"))
    monkeypatch.setattr(energies, "POWER_FILE", there)
    monkeypatch.setattr(energies, "_HZ", 100.0)
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
