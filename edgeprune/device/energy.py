"""Energy of one inference from a power sensor, never from anything else: where there is no sensor, there is no figure.

Five trials of at least ten seconds of inference, with ten idle seconds before and after each, integrated by the trapezoid rule over
the monotonic clock; the median of the trials with their range (the manner of MLPerf Tiny). Total is what was drawn, net is what idling
would not have drawn. Few samples make short work look arbitrary, so fewer than 20 in a trial are refused, and so is a throttled board.
Latency is measured in runs of its own: reading a sensor costs CPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.device import power
from edgeprune.device.connection import POWER_FILE, START_SECONDS, Connection
from edgeprune.errors import SensorError

TRIALS = 5
QUICK_TRIALS = 3  # for the compress loop
SECONDS = 10.0
LEAST_SAMPLES = 20
_HZ = 10.0
_LISTEN_SECONDS = 3.0  # to learn how often a meter speaks


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy of one inference in mJ: median over trials with the smallest and largest, total and net of idling.

    `scope` says what the sensor covers (board, module or rail). `calibrated_mj`: the total after a published fit of the sensor's sum
    to the board's supply, where there is one. `samples`: in the trial that had the fewest. `trace`: every sample as (seconds since the
    first idle window began, mW).
    """

    total_mj: float
    total_low_mj: float
    total_high_mj: float
    net_mj: float
    net_low_mj: float
    net_high_mj: float
    calibrated_mj: float | None
    active_mw: float
    idle_mw: float
    source: str
    scope: str
    trials: int
    samples: int
    trace: tuple[tuple[float, float], ...] = ()

    @staticmethod
    def from_json(text: Mapping[str, Any]) -> Energy:
        """The inverse of dataclasses.asdict, through JSON; files of before the trace was kept have none."""
        return Energy(**{**text, "trace": tuple((s, mw) for s, mw in text.get("trace", ()))})


def energy_on(
    board: Connection,
    artifact: Path,
    *,
    threads: int = 1,
    cpus: Sequence[int] | None = None,
    meter: power.Meter | None = None,
    trials: int = TRIALS,
    seconds: float = SECONDS,
) -> tuple[Energy | None, str]:
    """(energy per inference, why there is none); `meter`: an external one at this machine. Takes trials * 2 * seconds and more.

    Raises SensorError when the sensor gave too few samples or the board was throttled.
    """
    source: Mapping[str, Any]
    if meter:
        source, hz, recorder = meter.facts(), _speed(meter), power.Recorder(meter, meter.max_hz)
        request: dict[str, Any] = {}
    else:
        pushed = board.push(POWER_FILE)
        if reason := no_sensor(board):
            return None, reason
        source, recorder = _usable(board.ask("sensors", power=pushed))[0], None
        hz = min(_HZ, source["max_hz"])
        request = {"power": pushed, "source": source["name"], "hz": hz}
    active = max(seconds, 1.25 * LEAST_SAMPLES / hz)
    limit = START_SECONDS + (trials + 1) * seconds + trials * (active + START_SECONDS)
    request |= {"artifact": board.push(artifact), "threads": threads, "cpus": list(cpus) if cpus else None}
    request |= {"trials": trials, "idle_seconds": seconds, "active_seconds": active}
    try:
        reply = board.ask("energy", fresh=True, limit_seconds=limit, **request)
    finally:
        arrived_ns = time.monotonic_ns()
        taken = recorder.stop() if recorder else []
    shift_ns = reply["clock_ns"] - arrived_ns  # the board's clock beside ours, to the time a reply takes
    samples = [(at + shift_ns, mw) for at, mw in taken] if recorder else reply["samples"]
    throttled(reply)
    return integrated(samples, reply["windows"], source), ""


def no_sensor(board: Connection) -> str:
    """Why no energy can be measured there; empty where it can."""
    found = board.ask("sensors", power=board.push(POWER_FILE))
    if _usable(found):
        return ""
    reasons = [*found["obstacles"], *(f"no total is known for the rails {', '.join(s['rails'])}" for s in found["sources"])]
    return "; ".join(reasons) or f"{board.where} has no power sensor"


def _usable(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [source for source in found["sources"] if source["total_rails"]]


def throttled(reply: Mapping[str, Any]) -> None:
    """Raise SensorError where the board held back during the trials."""
    word, old = reply["after"].get("throttle_word", 0), reply["before"].get("throttle_word", 0)
    if (word | old) & 0xF or word & ~old & 0xF0000:
        raise SensorError(
            f"the board was throttled while its energy was measured (throttle word {word:#x}): cool it, or use a better supply."
        )


def integrated(samples: Sequence[Sequence[float]], windows: Sequence[Mapping[str, Any]], source: Mapping[str, Any]) -> Energy:
    """Energy per inference from (ns, mW) samples and the windows idle, active, idle, …, idle. Raises SensorError for too few samples."""
    at_ns = np.array([s[0] for s in samples], dtype=np.float64)
    mw = np.array([s[1] for s in samples], dtype=np.float64)
    counts = [int(np.sum((at_ns >= w["start_ns"]) & (at_ns <= w["end_ns"]))) for w in windows]
    if min(counts[1::2]) < LEAST_SAMPLES or min(counts[::2]) < 2:
        raise SensorError(
            f"the power source {source['name']} gave {min(counts[1::2])} samples in a trial and {min(counts[::2])} while idle; at least "
            f"{LEAST_SAMPLES} and 2 are needed: measure for longer, or with a faster sensor."
        )
    joules = [_integral_mj(at_ns, mw, w["start_ns"], w["end_ns"]) for w in windows]
    spans = [(w["end_ns"] - w["start_ns"]) / 1e9 for w in windows]
    watts = [mj / s for mj, s in zip(joules, spans, strict=True)]
    idle = [(watts[k - 1] + watts[k + 1]) / 2 for k in range(1, len(windows), 2)]
    runs = [w["runs"] for w in windows[1::2]]
    total = np.array(joules[1::2]) / runs
    net = (np.array(joules[1::2]) - np.array(idle) * np.array(spans[1::2])) / runs
    seconds = float(np.median(np.array(spans[1::2]) / runs))
    calibration = source["calibration"]
    return Energy(
        total_mj=float(np.median(total)),
        total_low_mj=float(total.min()),
        total_high_mj=float(total.max()),
        net_mj=float(np.median(net)),
        net_low_mj=float(net.min()),
        net_high_mj=float(net.max()),
        calibrated_mj=calibration[0] * float(np.median(total)) + calibration[1] * seconds if calibration else None,
        active_mw=float(np.median(watts[1::2])),
        idle_mw=float(np.median(idle)),
        source=source["name"],
        scope=source["scope"],
        trials=len(runs),
        samples=min(counts[1::2]),
        trace=tuple(
            (round(s, 3), round(p, 1)) for s, p in zip(((at_ns - windows[0]["start_ns"]) / 1e9).tolist(), mw.tolist(), strict=True)
        ),
    )


def _integral_mj(at_ns: NDArray[np.float64], mw: NDArray[np.float64], start_ns: float, end_ns: float) -> float:
    """Trapezoid rule over the samples inside the window, with the power at its ends interpolated."""
    inside = (at_ns > start_ns) & (at_ns < end_ns)
    times = np.concatenate(([start_ns], at_ns[inside], [end_ns]))
    return float(np.trapezoid(np.interp(times, at_ns, mw), (times - start_ns) / 1e9))


def _speed(meter: power.Meter) -> float:
    """Readings of a meter per second. Raises SensorError for one that is silent."""
    end, count = time.monotonic() + _LISTEN_SECONDS, 0
    while time.monotonic() < end:
        if meter.fresh():
            meter.sample()
            count += 1
        time.sleep(0.005)
    if not count:
        raise SensorError(
            f"the meter sent no reading within {_LISTEN_SECONDS:.0f} s: lines of CSV with a column power_w or power_mw are needed."
        )
    return count / _LISTEN_SECONDS
