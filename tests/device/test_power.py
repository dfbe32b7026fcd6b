from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeprune.device import power

Files = dict[str, str]
OLD = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/"
NEW = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/"
RAPL = "sys/class/powercap/"


def tree(root: Path, files: Files) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return str(root)


def io_error(path: Path) -> None:
    """A file that opens and answers every read with EIO, as a disabled channel does: the process's memory at address 0."""
    path.unlink(missing_ok=True)
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        path.read_text()


def nano(**changes: str) -> Files:
    rails = {"POM_5V_IN": "2400", "POM_5V_GPU": "300", "POM_5V_CPU": "900"} | changes
    return {OLD + f"rail_name_{n}": rail for n, rail in enumerate(rails)} | {
        OLD + f"in_power{n}_input": mw for n, mw in enumerate(rails.values())
    }


def orin() -> Files:
    rails = {1: ("VDD_IN", "5000", "1100"), 2: ("VDD_CPU_GPU_CV", "5000", "300"), 3: ("VDD_SOC", "4960", "250")}
    files = {NEW + "in7_label": "sum of shunt voltages", NEW + "in7_input": "9", NEW + "curr4_input": "77"}
    for n, (label, mv, ma) in rails.items():
        files |= {NEW + f"in{n}_label": label, NEW + f"in{n}_input": mv, NEW + f"curr{n}_input": ma}
    return files


def test_nothing_there_is_no_source(tmp_path: Path) -> None:
    assert power.survey(str(tmp_path)) == ([], [])


@pytest.mark.parametrize("folder", ["iio:device0", "iio_device"])
def test_jetson_with_jetpack_4(tmp_path: Path, folder: str) -> None:
    root = tree(tmp_path, {name.replace("iio:device0", folder): text for name, text in nano().items()})
    (source,) = power.probe(root)
    assert source.sample()[1] == {"POM_5V_IN": 2400, "POM_5V_GPU": 300, "POM_5V_CPU": 900}
    assert (source.total_rails, source.scope) == (("POM_5V_IN",), "board")


def test_jetson_with_jetpack_5_and_6(tmp_path: Path) -> None:
    (source,) = power.probe(tree(tmp_path, orin()))
    assert source.sample()[1] == {"VDD_IN": 5500, "VDD_CPU_GPU_CV": 1500, "VDD_SOC": 1240}
    assert (source.total_rails, source.scope, source.name) == (("VDD_IN",), "module", "ina3221")


def test_channels_that_are_not_connected_disabled_or_broken_are_left_out(tmp_path: Path) -> None:
    second = NEW.replace("0040", "0041").replace("hwmon1", "hwmon2")
    files = orin() | {second + "in1_label": "NC", second + "in1_input": "0", second + "curr1_input": "0"}
    files |= {second + "in2_label": "OFF", second + "in2_input": "0", second + "curr2_input": "0", second + "in2_enable": "0"}
    files |= {second + "in3_label": "BROKEN", second + "curr3_input": "3"}
    root = tree(tmp_path, files)
    io_error(tmp_path / second / "in3_input")
    (source,) = power.probe(root)
    assert source.rails() == ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")


def test_several_rails_make_the_total_where_no_input_is_measured(tmp_path: Path) -> None:
    names = {"VDD_IN": "VDD_GPU_SOC", "VDD_CPU_GPU_CV": "VDD_CPU_CV", "VDD_SOC": "VIN_SYS_5V0"}
    (source,) = power.probe(tree(tmp_path / "agx", {k: names.get(v, v) for k, v in orin().items()}))
    assert set(source.total_rails) == set(names.values())
    (strange,) = power.probe(tree(tmp_path / "strange", {k: v.replace("VDD_", "ODD_") for k, v in orin().items()}))
    assert strange.total_rails == ()


def test_ina238(tmp_path: Path) -> None:
    (source,) = power.probe(tree(tmp_path, {"sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon0/power1_input": "31500000"}))
    assert (source.sample()[1], source.scope) == ({"VIN": 31500}, "module")


def test_ina2xx_on_the_supply_and_no_other_hwmon(tmp_path: Path) -> None:
    files = {"sys/class/hwmon/hwmon0/name": "cpu_thermal", "sys/class/hwmon/hwmon0/power1_input": "1"}
    files |= {"sys/class/hwmon/hwmon2/name": "ina226", "sys/class/hwmon/hwmon2/power1_input": "3250000"}
    files |= {"sys/class/hwmon/hwmon3/name": "ina219"}
    root = tree(tmp_path, files)
    (tmp_path / "sys/class/hwmon/hwmon3/power1_input").symlink_to("/proc/self/mem")
    (source,) = power.probe(root)
    assert (source.name, source.sample()[1], source.total_rails) == ("ina226 hwmon2", {"supply": 3250}, ("supply",))


PMIC = """
   3V3_SYS_A current(1)=0.10000000A
  VDD_CORE_A current(7)=2.00000000A
   3V3_SYS_V volt(9)=3.30000000V
  VDD_CORE_V volt(15)=0.90000000V
     EXT5V_V volt(24)=5.10000000V
"""


def vcgencmd(root: Path, script: str) -> str:
    tree(root, {"usr/bin/vcgencmd": "#!/bin/sh\n" + script})
    (root / "usr/bin/vcgencmd").chmod(0o755)
    return str(root)


def test_raspberry_pi_5(tmp_path: Path) -> None:
    (source,) = power.probe(vcgencmd(tmp_path, f'[ "$1" = pmic_read_adc ] && cat <<END\n{PMIC}END'))
    assert source.sample()[1] == pytest.approx({"3V3_SYS": 330, "VDD_CORE": 1800})
    assert set(source.total_rails) == {"3V3_SYS", "VDD_CORE"}
    assert source.calibration
    assert source.max_hz <= 10


def test_other_raspberry_pis_have_no_pmic_and_groups_matter(tmp_path: Path) -> None:
    assert power.survey(vcgencmd(tmp_path / "pi4", "echo 'error=1 error_msg=\"Command not registered\"'")) == ([], [])
    sources, (obstacle,) = power.survey(vcgencmd(tmp_path / "pi5", 'echo "Can\'t open device file: /dev/vcio" >&2; exit 255'))
    assert sources == []
    assert "usermod -aG video" in obstacle


def rapl(energies: Files) -> Files:
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "psys"}
    files = {RAPL + f"{folder}/name": name for folder, name in names.items()}
    files |= {RAPL + f"{folder}/max_energy_range_uj": "1000000" for folder in names}
    return files | {RAPL + f"{folder}/energy_uj": energies.get(folder, "0") for folder in names}


def test_rapl_counts_from_sample_to_sample_and_wraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    (source,) = power.probe(tree(tmp_path, rapl({"intel-rapl:0": "990000", "intel-rapl:0:1": "5000"})))
    assert source.rails() == source.total_rails == ("package-0", "dram")
    tree(tmp_path, {RAPL + "intel-rapl:0/energy_uj": "40000", RAPL + "intel-rapl:0:1/energy_uj": "6000"})
    now[0] = 10_000_000
    assert source.sample()[1] == pytest.approx({"package-0": 5000, "dram": 100})  # 50,000 uJ over the wrap, 1,000 uJ, in 10 ms
    now[0] += 100
    assert source.sample()[1]["dram"] == pytest.approx(100)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others may look into; pytest's own are closed to them, again at the start of every other run of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_what_may_not_be_read_is_an_obstacle_with_its_remedy(open_folder: Path) -> None:
    root = tree(open_folder, rapl({}) | {"sys/class/hwmon/hwmon2/name": "ina226", "sys/class/hwmon/hwmon2/power1_input": "1"})
    for path in ("sys/class/hwmon/hwmon2/power1_input", RAPL + "intel-rapl:0/energy_uj"):
        (open_folder / path).chmod(0)
    # Root may read everything, so root's process becomes nobody's, once it has loaded what nobody may not: modules and codecs.
    drop = "; os.setgroups([]); os.setgid(65534); os.setuid(65534)" if os.getuid() == 0 else ""
    look = f"power.survey({root!r})"
    code = f"import os, sys; sys.path.insert(0, {os.path.dirname(power.__file__)!r}); import power; {look}{drop}; print({look})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout.startswith("([], ["), done.stderr
    assert done.stdout.count("sudo chmod o+r") == 2, done.stdout


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_meter_that_writes_lines_to_a_pipe() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as stream, os.fdopen(writing, "w", buffering=1) as meter:
        source = power.Meter(stream)
        with pytest.raises(OSError, match="no reading"):
            source.sample()
        meter.write("time_s, Power_W, volts\n1.0, 2.5, 5.1\n")
        wait_for(source.fresh)
        assert source.sample()[1] == {"supply": 2500}
        assert not source.fresh()
        meter.write("rubbish\n1.1, 3.5")
        meter.write(", 5.1\n")
        wait_for(source.fresh)
        assert (source.sample()[1], source.bad_lines) == ({"supply": 3500}, 1)


def test_a_meter_that_appends_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("power_mw,t\n100,0\n200,1\n")
    with open(tmp_path / "log.csv") as stream, open(tmp_path / "log.csv", "a", buffering=1) as log:
        source = power.Meter(stream)
        with pytest.raises(OSError, match="no reading"):
            source.sample()  # what was there before does not count
        log.write("300,2\n")
        wait_for(source.fresh)
        assert source.sample()[1] == {"supply": 300}


def test_bare_numbers_are_watts() -> None:
    source = power.Meter(io.StringIO(""))
    source._take(["1.25"])
    assert source.sample()[1] == {"supply": 1250}


def test_the_recorder_leaves_gaps_where_the_sensor_fails() -> None:
    class Moody(power.PowerSource):
        total_rails = ("a", "b")
        max_hz = 1000.0
        count = 0

        def sample(self) -> tuple[int, dict[str, float]]:
            self.count += 1
            if self.count % 2:
                raise OSError("not now")
            return self.count, {"a": 1.0, "b": 2.0, "inside b": 0.5}

    source = Moody()
    recorder = power.Recorder(source, 1000)
    wait_for(lambda: source.count > 6)
    samples = recorder.stop()
    assert samples[:3] == [(2, 3.0), (4, 3.0), (6, 3.0)]


def test_needs_only_the_standard_library() -> None:
    code = f"import runpy, sys; runpy.run_path({power.__file__!r}); sys.exit(any(n in sys.modules for n in ('numpy', 'edgeprune')))"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False, timeout=60).returncode == 0
