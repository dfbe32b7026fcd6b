"""Power sensors of boards, read from sysfs and vcgencmd: standard library only, because the agent loads this file on the board.

A source is one class: `probe(root)` finds its instances below a root (tests give it synthetic trees), `sample` returns (monotonic
time in ns, {rail: mW}). Rails nest and overlap, so the total is never the sum of everything: `total_rails` names what adds up to the
whole, and is empty where that is not known. Channels that are not connected or answer with an error are left out; what exists and may
not be read is an obstacle with its remedy. Paths and units are the kernel's and the vendors' as read in public sources; none of this
has met real hardware yet. Python 3.9 and later.
"""

from __future__ import annotations

import glob
import os
import re
import subprocess
import threading
import time
from typing import Any, TextIO

# Rails that add up to the whole board or module, first match wins; from NVIDIA's rail tables for the developer kits.
_JETSON_TOTALS = (
    ("VDD_IN",),
    ("POM_5V_IN",),
    ("VIN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)
_INA2XX = {"ina219", "ina220", "ina226", "ina230", "ina231", "ina234", "ina260"}
_PMIC_LINE = re.compile(r"^\s*(\w+)_([AV])\s+\w+\(\d+\)=([0-9.]+)[AV]\s*$")
# A published fit of the PMIC's sum to a meter in the USB supply, W = 1.1451 W + 0.5879 W; another one has 1.1327 and 0.6444.
PMIC_CALIBRATION = (1.1451, 587.9)


class Refused(Exception):
    """A sensor that is there but may not be read; the message says what to do."""


class PowerSource:
    """One sensor. `scope`: what the total covers (board, module or rail); `calibration`: (factor, offset in mW) to the board's supply."""

    name = ""
    scope = "board"
    max_hz = 10.0
    calibration: tuple[float, float] | None = None
    total_rails: tuple[str, ...] = ()

    def rails(self) -> tuple[str, ...]:
        """The names of what is measured."""
        return tuple(self.sample()[1])

    def sample(self) -> tuple[int, dict[str, float]]:
        """(monotonic ns, mW of every rail). Raises OSError when the sensor does not answer."""
        raise OSError("no sensor")

    def fresh(self) -> bool:
        """Whether there is something new to sample."""
        return True

    def facts(self) -> dict[str, Any]:
        """What is to be known about the source, as plain values."""
        names = ("name", "scope", "max_hz", "calibration", "total_rails")
        return {**{key: getattr(self, key) for key in names}, "rails": self.rails()}


class Jetson(PowerSource):
    """INA3221 of a Jetson in both layouts: JetPack 4 gives mW (iio), 5 and 6 give mV and mA (hwmon); channels of all chips together."""

    name = "ina3221"
    scope = "module"
    max_hz = 10.0

    def __init__(self, channels: dict[str, tuple[str, ...]]) -> None:
        self._channels = channels
        self.total_rails = next((total for total in _JETSON_TOTALS if set(total) <= channels.keys()), ())
        self.scope = "board" if self.total_rails == ("POM_5V_IN",) else "module"

    @classmethod
    def probe(cls, root: str = "/") -> list[PowerSource]:
        """One source with every connected channel, or none."""
        found: dict[str, tuple[str, ...]] = {}
        chips = os.path.join(root, "sys/bus/i2c/drivers")
        for label in sorted(glob.glob(f"{chips}/ina3221x/*/iio[:_]device*/rail_name_*")):
            number = label.rpartition("_")[2]
            _add(found, label, (os.path.join(os.path.dirname(label), f"in_power{number}_input"),))
        for label in sorted(glob.glob(f"{chips}/ina3221/*/hwmon/hwmon*/in[1-3]_label")):  # 7 is "sum of shunt voltages"
            folder, number = os.path.dirname(label), os.path.basename(label)[2]
            if _text(f"{folder}/in{number}_enable") != "0":
                _add(found, label, (f"{folder}/in{number}_input", f"{folder}/curr{number}_input"))
        return [cls(found)] if found else []

    def sample(self) -> tuple[int, dict[str, float]]:
        """(monotonic ns, mW of every rail)."""
        milliwatts = {}
        for rail, paths in self._channels.items():
            values = [_number(path) for path in paths]
            milliwatts[rail] = values[0] if len(values) == 1 else values[0] * values[1] / 1000
        return time.monotonic_ns(), milliwatts


class Ina238(PowerSource):
    """INA238 at a module's input (Jetson AGX Thor), power1_input in microwatts."""

    name = "ina238"
    scope = "module"
    total_rails = ("VIN",)

    def __init__(self, path: str) -> None:
        self._path = path

    @classmethod
    def probe(cls, root: str = "/") -> list[PowerSource]:
        """The chips whose power can be read."""
        paths = sorted(glob.glob(os.path.join(root, "sys/bus/i2c/drivers/ina238/*/hwmon/hwmon*/power1_input")))
        return [cls(path) for path in paths if _readable(path)]

    def sample(self) -> tuple[int, dict[str, float]]:
        """(monotonic ns, mW at the input)."""
        return time.monotonic_ns(), {"VIN": _number(self._path) / 1000}


class Ina2xx(PowerSource):
    """An INA2xx on the board's supply, bound to the kernel's driver: power1_input in microwatts.

    An INA234 that is bound as INA226 reads 22 % low: compare in1_input with the supply's voltage once.
    """

    total_rails = ("supply",)

    def __init__(self, path: str, chip: str) -> None:
        self._path = path
        self.name = f"{chip} {os.path.basename(os.path.dirname(path))}"

    @classmethod
    def probe(cls, root: str = "/") -> list[PowerSource]:
        """Every such chip."""
        chips = {path: _text(path) for path in sorted(glob.glob(os.path.join(root, "sys/class/hwmon/hwmon*/name")))}
        paths = {os.path.join(os.path.dirname(path), "power1_input"): chip for path, chip in chips.items() if chip in _INA2XX}
        return [cls(path, chip) for path, chip in paths.items() if _readable(path)]

    def sample(self) -> tuple[int, dict[str, float]]:
        """(monotonic ns, mW of the supply)."""
        return time.monotonic_ns(), {"supply": _number(self._path) / 1000}


class RaspberryPmic(PowerSource):
    """The Raspberry Pi 5's power chip by `vcgencmd pmic_read_adc`: rails with a current and a voltage; the sum misses conversion losses."""

    name = "rpi5-pmic"
    max_hz = 5.0  # every sample starts a process
    calibration = PMIC_CALIBRATION

    def __init__(self, command: str) -> None:
        self._command = command
        self.total_rails = self.rails()

    @classmethod
    def probe(cls, root: str = "/") -> list[PowerSource]:
        """One, where the command knows the PMIC."""
        command = os.path.join(root, "usr/bin/vcgencmd")
        if not os.access(command, os.X_OK):
            return []
        try:
            return [cls(command)]
        except OSError as error:
            if "/dev/vcio" in str(error) or "permission" in str(error).lower():
                raise Refused(f"{command} may not read the PMIC: sudo usermod -aG video $USER, and log in again") from error
            return []

    def sample(self) -> tuple[int, dict[str, float]]:
        """(monotonic ns, mW of every rail that has a current and a voltage)."""
        try:
            done = subprocess.run([self._command, "pmic_read_adc"], capture_output=True, text=True, timeout=2, check=False)
        except subprocess.TimeoutExpired as error:
            raise OSError("vcgencmd did not answer within 2 s") from error
        found: dict[str, dict[str, float]] = {"A": {}, "V": {}}
        for line in done.stdout.splitlines():
            if matched := _PMIC_LINE.match(line):
                found[matched[2]][matched[1]] = float(matched[3])
        if not found["A"]:
            raise OSError((done.stderr + done.stdout).strip() or "vcgencmd said nothing")
        return time.monotonic_ns(), {rail: 1000 * amperes * found["V"][rail] for rail, amperes in found["A"].items() if rail in found["V"]}


class Rapl(PowerSource):
    """Energy counters of x86 packages (powercap); a sample is the mean power since the one before. Counters wrap."""

    name = "rapl"
    scope = "rail"
    max_hz = 20.0

    def __init__(self, domains: dict[str, str]) -> None:
        self._domains = domains
        self.total_rails = tuple(domains)
        self._range_uj = {rail: _number(f"{folder}/max_energy_range_uj") for rail, folder in domains.items()}
        self._last = self._read()
        self._last_mw = dict.fromkeys(domains, 0.0)

    @classmethod
    def probe(cls, root: str = "/") -> list[PowerSource]:
        """One source with every package and its memory; cores and uncore lie inside the package and psys around it."""
        domains = {}
        for path in sorted(glob.glob(os.path.join(root, "sys/class/powercap/intel-rapl:*/name"))):
            folder, rail = os.path.dirname(path), _text(path)
            if rail.startswith("package") or rail == "dram":
                domains[rail if rail not in domains else f"{rail} {os.path.basename(folder)}"] = folder
        try:
            return [cls(domains)] if domains else []
        except PermissionError as error:
            raise Refused(f"{error.filename} is root's to read: sudo chmod o+r {error.filename} until the next start") from error

    def _read(self) -> tuple[int, dict[str, float]]:
        return time.monotonic_ns(), {rail: _number(f"{folder}/energy_uj") for rail, folder in self._domains.items()}

    def sample(self) -> tuple[int, dict[str, float]]:
        """(monotonic ns, mean mW of every domain since the last sample)."""
        (before_ns, before), (now_ns, now) = self._last, self._read()
        if now_ns - before_ns >= 1_000_000:  # below a millisecond the counters have not moved
            spent = {rail: now[rail] - before[rail] + (self._range_uj[rail] if now[rail] < before[rail] else 0) for rail in now}
            self._last, self._last_mw = (now_ns, now), {rail: uj * 1e6 / (now_ns - before_ns) for rail, uj in spent.items()}
        return now_ns, dict(self._last_mw)

    def rails(self) -> tuple[str, ...]:
        """The domains."""
        return tuple(self._domains)


class Meter(PowerSource):
    """An external meter that writes CSV lines to a stream or a growing file: a column power_mw or power_w, or watts in the last one.

    A reading counts from the moment it arrives, so the meter's own clock does not matter; lines from before are passed over.
    """

    name = "meter"
    total_rails = ("supply",)
    max_hz = 50.0

    def __init__(self, stream: TextIO) -> None:
        self._column, self._factor = -1, 1000.0
        self._news = threading.Event()
        self._latest: tuple[int, float] | None = None
        self.bad_lines = 0
        if stream.seekable():  # a file: only its column names count of what it holds already
            self._take(_cells(stream.readline()))
            self._latest = None
            self._news.clear()
            stream.seek(0, os.SEEK_END)
        self._follower = threading.Thread(target=self._follow, args=(stream,), daemon=True)
        self._follower.start()

    def sample(self) -> tuple[int, dict[str, float]]:
        """(monotonic ns of the latest reading's arrival, mW). Raises OSError before the first."""
        self._news.clear()
        if self._latest is None:
            raise OSError("the meter has sent no reading yet")
        return self._latest[0], {"supply": self._latest[1]}

    def fresh(self) -> bool:
        """Whether a reading came since the last sample."""
        return self._news.is_set()

    def rails(self) -> tuple[str, ...]:
        """The one there is."""
        return self.total_rails

    def _follow(self, stream: TextIO) -> None:
        rest = ""
        while not stream.closed:
            try:
                text = stream.readline()
            except ValueError:  # closed meanwhile
                return
            rest += text
            if rest.endswith("\n"):
                self._take(_cells(rest))
                rest = ""
            elif not text:
                time.sleep(0.02)  # the end of a file that may still grow

    def _take(self, cells: list[str]) -> None:
        for name, factor in (("power_mw", 1.0), ("power_w", 1000.0)):
            if name in cells:
                self._column, self._factor = cells.index(name), factor
                return
        try:
            self._latest = time.monotonic_ns(), self._factor * float(cells[self._column])
            self._news.set()
        except (ValueError, IndexError):
            self.bad_lines += 1


KINDS = (Jetson, Ina238, RaspberryPmic, Ina2xx, Rapl)


def survey(root: str = "/") -> tuple[list[PowerSource], list[str]]:
    """(the sources below `root` that can be read, those of the whole board first; why others cannot)."""
    found: list[PowerSource] = []
    obstacles: list[str] = []
    for kind in KINDS:
        try:
            found += kind.probe(root)
        except Refused as error:
            obstacles.append(str(error))
    return sorted(found, key=lambda source: ("board", "module", "rail").index(source.scope)), obstacles


def probe(root: str = "/") -> list[PowerSource]:
    """The power sources below `root` that can be read."""
    return survey(root)[0]


class Recorder:
    """Samples a source in the background, `hz` times a second, until `stop`, which returns [monotonic ns, total mW] of every sample."""

    def __init__(self, source: PowerSource, hz: float) -> None:
        self._source, self._period = source, 1 / min(hz, source.max_hz)
        self._samples: list[tuple[int, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def stop(self) -> list[tuple[int, float]]:
        """The samples. A reading that failed left a gap."""
        self._over.set()
        self._thread.join()
        return self._samples

    def _record(self) -> None:
        while not self._over.wait(self._period):
            if not self._source.fresh():
                continue
            try:
                at_ns, rails = self._source.sample()
            except OSError:
                continue
            self._samples.append((at_ns, sum(rails[name] for name in self._source.total_rails)))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.lower().split(",")]


def _add(found: dict[str, tuple[str, ...]], label: str, paths: tuple[str, ...]) -> None:
    """Take a channel up unless it is not connected (label NC) or does not answer."""
    rail = _text(label)
    if rail and rail.upper() != "NC" and all(map(_readable, paths)):
        found[rail] = paths


def _readable(path: str) -> bool:
    """Whether a number comes from there; a disabled channel answers EIO. Raises Refused where permission is missing."""
    try:
        _number(path)
    except PermissionError as error:
        raise Refused(f"{path} may not be read: sudo chmod o+r {path} until the next start") from error
    except (OSError, ValueError):
        return False
    return True


def _number(path: str) -> float:
    with open(path, encoding="ascii") as file:
        return float(file.read())


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
