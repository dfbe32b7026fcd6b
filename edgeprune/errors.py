"""Every error a user can meet. The command line turns each family into one paragraph and an exit code.

    EdgepruneError
      UsageError                          2   options that do not fit together
      ModelError                          6   the model cannot be read, traced or slimmed
        TraceError, SlimError
      DataError                           6   the data cannot be read or does not fit the model
      BudgetError                         3   no plan meets the budget; carries the best reachable plan
      GateError                           1   a check ran and did not pass
      DeviceError                         4   unknown device, no connection, failed measurement
        UnknownDevice, Unreachable, SensorError
      ExportError                         5   no artifact, or one that does not compute what the model computes
        UnsupportedOp, ParityError

A message says what happened, the offending value, and what to do. Raise where it is known, catch only in the command line.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeprune.plan import Plan


class EdgepruneError(Exception):
    """The root; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(EdgepruneError):
    """Options that do not fit together."""

    exit_code = 2


class ModelError(EdgepruneError):
    """The model cannot be read, traced or slimmed."""

    exit_code = 6


class TraceError(ModelError):
    """The network could not be run on the example input."""


class SlimError(ModelError):
    """The slim network does not compute what its masked twin computes."""


class DataError(EdgepruneError):
    """The data cannot be read or does not fit the model."""

    exit_code = 6


class BudgetError(EdgepruneError):
    """No plan meets the budget. `plan` is the smallest reachable one, if there is any."""

    exit_code = 3

    def __init__(self, message: str, plan: Plan | None = None) -> None:
        super().__init__(message)
        self.plan = plan


class GateError(EdgepruneError):
    """A check ran and did not pass."""

    exit_code = 1


class DeviceError(EdgepruneError):
    """A device is unknown, cannot be reached, or gave no valid measurement."""

    exit_code = 4


class UnknownDevice(DeviceError):
    """No device card has this name."""


class Unreachable(DeviceError):
    """The board or its runtime did not answer."""


class SensorError(DeviceError):
    """A sensor is missing or gave readings that cannot be used."""


class ExportError(EdgepruneError):
    """The artifact could not be written."""

    exit_code = 5


class UnsupportedOp(ExportError):
    """The target format has no such operation."""


class ParityError(ExportError):
    """The artifact does not compute what the model computes."""


OUT_OF_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "bad allocation", "failed to map segment",
    "can't start new thread", "could not create a primitive", "could not execute a primitive",  # the latter two: oneDNN
)  # fmt: skip


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: Python, torch, the runtimes and the kernel each say so in their own words, often as the cause of an error."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if any(words in str(error).lower() for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
