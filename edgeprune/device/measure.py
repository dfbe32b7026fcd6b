"""Real latency of an artifact on this machine: fresh processes, pinned threads, warm-up, and an interval one can rely on.

A process has its own luck (memory layout, page placement, neighbours on the machine), so the unit that is repeated is the
process, not the run: the interval comes from a bootstrap over processes, and inside each over blocks of consecutive runs
(neighbouring runs are alike). Three to five processes are few, which makes a plain bootstrap too narrow; its deviations are
widened by the t quantile and sqrt(n / (n - 1)) (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section
4.4.2, there applied to the percentile's level, which cannot help with three values). The interval speaks of the minutes in
which it was measured. No statistics repair a machine that was shared: when other programs took the CPU (on 2 cores with 7
runnable processes a 2.3 ms network was measured at 6.6 ms), that is a problem on record, and the interval reaches down to the
fastest run, because the idle machine's latency lies somewhere in between.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from edgeprune.device.connection import START_SECONDS, Connection, Local, connect, owner
from edgeprune.device.energy import Energy
from edgeprune.device.parity import Parity, compared
from edgeprune.errors import DeviceError

TURN_SECONDS = 900.0  # how long a board that somebody else is using is waited for
_BLOCKS = 16  # of consecutive runs per process
_RESAMPLES = 2000
_LEAST_CPU_SHARE = 0.9
_SETTLE_SECONDS = 60.0  # for temperatures to stand still before a full measurement
_SLOWEST_SECONDS = 5.0  # one inference of the slowest network that is waited for


class Schedule(TypedDict, total=False):
    """How much is measured: fresh processes, and runs and seconds in each (both are reached), warm-up apart."""

    processes: int
    min_runs: int
    min_seconds: float
    warmup_runs: int
    warmup_seconds: float


FULL: Schedule = {"processes": 3, "min_runs": 50, "min_seconds": 5.0, "warmup_runs": 10, "warmup_seconds": 1.0}
"""For figures that are reported (about 20 s)."""

LONG: Schedule = {**FULL, "processes": 9}
"""For a limit that FULL does not show to hold (about a minute): three processes widen the interval 2.7 times, nine 1.2 times."""

QUICK: Schedule = {"processes": 5, "min_runs": 20, "min_seconds": 0.15, "warmup_runs": 3, "warmup_seconds": 0.05}
"""For the compress loop (2 to 3 s for a small network): `measure(artifact, device, **QUICK)`."""


MEASURED = ("latency_ms", "energy_mj", "peak_memory_bytes")
"""The figures of a budget that a board can say something about, by the budget's names."""


class MeasuredDevice(Protocol):
    """What measuring needs to know of a device card."""

    @property
    def attached(self) -> bool:
        """Whether this machine is the device, or a connection leads there."""

    @property
    def host(self) -> str:
        """Where the board is, for `connect`; empty for this machine."""

    @property
    def threads(self) -> int:
        """Threads the runtime uses."""

    @property
    def profile(self) -> str:
        """The profile's name, rpi4-ort."""


@dataclass(frozen=True)
class Figure:
    """A measured figure; a budget is held to `high`. `how`: what the value and its ends are, in words."""

    value: float
    low: float
    high: float
    how: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Latency of one inference, batch 1, as measured: the median with its 95 % interval [low_ms, high_ms].

    outliers: runs beyond the upper quartile by more than 3 interquartile ranges; they count in every figure. first_ms, load_ms:
    medians over processes. peak_memory_bytes: the largest process, Python and runtime included. problems: why the figures
    must not be used to calibrate (throttling, a falling frequency, other programs on the CPU); empty when they are valid.
    """

    latency_ms: float
    low_ms: float
    high_ms: float
    min_ms: float
    p90_ms: float
    p99_ms: float
    first_ms: float
    load_ms: float
    peak_memory_bytes: int
    runs: int
    outliers: int
    process_medians_ms: tuple[float, ...]
    threads: int
    fingerprint: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    parity: Parity | None = None
    energy: Energy | None = None
    network_memory_bytes: int = 0

    def figure(self, name: str) -> Figure | None:
        """The figure that a budget calls by this name (see MEASURED); None where it was not measured."""
        if name == "latency_ms":
            return Figure(self.latency_ms, self.low_ms, self.high_ms, "upper end of the 95% interval of the median")
        if name == "energy_mj" and (e := self.energy):
            how = f"net of idling, the highest of {e.trials} trials ({e.source}, {e.scope})"
            return Figure(e.net_mj, e.net_low_mj, e.net_high_mj, how)
        if name == "peak_memory_bytes" and (grown := self.network_memory_bytes):
            return Figure(grown, grown, grown, "what the largest process had beyond the imported runtime")
        return None

    @property
    def temperatures_c(self) -> tuple[float, ...]:
        """The hottest sensor before and after each process, in the order of the processes; empty where there is no sensor."""
        states = (state[when].get("temperatures_c") for state in self.fingerprint.get("states", ()) for when in ("before", "after"))
        return tuple(max(read) for read in states if read)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for measurements.json."""
        return asdict(self) | {"process_medians_ms": list(self.process_medians_ms), "problems": list(self.problems)}

    @staticmethod
    def from_json(text: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_json`."""
        made: dict[str, Any] = {name: tuple(text[name]) for name in ("process_medians_ms", "problems")}
        if text.get("parity"):
            made["parity"] = Parity(**text["parity"])
        if text.get("energy"):
            made["energy"] = Energy.from_json(text["energy"])
        return Measurement(**{**text, **made})


def measure(artifact_path: str | Path, device: MeasuredDevice, *, governor: str | None = None, **schedule: Unpack[Schedule]) -> Measurement:
    """Latency of an artifact (.onnx, .tflite) on `device`, which must be attached; see `measure_on` for the rest.

    Raises DeviceError for a device that is not attached: its figures are predicted.
    """
    if not device.attached:
        raise DeviceError(
            f"{device.profile} is not attached, so nothing can be measured on it: its figures are predicted unless a board is connected. "
            "Give --host user@board, or use --device host to measure on this machine."
        )
    with connect(device.host) as board:
        return measure_on(board, artifact_path, threads=device.threads, governor=governor, **schedule)


def measure_host(
    artifact_path: str | Path, *, threads: int = 1, cpus: Sequence[int] | None = None, **schedule: Unpack[Schedule]
) -> Measurement:
    """Latency of an artifact on this machine; see `measure_on`."""
    with Local() as here:
        return measure_on(here, artifact_path, threads=threads, cpus=cpus, **schedule)


def measure_on(
    board: Connection,
    artifact_path: str | Path,
    *,
    threads: int = 1,
    cpus: Sequence[int] | None = None,
    governor: str | None = None,
    **schedule: Unpack[Schedule],
) -> Measurement:
    """Latency of an artifact by the agent behind `board`, in fresh processes; the schedule is FULL where nothing else is said.

    `cpus`: where the processes are pinned; default: the last `threads` ones (the first serves interrupts). `governor` is set for the
    time of the connection where the account may do so. A board that somebody else measures on is waited for. Away from this machine the
    artifact's outputs are compared with this machine's first: figures of a network that computes something else are not reported.
    Takes processes * (warm-up + runs + about 0.3 s). Raises DeviceError for an artifact that does not run or impossible threads or
    CPUs, Unreachable when an agent crashes, hangs or lacks its runtime, ParityError. No process outlives the connection.
    """
    plan: Schedule = {**FULL, **schedule}
    if plan["processes"] < 3:
        raise DeviceError(f"{plan['processes']} processes give no interval: use at least 3.")
    file = artifact(artifact_path)
    take_turn(board)
    facts = board.hello()
    pinned = pin(board, facts, threads, cpus)
    if governor:
        board.ask("governor", name=governor)
    pushed = board.push(file)
    parity, reason = (None, "") if isinstance(board, Local) else compared(board, file)
    settled: Mapping[str, Any] = {}
    if plan["min_seconds"] >= 1:
        settled = board.ask("settle", limit_seconds=START_SECONDS + _SETTLE_SECONDS, wait_seconds=_SETTLE_SECONDS)
    request = {"artifact": pushed, "threads": threads, "cpus": pinned} | {k: v for k, v in plan.items() if k != "processes"}
    runs = 1 + plan["warmup_runs"] + plan["min_runs"]
    limit = START_SECONDS + 10 * (plan["warmup_seconds"] + plan["min_seconds"]) + _SLOWEST_SECONDS * runs
    replies = [board.ask("measure", fresh=True, limit_seconds=limit, **request) for _ in range(plan["processes"])]
    fingerprint = {**facts, "where": board.where, "settled": dict(settled), "not_compared": reason}
    return _summarized(replies, fingerprint, parity)


def artifact(path: str | Path) -> Path:
    """The artifact at that path. Raises DeviceError where there is none."""
    file = Path(path)
    if not file.is_file():
        raise DeviceError(f"there is no artifact {file} to measure: give the path of an exported file.")
    return file


def take_turn(board: Connection) -> None:
    """Have the board to oneself as long as the connection lasts. Raises DeviceError when somebody else keeps it for too long."""
    if isinstance(board, Local):
        return
    try:
        board.ask("lock", owner=owner())
    except DeviceError as busy:
        logging.getLogger(__name__).warning("waiting for up to %.0f s: %s", TURN_SECONDS, busy)
        board.ask("lock", owner=owner(), wait_seconds=TURN_SECONDS, limit_seconds=TURN_SECONDS + 10)


def pin(board: Connection, facts: Mapping[str, Any], threads: int, cpus: Sequence[int] | None = None) -> list[int]:
    """The CPUs to run on. Raises DeviceError where the machine has not got them."""
    allowed = facts["cpus"]
    pinned = list(cpus) if cpus is not None else allowed[-threads:]
    if not 1 <= threads <= len(allowed) or not set(pinned) <= set(allowed) or not pinned:
        raise DeviceError(f"cannot run {threads} thread(s) on the CPUs {pinned}: a process on {board.where} may use {allowed}.")
    return pinned


def median_interval_ms(processes_ms: Sequence[NDArray[np.float64]]) -> tuple[float, float, float]:
    """(median, low, high) of run times grouped by process: the median of all runs with its 95 % interval (see the top)."""
    from scipy.special import stdtrit

    count = len(processes_ms)
    per_process = max(1, min(_BLOCKS, min(len(runs) for runs in processes_ms) // 3))
    blocks = np.array([[np.median(block) for block in np.array_split(runs, per_process)] for runs in processes_ms])
    random = np.random.default_rng(0)
    chosen = random.integers(count, size=(_RESAMPLES, count))
    columns = random.integers(per_process, size=(_RESAMPLES, count, per_process))
    medians = np.median(blocks[chosen[:, :, None], columns].reshape(_RESAMPLES, -1), axis=1)
    low, high = (float(q - np.median(blocks)) for q in np.percentile(medians, (2.5, 97.5)))
    widen = float(stdtrit(count - 1, 0.975)) / 1.959964 * math.sqrt(count / (count - 1))
    median = float(np.median(np.concatenate(processes_ms)))
    fastest = min(float(runs.min()) for runs in processes_ms)  # no median lies below the fastest run
    return median, max(fastest, median + widen * min(0.0, low)), median + widen * max(0.0, high)


def _summarized(replies: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], parity: Parity | None) -> Measurement:
    processes_ms = [np.array(reply["times_ns"], dtype=np.float64) / 1e6 for reply in replies]
    runs_ms = np.concatenate(processes_ms)
    lower, upper = np.percentile(runs_ms, (25, 75))
    latency_ms, low_ms, high_ms = median_interval_ms(processes_ms)
    last = replies[-1]
    states = [{key: reply[key] for key in ("before", "after", "cpu_share")} for reply in replies]
    if min(reply["cpu_share"] for reply in replies) < _LEAST_CPU_SHARE:
        low_ms = float(runs_ms.min())
    facts = ("artifact_sha256", "runtime", "cpus", "inputs", "warmup_runs", "quantized")
    fingerprint = {**machine, **{key: last[key] for key in facts}}
    return Measurement(
        latency_ms=latency_ms,
        low_ms=low_ms,
        high_ms=high_ms,
        min_ms=float(runs_ms.min()),
        p90_ms=float(np.percentile(runs_ms, 90)),
        p99_ms=float(np.percentile(runs_ms, 99)),
        first_ms=float(np.median([reply["first_ms"] for reply in replies])),
        load_ms=float(np.median([reply["load_ms"] for reply in replies])),
        peak_memory_bytes=max(reply["peak_memory_bytes"] for reply in replies),
        runs=len(runs_ms),
        outliers=int(np.sum(runs_ms > upper + 3 * (upper - lower))),
        process_medians_ms=tuple(float(np.median(runs)) for runs in processes_ms),
        threads=last["threads"],
        fingerprint=fingerprint | {"states": states},
        problems=_problems(states),
        parity=parity,
        network_memory_bytes=max(reply["network_memory_bytes"] for reply in replies),
    )


def _problems(states: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Why the figures are invalid: throttled now or since the start, a frequency that fell by more than 5 %, a CPU that was shared."""
    found = []
    for state in states:
        before, after = state["before"], state["after"]
        word, old = after.get("throttle_word", 0), before.get("throttle_word", 0)
        if (word | old) & 0xF or word & ~old & 0xF0000:
            found.append(f"the board was throttled (throttle word {word:#x})")
        pairs = zip(before.get("frequencies_khz", ()), after.get("frequencies_khz", ()), strict=False)
        if any(late < 0.95 * early for early, late in pairs):
            found.append("a CPU's frequency fell during the runs")
    share = min(state["cpu_share"] for state in states)
    if share < _LEAST_CPU_SHARE:
        found.append(f"other programs used the CPU: the network had it for {share:.0%} of the time")
    return tuple(dict.fromkeys(found))
