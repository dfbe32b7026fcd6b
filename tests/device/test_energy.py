from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edgeprune.device import energy as energies
from edgeprune.device import power
from edgeprune.device.connection import Local
from edgeprune.device.energy import Energy, energy_on, integrated, throttled
from edgeprune.device.measure import Measurement
from edgeprune.errors import SensorError

SOURCE = {"name": "made up", "scope": "board", "calibration": None}


def windows(actives: int, *, runs: int = 50) -> list[dict[str, int]]:
    """Idle, active, idle, … of ten seconds each."""
    return [{"start_ns": k * 10**10, "end_ns": (k + 1) * 10**10, "runs": runs if k % 2 else 0} for k in range(2 * actives + 1)]


def drawn(actives: list[float], *, idle: float = 2000.0, hz: float = 10.0) -> list[tuple[float, float]]:
    """Power with a step at every window's edge."""
    samples = []
    for k in range(2 * len(actives) + 1):
        mw = actives[k // 2] if k % 2 else idle
        samples += [(k * 1e10 + (n + 0.5) * 1e9 / hz, mw) for n in range(int(10 * hz))]
    return samples


def test_energy_is_power_times_time_per_inference() -> None:
    found = integrated(drawn([5000.0, 6000.0, 5500.0]), windows(3), SOURCE)
    assert found.total_mj == pytest.approx(5500 * 10 / 50, rel=0.01)  # the trapezoid cuts the corners of the steps
    assert (found.total_low_mj, found.total_high_mj) == pytest.approx((1000, 1200), rel=0.01)
    assert found.net_mj == pytest.approx(3500 * 10 / 50, rel=0.02)
    assert found.net_low_mj < found.net_mj < found.net_high_mj
    assert (found.idle_mw, found.active_mw) == pytest.approx((2000, 5500), rel=0.01)
    assert (found.trials, found.samples, found.calibrated_mj) == (3, 100, None)


def test_the_integral_is_the_trapezoid_rule_to_the_edges_of_the_window() -> None:
    at = np.array([0.0, 1e9, 2e9, 3e9])
    ramp = np.array([0.0, 1000.0, 2000.0, 3000.0])
    assert energies._integral_mj(at, ramp, 0.5e9, 2.5e9) == pytest.approx(3000.0)  # mean 1500 mW over 2 s


def test_the_calibrated_figure_is_kept_apart() -> None:
    found = integrated(drawn([5000.0]), windows(1), {**SOURCE, "calibration": (1.1, 500.0)})
    assert found.calibrated_mj == pytest.approx(1.1 * found.total_mj + 500.0 * 10 / 50)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(SensorError, match="made up gave 10 samples in a trial"):
        integrated(drawn([5000.0], hz=1.0), windows(1), SOURCE)


def test_a_throttled_board_is_refused() -> None:
    throttled({"before": {}, "after": {}})
    throttled({"before": {"throttle_word": 0x50000}, "after": {"throttle_word": 0x50000}})
    for before, after in ((0, 0x4), (0, 0x40000), (0x2, 0)):
        with pytest.raises(SensorError, match="throttled"):
            throttled({"before": {"throttle_word": before}, "after": {"throttle_word": after}})


def test_an_external_meter_is_laid_over_the_windows_of_the_agent(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energies, "_LISTEN_SECONDS", 0.5)
    monkeypatch.setattr(power.Meter, "max_hz", 500.0)  # a busy machine may miss most of the readings
    reading, writing = os.pipe()
    over = threading.Event()

    def speak() -> None:
        with os.fdopen(writing, "w", buffering=1) as meter:
            while not over.wait(0.002):
                meter.write("4.0\n")

    speaker = threading.Thread(target=speak)
    speaker.start()
    with os.fdopen(reading) as stream, Local() as here:
        try:
            found, why = energy_on(here, artifact, meter=power.Meter(stream), trials=2, seconds=0.5)
        finally:
            over.set()
            speaker.join()
            time.sleep(0.1)
    assert why == ""
    assert found
    assert (found.active_mw, found.idle_mw) == pytest.approx((4000, 4000))
    assert (found.source, found.trials) == ("meter", 2)
    assert found.net_mj == pytest.approx(0, abs=1e-6)
    assert 0 < found.total_mj < 4000


def test_where_there_is_no_sensor_there_is_no_figure(artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = tmp_path / "power.py"
    bare.write_text(Path(power.__file__).read_text().replace('root: str = "/"', f"root: str = {str(tmp_path)!r}"))
    monkeypatch.setattr(energies, "POWER_FILE", bare)
    with Local() as here:
        assert energy_on(here, artifact) == (None, "this machine has no power sensor")


def test_a_sensor_of_the_board_is_sampled_by_the_agent(artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chip = tmp_path / "sys/class/hwmon/hwmon2"
    chip.mkdir(parents=True)
    (chip / "name").write_text("ina226\n")
    (chip / "power1_input").write_text("3000000\n")
    there = tmp_path / "power.py"
    text = Path(power.__file__).read_text().replace('root: str = "/"', f"root: str = {str(tmp_path)!r}")
    there.write_text(text.replace("max_hz = 10.0", "max_hz = 1000.0"))
    monkeypatch.setattr(energies, "POWER_FILE", there)
    monkeypatch.setattr(energies, "_HZ", 1000.0)  # a busy machine may miss most of the samples
    with Local() as here:
        found, _ = energy_on(here, artifact, trials=2, seconds=0.4)
    assert found
    assert (found.source, found.scope) == ("ina226 hwmon2", "board")
    assert found.active_mw == pytest.approx(3000)
    assert found.samples >= 20


def test_goes_through_json_with_its_measurement() -> None:
    found = integrated(drawn([5000.0]), windows(1), SOURCE)
    figures = dict.fromkeys(("latency_ms", "low_ms", "high_ms", "min_ms", "p90_ms", "p99_ms", "first_ms", "load_ms"), 1.0)
    counts = dict.fromkeys(("peak_memory_bytes", "runs", "outliers", "threads"), 1)
    whole = Measurement(**figures, **counts, process_medians_ms=(1.0,), fingerprint={}, energy=found)  # type: ignore[arg-type]
    back = Measurement.from_json(json.loads(json.dumps(whole.to_json())))
    assert back == whole
    assert (back.energy.trace[0], len(back.energy.trace)) == ((0.05, 2000.0), 300)  # type: ignore[union-attr]
    assert isinstance(back.energy, Energy)
