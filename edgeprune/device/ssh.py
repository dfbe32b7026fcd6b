"""The agent on a board over SSH: keys are checked, files travel by hash, and nothing runs there once the connection is closed.

asyncssh reads ~/.ssh/config (ProxyJump too) and the key agent. A host key that is unknown or has changed is refused with its
fingerprint and the command that would trust it; nothing turns that check off. No name, path or option of the user's ever becomes part
of a command line: the one command that is run is fixed, files go over SFTP under names made of their hash, and requests are JSON on
stdin. On the board only ~/.cache/edgeprune/<sha256>/ is written, up to CACHE_BYTES in all; the oldest files make room.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import stat
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import asyncssh

from edgeprune.device import agent
from edgeprune.device.connection import Connection, dead
from edgeprune.errors import DeviceError, Unreachable

CACHE = ".cache/edgeprune"  # below the account's home, where an SSH session begins
CACHE_BYTES = 2 << 30
CONNECT_SECONDS = 20.0
_IN_USE = 4  # of the files brought last, none makes room for others
HEARTBEAT_SECONDS = 5.0  # the agent ends after six of them in silence
Value = TypeVar("Value")


class Ssh(Connection):
    """The agent on `host`: [user@]name[:port], or a name of ~/.ssh/config."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self.where = host
        self._hops: list[asyncssh.SSHClientConnection] = []
        self._process: asyncssh.SSHClientProcess[str] | None = None
        self._last_error = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._entering, self._ended = threading.Lock(), False
        self._pushed: list[str] = []  # hashes, the latest last
        # A loop of its own, in a thread of its own: callers may have one running (notebooks), and Ctrl-C reaches the main thread.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._run(self._open(host))
            if self.hello().get("agent_sha256") != hashlib.sha256(Path(agent.__file__).read_bytes()).hexdigest():
                raise Unreachable(f"the agent on {host} is not the one that was sent: remove ~/{CACHE} there, and see who writes to it.")
        except BaseException:
            self.close()
            raise

    def push(self, file: Path) -> str:
        """Where the board has the file: uploaded unless it is there already, under its hash, complete or not at all."""
        try:
            return self._run(self._push(file))
        except (OSError, asyncssh.Error) as error:
            raise DeviceError(f"{file} could not be copied to {self.where}: {_reason(error)}. Is the board's disk full?") from error

    def _end(self) -> None:
        """End the agent, which ends what it started, and hang up."""
        with self._entering:
            self._ended = True
        with contextlib.suppress(TimeoutError, asyncssh.Error, OSError):
            asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result(timeout=10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10.0)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Value]) -> Value:
        with self._entering:  # what comes in after the end would wait for ever
            if self._ended:
                work.close()
                raise Unreachable(f"the connection to {self.where} was closed.")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result()

    def _send(self, line: str) -> None:
        self._run(self._write(line))

    def _receive(self, limit_seconds: float) -> str:
        return self._run(self._read(limit_seconds))

    async def _write(self, line: str) -> None:
        assert self._process
        with contextlib.suppress(BrokenPipeError, ConnectionError, asyncssh.Error):  # why it died is told by what comes back
            self._process.stdin.write(line)

    async def _read(self, limit_seconds: float) -> str:
        assert self._process
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), limit_seconds)
        except (asyncssh.Error, ConnectionError) as error:
            raise Unreachable(f"the connection to {self.where} was lost ({_reason(error)}): check the network and the board.") from error
        if line.endswith("\n"):
            return line
        with contextlib.suppress(TimeoutError, asyncssh.Error):
            await asyncio.wait_for(self._process.wait_closed(), 5.0)
        status, killed = self._process.exit_status, self._process.exit_signal
        if status is None and killed is None:
            raise Unreachable(f"the connection to {self.where} was lost: check the network and the board's power.")
        if killed:
            raise Unreachable(f"the agent on {self.where} was killed by signal {killed[0]}: out of memory?")
        raise dead(self.where, -9 if status == 137 else status, self._last_error)

    async def _open(self, host: str) -> None:
        board = await self._connected(host, None)
        try:
            self._sftp = await board.start_sftp_client()
            script = await self._push(Path(agent.__file__))
        except (OSError, asyncssh.Error) as error:
            raise Unreachable(
                f"the agent cannot be copied to ~/{CACHE} on {host} over SFTP: {_reason(error)}. Is the folder writable, is the disk full, "
                "is there an SFTP server (Debian: openssh-sftp-server)?"
            ) from error
        silence = 6 * HEARTBEAT_SECONDS
        command = (
            f"p={CACHE}/venv/bin/python3; test -x $p || p=python3; export PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1; "
            f"exec $p {script} --grace 0 --silence {silence:.0f}"
        )
        self._process = await board.create_process(f"/bin/sh -c '{command}'", errors="replace")
        self._tasks = [asyncio.ensure_future(self._listen()), asyncio.ensure_future(self._beat())]

    async def _listen(self) -> None:
        assert self._process
        with contextlib.suppress(asyncssh.Error):
            async for line in self._process.stderr:
                self._last_error = line.strip() or self._last_error

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            await self._write("\n")

    async def _hang_up(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._process:
            with contextlib.suppress(OSError, asyncssh.Error):
                self._process.stdin.write_eof()
                self._process.close()
        for connection in reversed(self._hops):
            connection.close()
            with contextlib.suppress(TimeoutError, asyncssh.Error, OSError):
                await asyncio.wait_for(connection.wait_closed(), 3.0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # another thread may be waiting for an answer that will not come
        await asyncio.sleep(0)

    async def _connected(self, host: str, through: asyncssh.SSHClientConnection | None) -> asyncssh.SSHClientConnection:
        """A connection to `host`, over the jump hosts of its configuration, whose keys are checked as its own is."""
        user, name, port = _parsed(host)
        seen: list[asyncssh.SSHKey] = []

        class Client(asyncssh.SSHClient):
            def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
                seen.append(key)  # asked only about keys that known_hosts does not vouch for
                return False

        given: dict[str, Any] = {"config": (), "host": name, "username": user, "port": port}
        try:
            options = await asyncssh.SSHClientConnectionOptions.construct(**given)
            if through is None and isinstance(options.tunnel, str):
                for jump in options.tunnel.split(","):
                    through = await self._connected(jump, through)
            settings: dict[str, Any] = {
                "username": user,
                "tunnel": through,
                "client_factory": Client,
                # asyncssh reads `UserKnownHostsFile none` as "trust anything"; here it means that nothing is known
                "known_hosts": b"" if options.known_hosts is None else (),
                "preferred_auth": ("publickey",),
                "connect_timeout": CONNECT_SECONDS,
                "login_timeout": CONNECT_SECONDS,
                "keepalive_interval": HEARTBEAT_SECONDS,
                "keepalive_count_max": 3,
            }
            try:
                connection = await asyncssh.connect(name, port, **settings)
            except (asyncssh.KeyExchangeFailed, asyncssh.ConnectionLost, ConnectionResetError):
                # A host whose key is now of another kind than the known one; asked for any kind, it shows the one to refuse.
                connection = await asyncssh.connect(name, port, server_host_key_algs="default", **settings)
        except asyncssh.HostKeyNotVerifiable as error:
            raise _untrusted(host, options, seen[-1] if seen else None, error) from error
        except asyncssh.PermissionDenied as error:
            raise Unreachable(
                f"{host} refused the login: it takes none of your keys. Install one with `ssh-copy-id {name}`, load it with `ssh-add`, or "
                "name it in ~/.ssh/config (IdentityFile, User)."
            ) from error
        except (OSError, asyncssh.Error, ValueError) as error:
            raise Unreachable(
                f"no connection to {host}: {_reason(error)}. Try `ssh {name}`, and check the name, the network and port."
            ) from error
        self._hops.append(connection)
        return connection

    async def _push(self, file: Path) -> str:
        content = await asyncio.to_thread(file.read_bytes)
        digest = hashlib.sha256(content).hexdigest()
        folder = f"{CACHE}/{digest}"
        target = f"{folder}/file{file.suffix if file.suffix.isascii() and file.suffix[1:].isalnum() else ''}"
        self._pushed = [*(known for known in self._pushed if known != digest), digest]
        await self._sftp.makedirs(folder, exist_ok=True)
        if await self._sftp.isfile(target) and await self._sftp.getsize(target) == len(content):
            await self._sftp.utime(target)
            return target
        await self._make_room(len(content))
        part = f"{folder}/{secrets.token_hex(8)}.part"
        try:
            async with self._sftp.open(part, "wb") as remote:
                await remote.write(content)
            await self._sftp.posix_rename(part, target)
        except BaseException:
            with contextlib.suppress(asyncssh.Error, OSError):
                await self._sftp.remove(part)
            raise
        return target

    async def _make_room(self, size_bytes: int) -> None:
        """Remove the oldest folders until the cache with the new file stays within its limit; refuse what the disk cannot hold."""
        if size_bytes > CACHE_BYTES:
            raise DeviceError(f"a file of {size_bytes:,} bytes is more than the {CACHE_BYTES:,} that edgeprune uses on a board.")
        with contextlib.suppress(asyncssh.SFTPOpUnsupported):
            disk = await self._sftp.statvfs(CACHE)
            if (free := disk.bavail * disk.frsize) < size_bytes:
                raise DeviceError(f"the disk of {self.where} is full: {free:,} bytes are free, {size_bytes:,} are needed. Make room there.")
        ages = []
        for name in await self._sftp.listdir(CACHE):
            if len(name) == 64 and stat.S_ISDIR((await self._sftp.stat(f"{CACHE}/{name}")).permissions or 0):
                files = [file.attrs async for file in self._sftp.scandir(f"{CACHE}/{name}") if file.filename not in (".", "..")]
                newest = max((f.mtime or 0 for f in files), default=0)
                ages.append((newest, sum(f.size or 0 for f in files), name))
        used, in_use = sum(size for _, size, _ in ages), {*self._pushed[:1], *self._pushed[-_IN_USE:]}  # the first is the agent
        for _, size, name in sorted(age for age in ages if age[2] not in in_use):
            if used + size_bytes <= CACHE_BYTES:
                break
            await self._sftp.rmtree(f"{CACHE}/{name}")
            used -= size
        if used + size_bytes > CACHE_BYTES:
            raise DeviceError(
                f"what is being measured takes {used:,} bytes on {self.where}, and {size_bytes:,} more are above the {CACHE_BYTES:,} that "
                "edgeprune uses on a board."
            )


def _parsed(host: str) -> tuple[Any, str, Any]:
    """(user, name, port) of [user@]name[:port]; () stands for what ~/.ssh/config says."""
    user, _, rest = host.rpartition("@")
    name, colon, port = rest.rpartition(":")
    if colon and name.count(":") == 0 and port.isdigit():
        return user or (), name, int(port)
    if not rest or rest.startswith("-"):
        raise Unreachable(f"{host!r} names no host: give [user@]name[:port] or a name of ~/.ssh/config.")
    return user or (), rest, ()


def _untrusted(host: str, options: asyncssh.SSHClientConnectionOptions, key: asyncssh.SSHKey | None, error: asyncssh.Error) -> Unreachable:
    """Refused for its host key: what it is, whether another one was known, and how to trust it after comparing."""
    name, port = options.host, options.port
    shown = name if port == 22 else f"[{name}]:{port}"
    which = f"its {key.get_algorithm()} key is {key.get_fingerprint()}" if key else _reason(error)
    known = asyncssh.match_known_hosts(
        options.known_hosts or str(Path("~/.ssh/known_hosts").expanduser()), name, "", None if port == 22 else port
    )
    compare = "Compare the fingerprint with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the board itself"
    if known[0]:
        return Unreachable(
            f"the host key of {host} has changed: {which}, and known_hosts has another. Either the board was installed anew or somebody is "
            f"in between. {compare}; if it is right, forget the old key with `ssh-keygen -R '{shown}'` and connect once with ssh."
        )
    return Unreachable(
        f"the host key of {host} is unknown: {which}. {compare}; if it is right, trust it with `ssh-keyscan -p {port} {name} >> "
        "~/.ssh/known_hosts` or connect once with ssh."
    )


def _reason(error: BaseException) -> str:
    text = getattr(error, "reason", "") or str(error) or type(error).__name__
    return " ".join(str(text).split())
