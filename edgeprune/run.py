"""The run folder: what was asked, what every stage found, and everything needed to go on after a crash. No torch here.

Invariants: a file is either whole or absent (written under a temporary name, synced, renamed), so `kill -9` at any moment leaves a
folder that can be resumed; a stage is read back only if its inputs, everything upstream and its files are unchanged; one process at a
time writes into a folder. POSIX: the lock is held by the kernel (flock) and so dies with its process. Where several processes compute
one run together (accelerate launch), the first one leads: it alone writes, and tells the others what each stage found.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from edgeprune.errors import EdgepruneError, UsageError

FORMAT = 1
PACKAGES = ("edgeprune", "torch", "numpy", "onnxruntime")
TEMPORARY = ".tmp"

Facts = Mapping[str, Any]
T = TypeVar("T")


class Team(Protocol):
    """The processes that compute one run together (train/processes.py)."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files."""
        ...

    def told(self, value: T) -> T:
        """What the leader has as `value`, in every process."""
        ...


class _Alone:
    """One process."""

    leads = True

    def told(self, value: T) -> T:
        """Its own value."""
        return value


ALONE: Team = _Alone()


class Run:
    """An open run folder. A context manager: leaving it writes the status (done, interrupted, failed) and frees the folder.

    `manifest` is what run.json holds. Open one with `Run.open`.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], lock: int, team: Team = ALONE) -> None:
        self.root = self.folder = folder
        self.manifest = manifest
        self._lock = lock
        self.team = team
        self._part = ""
        self._upstream = ""
        self.used: dict[str, bool] = {}  # the stages of this process in order, and whether each was read back

    @classmethod
    def open(cls, folder: str | Path, *, asked: Mapping[str, Any], command: list[str], resume: bool = False, team: Team = ALONE) -> Run:
        """Creates the folder, or goes on with the run in it (`resume`); `asked` and `command` go into run.json.

        Only the leader of a `team` opens it; the others are told what it holds.

        Raises UsageError if the folder holds a run and `resume` is off, is in use by another process, holds a damaged run.json,
        or cannot be written.
        """
        folder = Path(folder)
        if not team.leads:
            return cls(folder, team.told({}), -1, team)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _acquire(folder)
        except OSError as error:
            raise write_error(error, folder) from error
        try:
            manifest = _manifest(folder, resume=resume)
            manifest |= {"status": "running", "command": command, "asked": dict(asked), **_environment()}
            run = cls(folder, team.told(manifest), lock, team)
            run._save()
        except BaseException:
            os.close(lock)
            raise
        run.log(f"{'resumed' if manifest['stages'] else 'started'}: {' '.join(command)}")
        return run

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.team.leads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close("done")
            return
        # A full disk may be why we are leaving: failing to note the status must not hide that.
        with suppress(EdgepruneError):
            self.log(f"{kind.__name__}: {error}")
            self.close("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")
        self._release()

    def path(self, name: str) -> Path:
        """Where a file of this run, or of the part `inside`, lies ("model.onnx", "checkpoints/3.safetensors"); its folder exists."""
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, path.parent) from error
        return path

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Until the end of the block, stages are called "part: name" and their files lie in a folder `part`; "" changes nothing."""
        self._part, self.folder = f"{part}: " if part else "", self.root / part
        try:
            yield
        finally:
            self._part, self.folder = "", self.root

    def record(self, name: str, value: Any) -> None:
        """Puts one entry into run.json at once, for example the hashes of the inputs; `value` must be JSON."""
        self.manifest[name] = value
        self._save()

    def log(self, text: str) -> None:
        """Appends one line with a UTC time stamp to log.txt."""
        if not self.team.leads:
            return
        try:
            with (self.root / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{_now()} {' '.join(text.split())}\n")
        except OSError as error:
            raise write_error(error, self.root / "log.txt") from error

    def cached(
        self,
        name: str,
        inputs: Facts,
        compute: Callable[[], T],
        *,
        write: Callable[[T], Facts],
        read: Callable[[Facts], T],
        together: bool = False,
    ) -> T:
        """The value of a stage: read back if nothing it depends on changed, else computed and recorded.

        Stages form a chain: what this one depends on is `inputs` (JSON: hashes, options) and every stage asked for before it in
        this process. `write` puts the value into files of the folder and returns JSON facts; the entry "files" of the facts, a list
        of names in the folder, is checked by hash before `read` is trusted with the facts again. run.json then holds
        stages[name] = {key, seconds, facts, sha256}. In a team the leader computes (all of them, where the stage is done `together`),
        the others read.
        """
        name = self._part + name
        text = json.dumps([name, inputs, self._upstream, _version("edgeprune")], sort_keys=True)
        self._upstream = key = hashlib.sha256(text.encode()).hexdigest()
        entry = self.manifest["stages"].get(name)
        self.used[name] = self.team.told(entry is not None and entry["key"] == key and self.team.leads and self._intact(entry))
        if self.used[name]:
            self.log(f"{name}: read back")
            return read(entry["facts"])
        start = time.monotonic()
        value = [compute()] if together or self.team.leads else []
        entry = self.team.told(self._entry(key, start, write(value[0])) if self.team.leads else {})
        self.manifest["stages"][name] = entry
        self._save()
        self.log(f"{name}: {entry['seconds']} s")
        return value[0] if value else read(entry["facts"])

    def _entry(self, key: str, start: float, facts: Facts) -> dict[str, Any]:
        seconds = round(time.monotonic() - start, 3)
        files = [(self.folder / file).relative_to(self.root).as_posix() for file in facts.get("files", ())]
        return {"key": key, "seconds": seconds, "facts": dict(facts), "sha256": {file: hash_file(self.root / file) for file in files}}

    def close(self, status: str = "done") -> None:
        """Writes the final status (done, interrupted or failed) and frees the folder; harmless when repeated."""
        if self._lock >= 0:  # only the leader holds one
            self.manifest |= {"status": status, "finished": _now()}
            try:
                self._save()
            finally:
                self._release()

    def _intact(self, entry: Facts) -> bool:
        return all((self.root / file).is_file() and hash_file(self.root / file) == sha for file, sha in entry["sha256"].items())

    def _save(self) -> None:
        if self.team.leads:
            write_json(self.root / "run.json", self.manifest)

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def default_folder(stem: str, device: str) -> Path:
    """runs/<stem>-<device>, or the first free one."""
    return free_folder(Path("runs") / f"{stem}-{device}")


def free_folder(first: Path) -> Path:
    """`first`, or the first free one of …-2, …-3: a new run never lands in an old folder."""
    folder, number = first, 1
    while folder.exists():
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` for the body to write; renamed to `path` once whole and synced, removed on any error.

    Raises UsageError where the folder cannot be written, EdgepruneError when the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)  # the rename itself must survive a power cut
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, content: bytes) -> None:
    """Writes a whole file or nothing; errors as for `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: Any) -> None:
    """Writes readable JSON, whole or not at all; errors as for `replacing`, ValueError for NaN and infinity."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _acquire(folder: Path) -> int:
    """Locks the folder and returns the open lock file; its text (pid and host) is for people, the kernel holds the lock."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except BlockingIOError as error:
        owner = os.pread(lock, 1000, 0).decode(errors="replace")
        os.close(lock)
        raise UsageError(f"{folder} is in use by another run ({owner}): wait for it, or choose another folder with --out.") from error
    except OSError:
        os.close(lock)
        raise
    return lock


def _manifest(folder: Path, *, resume: bool) -> dict[str, Any]:
    """What run.json holds (resumed) or a fresh manifest; clears what a killed run left half-written."""
    path = folder / "run.json"
    # Only our own names: a folder without a run may be anything, even the user's home.
    leftovers = folder.rglob(f".*{TEMPORARY}*") if path.exists() else folder.glob(f".{path.name}.*{TEMPORARY}")
    if not path.exists():
        _remove(leftovers)
        return {"format": FORMAT, "created": _now(), "inputs": {}, "stages": {}}
    if not resume:
        raise UsageError(f"{folder} already holds a run: go on with it with --resume, or choose another folder with --out.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}): this run cannot be resumed. Start again in another folder with --out."
        ) from error
    if not _well_formed(manifest):
        raise UsageError(f"{path} is not a run of format {FORMAT}: this run cannot be resumed. Start again in another folder with --out.")
    _remove(leftovers)
    manifest.pop("finished", None)
    return manifest


def _remove(files: Iterable[Path]) -> None:
    for file in list(files):
        with suppress(OSError):
            file.unlink()


def _well_formed(manifest: Any) -> bool:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not isinstance(manifest.get("stages"), dict):
        return False
    return all(isinstance(entry, dict) and {"key", "facts", "sha256"} <= entry.keys() for entry in manifest["stages"].values())


def _environment() -> dict[str, Any]:
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    return {"versions": versions, "platform": platform.platform(), "git": _git_commit(), "argv0": sys.argv[0]}


def product_version() -> str:
    """The installed version of edgeprune, or "source" when it runs from a checkout that was not installed."""
    return _version("edgeprune") or "source"


def _version(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the folder the command runs in, None outside a repository."""
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(error: OSError, path: Path) -> EdgepruneError:
    """What to tell of a file that could not be written: a full disk is no fault of what was asked for."""
    if disk_is_full(error):
        return EdgepruneError(f"no space left to write {path}: nothing half-written was left; free some space and go on with --resume.")
    return UsageError(f"{path} cannot be written ({error.strerror or error}): choose another folder with --out.")


def disk_is_full(error: OSError) -> bool:
    """Whether there is no space left, or none for this user."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
