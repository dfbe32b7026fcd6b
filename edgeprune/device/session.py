"""One sitting at a board: latency first, then the operations one by one, then energy, over one connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

from edgeprune.device.card import Device
from edgeprune.device.connection import START_SECONDS, Connection, Local, connect
from edgeprune.device.energy import SECONDS, TRIALS, Energy, energy_on, no_sensor
from edgeprune.device.measure import Measurement, Schedule, artifact, measure_on, pin, take_turn
from edgeprune.device.power import Meter
from edgeprune.errors import DeviceError, SensorError

_OPERATIONS_SECONDS = 300.0


@dataclass(frozen=True)
class Operation:
    """One operation of the artifact as the runtime ran it: median time in ms, with the profiler's own cost in it, and its share (0..1)."""

    name: str
    op: str
    latency_ms: float
    share: float


@dataclass(frozen=True)
class Sitting:
    """What was found; `missing` says why something was not (no sensor, no profiler)."""

    measurement: Measurement
    operations: tuple[Operation, ...]
    missing: tuple[str, ...]


def sitting(
    artifact_path: str | Path,
    device: Device,
    *,
    governor: str | None = None,
    energy: bool = True,
    meter: Meter | None = None,
    trials: int = TRIALS,
    trial_seconds: float = SECONDS,
    **schedule: Unpack[Schedule],
) -> Sitting:
    """Everything that can be measured of an artifact on an attached device; energy takes about 2 * trials * trial_seconds.

    Raises DeviceError for a device that is not attached, and the errors of `measure_on` and `energy_on`.
    """
    if not device.attached:
        raise DeviceError(f"{device.profile} is not attached: give --host user@board to measure there.")
    file = artifact(artifact_path)
    with connect(device.host) as board:
        found = measure_on(board, file, threads=device.threads, governor=governor, **schedule)
        cpus = found.fingerprint["cpus"]
        operations, why_not = operations_on(board, file, threads=device.threads, cpus=cpus)
        missing = [why_not] if why_not else []
        if energy:
            spent, reason = energy_on(board, file, threads=device.threads, cpus=cpus, meter=meter, trials=trials, seconds=trial_seconds)
            found = replace(found, energy=spent)
            missing += [f"energy: {reason}"] if reason else []
    return Sitting(found, operations, tuple(missing))


def energy_of(artifact_path: str | Path, device: Device, *, trials: int = TRIALS) -> Energy:
    """Energy of one inference on an attached device, by its own sensor; see `energy_on`. Raises SensorError where it has none."""
    with connect(device.host) as board:
        take_turn(board)
        cpus = pin(board, board.hello(), device.threads)
        found, reason = energy_on(board, artifact(artifact_path), threads=device.threads, cpus=cpus, trials=trials)
    if found is None:
        raise SensorError(_no_sensor(device, reason))
    return found


def need_sensor(device: Device) -> None:
    """Raise SensorError where an attached device cannot measure energy, before hours are spent on a budget of it."""
    with connect(device.host) as board:
        if reason := no_sensor(board):
            raise SensorError(_no_sensor(device, reason))


def _no_sensor(device: Device, reason: str) -> str:
    return (
        f"energy cannot be measured on {device.host or 'this machine'}, and a budget is not met by a prediction where a board is attached: "
        f"{reason}. Give another budget, or leave the board away to plan by prediction."
    )


def operations_on(board: Connection, file: Path, *, threads: int, cpus: list[int]) -> tuple[tuple[Operation, ...], str]:
    """(the artifact's operations in the order they ran, why there are none)."""
    pushed = board.push(file)
    scratch = None if isinstance(board, Local) else str(PurePosixPath(pushed).parent)  # on a board nothing is written elsewhere
    request: Mapping[str, Any] = {"artifact": pushed, "threads": threads, "cpus": cpus, "scratch": scratch}
    reply = board.ask("operations", fresh=True, limit_seconds=START_SECONDS + _OPERATIONS_SECONDS, **request)
    if reply["operations"] is None:
        return (), f"per operation: {reply['reason']}"
    total_us = sum(row["time_us"] for row in reply["operations"]) or 1
    return tuple(Operation(r["name"], r["op"], r["time_us"] / 1e3, r["time_us"] / total_us) for r in reply["operations"]), ""
