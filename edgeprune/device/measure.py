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

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from edgeprune.device import agent
from edgeprune.errors import DeviceError, Unreachable

_BLOCKS = 16  # of consecutive runs per process
_RESAMPLES = 2000
_LEAST_CPU_SHARE = 0.9
_START_SECONDS = 60.0  # for a process to import and load, on a loaded machine


class Schedule(TypedDict, total=False):
    """How much is measured: fresh processes, and runs and seconds in each (both are reached), warm-up apart."""

    processes: int
    min_runs: int
    min_seconds: float
    warmup_runs: int
    warmup_seconds: float


FULL: Schedule = {"processes": 3, "min_runs": 50, "min_seconds": 5.0, "warmup_runs": 10, "warmup_seconds": 1.0}
"""For figures that are reported (about 20 s)."""

QUICK: Schedule = {"processes": 5, "min_runs": 20, "min_seconds": 0.15, "warmup_runs": 3, "warmup_seconds": 0.05}
"""For the compress loop (2 to 3 s for a small network): `measure(artifact, device, **QUICK)`."""


class MeasuredDevice(Protocol):
    """What measuring needs to know of a device card."""

    @property
    def attached(self) -> bool:
        """Whether this machine is the device."""

    @property
    def threads(self) -> int:
        """Threads the runtime uses."""

    @property
    def profile(self) -> str:
        """The profile's name, rpi4-ort."""


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

    def to_json(self) -> dict[str, Any]:
        """Plain values, for measurements.json."""
        return asdict(self) | {"process_medians_ms": list(self.process_medians_ms), "problems": list(self.problems)}

    @staticmethod
    def from_json(text: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_json`."""
        lists = {"process_medians_ms": tuple(text["process_medians_ms"]), "problems": tuple(text["problems"])}
        return Measurement(**{**text, **lists})


def measure(artifact_path: str | Path, device: MeasuredDevice, **schedule: Unpack[Schedule]) -> Measurement:
    """Latency of an artifact on `device`, which must be attached; see `measure_host` for the rest.

    Raises DeviceError for a device that is not attached: its figures are predicted.
    """
    if not device.attached:
        raise DeviceError(
            f"{device.profile} is not attached, so nothing can be measured on it: its figures are predicted unless a board is connected. "
            "Use --device host to measure on this machine."
        )
    return measure_host(artifact_path, threads=device.threads, **schedule)


def measure_host(
    artifact_path: str | Path, *, threads: int = 1, cpus: Sequence[int] | None = None, **schedule: Unpack[Schedule]
) -> Measurement:
    """Latency of an artifact on this machine, by the agent in fresh processes; the schedule is FULL where nothing else is said.

    `cpus`: where the processes are pinned; default: the last `threads` ones this process may use (the first serves interrupts).
    Takes processes * (warm-up + runs + about 0.3 s). Raises DeviceError for an artifact that does not run or impossible
    threads or CPUs, Unreachable when an agent crashes, hangs or lacks its runtime. No process outlives the call.
    """
    plan: Schedule = {**FULL, **schedule}
    allowed = sorted(os.sched_getaffinity(0))
    pinned = list(cpus) if cpus is not None else allowed[-threads:]
    if not 1 <= threads <= len(allowed) or not set(pinned) <= set(allowed) or not pinned:
        raise DeviceError(f"cannot run {threads} thread(s) on the CPUs {pinned}: this process may use {allowed}.")
    if plan["processes"] < 3:
        raise DeviceError(f"{plan['processes']} processes give no interval: use at least 3.")
    file = Path(artifact_path)
    if not file.is_file():
        raise DeviceError(f"there is no artifact {file} to measure: give the path of an exported file.")
    request = {"do": "measure", "artifact": str(file.resolve()), "threads": threads, "cpus": pinned}
    request |= {key: value for key, value in plan.items() if key != "processes"}
    load_before = os.getloadavg()[0]
    replies = [_ask(request, plan) for _ in range(plan["processes"])]
    return _summarized(replies, load_before=load_before)


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


def _summarized(replies: Sequence[Mapping[str, Any]], *, load_before: float) -> Measurement:
    processes_ms = [np.array(reply["times_ns"], dtype=np.float64) / 1e6 for reply in replies]
    runs_ms = np.concatenate(processes_ms)
    lower, upper = np.percentile(runs_ms, (25, 75))
    latency_ms, low_ms, high_ms = median_interval_ms(processes_ms)
    last = replies[-1]
    states = [{key: reply[key] for key in ("before", "after", "cpu_share")} for reply in replies]
    if min(reply["cpu_share"] for reply in replies) < _LEAST_CPU_SHARE:
        low_ms = float(runs_ms.min())
    facts = ("artifact_sha256", "runtime", "cpus", "inputs", "warmup_runs")
    fingerprint = agent.hello() | {key: last[key] for key in facts}
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
        fingerprint=fingerprint | {"states": states, "load_average_before": load_before},
        problems=_problems(states),
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


def _ask(request: Mapping[str, Any], plan: Schedule) -> Mapping[str, Any]:
    """The reply of a fresh agent to one request; its process group is gone when this returns or raises."""
    limit_seconds = _START_SECONDS + 10 * (plan["warmup_seconds"] + plan["min_seconds"])
    environment = os.environ | {"OMP_NUM_THREADS": str(request["threads"]), "PYTHONHASHSEED": "0"}
    with subprocess.Popen(
        [sys.executable, agent.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(json.dumps(request) + "\n", timeout=limit_seconds)
        except subprocess.TimeoutExpired as error:
            raise Unreachable(
                f"the measuring process gave no result within {limit_seconds:.0f} s and was stopped: is the machine overloaded?"
            ) from error
        finally:  # also on KeyboardInterrupt
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return _checked(output, errors, process.returncode)


def _checked(output: str, errors: str, returncode: int) -> Mapping[str, Any]:
    try:
        reply = json.loads(output)
    except json.JSONDecodeError as error:
        last = errors.strip().splitlines()[-1] if errors.strip() else "nothing on stderr"
        how = f"was killed by signal {-returncode}" if returncode < 0 else f"ended with status {returncode}"
        raise Unreachable(f"the measuring process {how} without a result ({last}): out of memory, or a broken onnxruntime?") from error
    if not reply["ok"]:
        kind, message = reply["error"]["kind"], reply["error"]["message"]
        if kind == "missing_runtime":
            raise Unreachable(f"the runtime to measure with is missing: {message}. Install onnxruntime into this Python.")
        raise DeviceError(f"the artifact could not be measured ({kind}): {message}.")
    measured: Mapping[str, Any] = reply
    return measured
