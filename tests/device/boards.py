"""A board for tests: a real OpenSSH server on 127.0.0.1 whose sessions begin in a home folder of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import asyncssh
import pytest

SFTP = next(
    (p for p in ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/libexec/sftp-server") if Path(p).exists()), ""
)
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") or ""


def need_sshd() -> None:
    """Skip where there is no OpenSSH server."""
    if not (SSHD and SFTP):
        pytest.skip("no OpenSSH server here (Debian: apt-get install openssh-server)")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # an sshd that root starts insists on it


def new_key(path: Path) -> asyncssh.SSHKey:
    key = asyncssh.generate_private_key("ssh-ed25519")
    path.parent.mkdir(parents=True, exist_ok=True)
    key.write_private_key(path)
    path.chmod(0o600)
    key.write_public_key(f"{path}.pub")
    return key


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Board:
    """The server; `home` is the home folder of its sessions, `shell` what they run in (default: the commands as they are)."""

    folder: Path
    shell: str = ""
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.home = self.folder / "its home"
        self.host_key = self.folder / "host_key"
        self.client_key = self.folder / "client_key"
        self.home.mkdir(parents=True)
        new_key(self.host_key)
        new_key(self.client_key)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        shell = self.folder / "shell"
        shell.write_text(
            "#!/bin/sh\n"
            + (
                self.shell
                or f'cd "{self.home}" && HOME="{self.home}" && export HOME\nexec /bin/sh -c "${{SSH_ORIGINAL_COMMAND:-exit 0}}"\n'
            )
        )
        shell.chmod(0o755)
        shutil.copy(f"{self.client_key}.pub", self.folder / "authorized")
        config = self.folder / "sshd_config"
        config.write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {self.host_key}\nPidFile none\nAuthorizedKeysFile {self.folder}/authorized\n"
            f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nSubsystem sftp {SFTP}\nForceCommand {shell}\n"
            f"SetEnv EDGEPRUNE_LOCK=edgeprune-test-{os.getpid()}-{self.port}\nPermitRootLogin yes\nLogLevel ERROR\n"
        )
        self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        self.stop()
        raise TimeoutError("sshd does not listen")

    def stop(self) -> None:
        """End the server and every session of it."""
        if self.process:
            sessions = children(self.process.pid)
            self.process.terminate()
            self.process.wait()
            for pid in sessions:
                end(pid)
            self.process = None

    def use_python(self, program: str = f'exec "{sys.executable}" "$@"') -> None:
        """The Python that the agent runs in: a virtual environment's, as `device check` proposes it."""
        python = self.home / ".cache/edgeprune/venv/bin/python3"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)

    def processes(self) -> list[int]:
        """What still runs in the home folder, but for sshd's own."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._here(pid)]

    def _here(self, pid: int) -> bool:
        try:
            where = os.readlink(f"/proc/{pid}/cwd")
            return Path(where) == self.home and ") Z" not in Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False

    def agents(self) -> list[int]:
        """Process ids of the agent and of the fresh processes it started, in this order."""
        return sorted(pid for pid in self.processes() if is_agent(pid))

    def empties(self, seconds: float = 15.0) -> bool:
        """Whether nothing is left in the home folder within that time."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.processes()


def children(pid: int) -> list[int]:
    """Processes below `pid`."""
    found, parents = [], {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    queue = [pid]
    while queue:
        below = [p for p, parent in parents.items() if parent == queue[0]]
        found += below
        queue = queue[1:] + below
    return found


def is_agent(pid: int) -> bool:
    """Whether the process is a Python that runs the agent, not a shell on the way there."""
    try:
        return b"--grace" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def is_sshd(pid: int) -> bool:
    """Whether the process is one of the server's own."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("sshd")
    except OSError:
        return False


def end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@dataclass
class Client:
    """A user's home with ~/.ssh in it."""

    home: Path

    def configure(self, text: str) -> None:
        (self.home / ".ssh").mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.home / ".ssh" / "config").write_text(text)

    def trust(self, *boards: Board) -> None:
        (self.home / ".ssh").mkdir(parents=True, exist_ok=True, mode=0o700)
        lines = [f"[127.0.0.1]:{b.port} {Path(f'{b.host_key}.pub').read_text()}" for b in boards]
        (self.home / ".ssh" / "known_hosts").write_text("".join(lines))

    def knows(self, name: str, board: Board, *more: str) -> str:
        """A Host entry for a board."""
        lines = [f"Host {name}", "HostName 127.0.0.1", f"Port {board.port}", f"User {_user()}", f"IdentityFile {board.client_key}", *more]
        return "\n    ".join(lines) + "\n"


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name
