"""A conversation with the measuring agent, wherever it runs: ask it, push it files, and leave no process behind.

The agent is a child process here (`Local`) or runs over SSH on a board (ssh.py); everything above this file is the same for both.
"""

from __future__ import annotations

import contextlib
import getpass
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgeprune.device import agent
from edgeprune.errors import DeviceError, Unreachable

START_SECONDS = 60.0  # for a process to import and load, on a loaded machine or a slow board
POWER_FILE = Path(agent.__file__).with_name("power.py")


class Connection(ABC):
    """An agent that answers. `where` names the machine in messages."""

    where: str

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._alive = True

    def ask(self, do: str, *, limit_seconds: float | None = None, fresh: bool = False, **arguments: Any) -> Mapping[str, Any]:
        """The agent's reply to one request; `fresh`: from a new process of the agent, which is stopped after limit_seconds.

        Raises Unreachable when the agent dies, is late or cannot be understood (the connection is closed then) or lacks its runtime,
        DeviceError when it refuses.
        """
        if not self._alive:
            raise Unreachable(f"the connection to {self.where} is closed: connect again.")
        limit = START_SECONDS if limit_seconds is None else limit_seconds
        request = {"do": do, "id": next(self._ids), **arguments} | ({"fresh": True, "limit_seconds": limit} if fresh else {})
        try:
            self._send(json.dumps(request) + "\n")
            line = self._receive(limit + (START_SECONDS / 4 if fresh else 0.0))
            reply = self._understood(line, request["id"])
        except TimeoutError as error:
            self.close()
            raise Unreachable(
                f"the measuring process on {self.where} gave no result within {limit:.0f} s and was stopped: is the machine overloaded?"
            ) from error
        except BaseException:
            self.close()
            raise
        if not reply["ok"]:
            raise _refusal(self.where, reply["error"]["kind"], reply["error"]["message"])
        return reply

    def hello(self) -> Mapping[str, Any]:
        """What the machine is; raises Unreachable for a 32-bit one, for which there are no runtimes."""
        found = self.ask("hello")
        if found["pointer_bits"] == 32:
            raise Unreachable(
                f"{self.where} runs a 32-bit system ({found['machine']}), for which no onnxruntime, LiteRT or NumPy is published: "
                "install the board's 64-bit operating system."
            )
        return {key: value for key, value in found.items() if key not in ("ok", "id", "protocol")}

    @abstractmethod
    def push(self, file: Path) -> str:
        """The path under which the machine has this file."""

    def close(self) -> None:
        """End the agent and whatever it started; any number of times."""
        if self._alive:
            self._alive = False
            self._end()

    @abstractmethod
    def _end(self) -> None: ...

    @abstractmethod
    def _send(self, line: str) -> None: ...

    @abstractmethod
    def _receive(self, limit_seconds: float) -> str:
        """The next line; raises TimeoutError, and Unreachable when there will be none."""

    def _understood(self, line: str, identity: int) -> Mapping[str, Any]:
        try:
            reply: dict[str, Any] = json.loads(line)
            protocol, answered = reply["protocol"], reply["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise Unreachable(f"the measuring process on {self.where} ended without a result: it said {line[:80]!r}.") from error
        if protocol != agent.PROTOCOL or answered != identity:
            raise Unreachable(
                f"the agent on {self.where} speaks protocol {protocol} (answer {answered}), this is protocol {agent.PROTOCOL} (question "
                f"{identity}): use the agent of this version of edgeprune."
            )
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Local(Connection):
    """The agent as a child process in its own process group, under this Python."""

    where = "this machine"

    def __init__(self) -> None:
        super().__init__()
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, agent.__file__, "--grace", "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        self._rest = b""

    def push(self, file: Path) -> str:
        """The file's own path."""
        return str(file.resolve())

    def _end(self) -> None:
        """Kill the process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin and self._process.stdout
        self._process.stdout.close()
        self._errors.close()
        with contextlib.suppress(BrokenPipeError):  # closing flushes what nobody reads any more
            self._process.stdin.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # why it died is told by what comes back
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

    def _receive(self, limit_seconds: float) -> str:
        assert self._process.stdout
        end = time.monotonic() + limit_seconds
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(self._process.stdout.fileno(), 1 << 20)
            if not chunk:
                raise dead(self.where, self._process.wait(timeout=max(left, 1.0)), self._last_error())
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else ""


def connect(host: str = "") -> Connection:
    """The agent on `host` ([user@]name[:port] or a name of ~/.ssh/config); "" and "local": on this machine.

    Raises Unreachable when there is no way there, DeviceError where asyncssh is not installed.
    """
    if "," in host:
        raise DeviceError(f"--host {host} names several boards: they can share a calibration, everything else is measured on one.")
    if host in ("", "local"):
        return Local()
    try:
        from edgeprune.device.ssh import Ssh
    except ImportError as error:
        raise DeviceError(f"connecting to {host} needs asyncssh ({error}): pip install 'edgeprune[ssh]'.") from error
    return Ssh(host)


def owner() -> str:
    """Who is measuring, for others who want the same board."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no such user id
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def dead(where: str, status: int | None, last_error: str) -> Unreachable:
    """The error for an agent that ended by itself."""
    if status == 127:
        return Unreachable(f"there is no python3 on {where} ({last_error}): install it there (Debian: sudo apt install python3).")
    how = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
    return Unreachable(
        f"the measuring process on {where} {how} without a result ({last_error or 'nothing on stderr'}): out of memory, or a broken "
        "runtime?"
    )


def _refusal(where: str, kind: str, message: str) -> DeviceError:
    if kind == "missing_runtime":
        return Unreachable(
            f"the runtime to measure with is missing on {where}: {message}. Install it into that Python, or see `edgeprune device check`."
        )
    if kind in ("crashed", "late"):
        return Unreachable(f"the measuring process on {where} {message}: out of memory, overloaded, or a broken runtime?")
    if kind == "busy":
        return DeviceError(f"{where} is {message}: try again later.")
    if kind == "not_permitted":
        return DeviceError(f"not permitted on {where}: {message}.")
    return DeviceError(f"the artifact could not be measured on {where} ({kind}): {message}.")
