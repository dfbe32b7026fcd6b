"""What becomes of compress where conditions are hostile: killed, no disk, no memory, damaged files, hundreds of runs in one process.

    python -m benchmarks.robustness                        # everything
    python -m benchmarks.robustness kill disk              # some of it
    python -m benchmarks.robustness kill --seconds 150     # no new trial after so long; the next call goes on
    python -m benchmarks.robustness kill --trials 3        # fewer trials, nothing written

A run is the command in a process of its own, forked from one that has everything imported: a small CNN on a task of coloured noise,
every stage of a run that trains, quantizes and measures on this machine. Two runs left alone say which files are the same bit by bit.
kill: SIGKILL at a random moment of the stage whose turn it is; disk, memory: when the stage whose turn it is begins, the process itself
makes the file system (a tmpfs that also holds the temporary files; needs root) as small as what it holds, or takes all that its heap has
free and limits its address space to what there is plus a random part of a third of what the stage takes when left alone. The stage in which
it then ends is told from its log. Each time the same command with --resume must end with the same files. fuzz: tests/hostile.py.
growth: the resident set of a process that compresses again and again. Writes robustness.json and .md into benchmarks/results, entry by
entry.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import json
import math
import os
import platform
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open

import edgeprune as ep
from benchmarks.revision import git_revision
from edgeprune import pipeline
from edgeprune.cli import main as command
from edgeprune.run import Run, hash_file, write_json
from tests.colours import FACTORY, SIDE, colour_data, colour_net, write_npz, write_weights

RESULTS = Path(__file__).parent / "results"
BRIEF = {"processes": 3, "min_runs": 20, "min_seconds": 0.01, "warmup_runs": 1, "warmup_seconds": 0.0}  # nobody reads these latencies
OPTIONS = "--data data.npz --macs 0.5 --epochs 4 --lr 0.02 --batch-size 16 --quantize int8 --seed 3"
NEEDED = {"model.safetensors", "model.onnx", "plan.json", "bitplan.json"}  # must be among the files that two runs have in common
GROWTH_WARMUP = 10  # runs, while modules are imported and pools filled
LONGEST_S = 120
BLOCKS_BYTES = (1 << 20, 1 << 16, 1 << 12)  # a heap is full when it has no room for the smallest
STOPPED = "one paragraph, exit code 1"

Step = Callable[[], None]


@dataclass(frozen=True)
class Asked:
    """How many trials (None: all that belong to the part), and after how many seconds no new one begins."""

    trials: int | None = None
    seconds: float = math.inf


class Wrong(Exception):
    """A trial ended in a way in which none may."""


@dataclass(frozen=True)
class Bench:
    """Where runs for a device happen, what one left alone is like: its files by hash, its stages, and when each was done."""

    device: str
    inputs: Path
    steady: dict[str, str]
    stages: tuple[str, ...]  # "start", the stages, "report": what is under way after 0, 1, … lines of the log
    moments: tuple[float, ...]  # seconds at which each begins, and the end
    taken: tuple[int, ...]  # bytes of address space that each adds at most to what there is when it begins


def words(device: str, folder: Path, *more: str) -> list[str]:
    """The command that is tried."""
    return ["edgeprune", "compress", "net.pt", "--model", FACTORY, *OPTIONS.split(), "--device", device, "--out", str(folder), *more]


def forked(inputs: Path, folder: Path, device: str, *more: str, turn: int = -1, squeeze: Step | None = None) -> int:
    """The process id of a child that is the command; what it says goes into a file beside its folder.

    The child itself calls `squeeze` when so many lines (`turn`) are in its log: as that stage begins.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        os.chdir(inputs)
        said = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ["TMPDIR"], tempfile.tempdir = str(folder.parent), None
        sys.argv = words(device, folder, *more)
        try:
            if squeeze:
                when_begins(turn, squeeze)
            command()
        except SystemExit as end:
            code = int(end.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if sys.exc_info()[0]:  # what Python would do itself, were this its main program
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)


def when_begins(turn: int, squeeze: Step) -> None:
    """Has this process call `squeeze` as soon as it has written so many lines into a run's log; at once for none."""
    written, log = [0], Run.log

    def counted(run: Run, text: str) -> None:
        log(run, text)
        written[0] += 1
        if written[0] == turn:
            squeeze()

    Run.log = counted  # type: ignore[assignment, method-assign]  # in the trial's process
    if not turn:
        squeeze()


def lines(folder: Path) -> list[str]:
    """What the log of the latest start of a run says."""
    try:
        text = (folder / "log.txt").read_text()
    except OSError:
        return []
    return re.split(r"(?=^\S+ (?:started|resumed): )", text, flags=re.MULTILINE)[-1].splitlines()


def ended(child: int, until: Callable[[], bool] = lambda: False) -> int | None:
    """The exit status of the child (negative: the signal), None as soon as `until` holds."""
    deadline = time.monotonic() + LONGEST_S
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Wrong(f"hung for {LONGEST_S} s")
        time.sleep(0.0005)


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a run by its name in the folder; of .safetensors what they hold, because their header has no fixed order."""
    return {p.relative_to(folder).as_posix(): _hash(p) for p in folder.rglob("*") if p.is_file()}


def _hash(file: Path) -> str:
    if file.suffix != ".safetensors":
        return hash_file(file)
    with safe_open(file, framework="numpy") as opened:
        found = hashlib.sha256(json.dumps(opened.metadata(), sort_keys=True).encode())
        for name in sorted(opened.keys()):
            array = opened.get_tensor(name)
            found.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return found.hexdigest()


def prepared(folder: Path, device: str) -> Bench:
    """Inputs, everything imported that a run imports, and what two runs left alone have in common."""
    vars(pipeline).update(FULL=BRIEF, QUICK=BRIEF)
    folder.mkdir()
    write_weights(folder / "net.pt")
    write_npz(folder / "data.npz")
    if not (child := os.fork()):  # a run whose imports this process then makes its own
        with suppress(SystemExit), open(os.devnull, "w") as nowhere:
            sys.stdout = sys.stderr = nowhere
            os.chdir(folder)
            sys.argv = words(device, folder / "first")
            command()
        (folder / "modules").write_text("\n".join(sys.modules))
        os._exit(0)
    os.waitpid(child, 0)
    for name in (folder / "modules").read_text().splitlines():
        with suppress(ImportError, AttributeError):
            importlib.import_module(name)
    whole = folder / "whole"
    child, start, moments, taken = forked(folder, whole, device), time.monotonic(), [0.0], [0]
    begun = [address_space(child)]

    def next_begins() -> bool:
        taken[-1] = max(taken[-1], address_space(child) - begun[-1])
        return len(lines(whole)) >= len(moments)

    while (status := ended(child, next_begins)) is None:
        moments.append(time.monotonic() - start)
        begun.append(address_space(child))
        taken.append(0)
    if status:
        raise Wrong(whole.with_suffix(".txt").read_text())
    names = [line.split(" ", 1)[1].rpartition(":")[0] for line in lines(whole)[1:]]
    first, second = hashes(folder / "first"), hashes(whole)
    steady = {name: value for name, value in second.items() if first.get(name) == value}
    if not steady.keys() >= NEEDED:
        raise Wrong(f"two runs differ in {sorted(NEEDED - steady.keys())}")
    return Bench(device, folder, steady, ("start", *names, "report"), (*moments, time.monotonic() - start), tuple(taken))


def address_space(process: int) -> int:
    """What a process has of it, in bytes; 0 of one that is ending."""
    with suppress(psutil.Error):
        return int(psutil.Process(process).memory_info().vms)
    return 0


def checked_resume(bench: Bench, folder: Path) -> None:
    """The same command with --resume: done, and the files of a run left alone, nothing half-written beside them."""
    status, found = ended(forked(bench.inputs, folder, bench.device, "--resume")), hashes(folder)
    if status:
        raise Wrong(f"resuming ended with {status}: {folder.with_suffix('.txt').read_text()}")
    different = [name for name, value in bench.steady.items() if found.get(name) != value]
    half = [name for name in found if ".tmp" in name]
    if different or half or json.loads((folder / "run.json").read_text())["status"] != "done":
        raise Wrong(f"after resuming {different} differ, {half} are left")


def left_behind(child: int) -> list[str]:
    """Processes of the child's session that live on after it."""
    deadline = time.monotonic() + 10
    while found := [p for p in psutil.process_iter() if _of_session(p, child)]:
        if time.monotonic() > deadline:
            return [" ".join(p.cmdline()) for p in found]
        time.sleep(0.01)
    return []


def _of_session(process: psutil.Process, session: int) -> bool:
    with suppress(psutil.Error, ProcessLookupError):
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    return False


def kill(bench: Bench, folder: Path, turn: int, dice: random.Random) -> str | None:
    """SIGKILL in the stage whose turn it is; the stage that was hit, None if the run was over before."""
    wait = dice.uniform(0, bench.moments[turn + 1] - bench.moments[turn])
    child = forked(bench.inputs, folder, bench.device)
    if ended(child, lambda: len(lines(folder)) >= turn) is not None:
        return None
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
        return None
    hit = bench.stages[len(lines(folder))]
    if found := left_behind(child):
        raise Wrong(f"killed in {hit}, it left processes behind: {found}")
    checked_resume(bench, folder)
    return hit


def squeezed(bench: Bench, folder: Path, turn: int, squeeze: Step, words: str) -> str:
    """How a run ended that was made short of something when the stage whose turn it was began."""
    hit = bench.stages[turn]
    status = ended(forked(bench.inputs, folder, bench.device, turn=turn, squeeze=squeeze))
    said = " ".join(folder.with_suffix(".txt").read_text().split())
    if status == 1 and words in said and "--resume" in said and "Traceback" not in said:
        last = bench.stages[len(finished(lines(folder)))]
        return STOPPED if last == hit else f"{hit} was done all the same, then {STOPPED} in {last}"
    if status is not None and status < 0:
        return f"ended by {signal.Signals(-status).name} (limit set in {hit})"
    if status == 0:
        return f"done all the same (limit set in {hit})"
    raise Wrong(f"short of what it needs in {hit}, it ended with {status}: {said}")


def finished(log: list[str]) -> list[str]:
    """Of the lines of a log: its start, and one per stage that was done."""
    return log[:1] + [line for line in log[1:] if re.search(r": \S+ s$", line)]


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 40 MB. Raises CalledProcessError where none may be mounted."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, size: int) -> None:
    """Makes the mounted file system so large, in bytes."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def disk(bench: Bench, folder: Path, turn: int, dice: random.Random) -> str:
    """The disk is full from the stage whose turn it is; with room again, the run is resumed."""
    with small_disk(folder) as mounted:

        def fill() -> None:
            state = os.statvfs(mounted)
            resize(mounted, max(1, state.f_blocks - state.f_bfree) * state.f_frsize)

        found = squeezed(bench, mounted / "run", turn, fill, "no space left")
        resize(mounted, 40_000_000)
        checked_resume(bench, mounted / "run")
    return found


def memory(bench: Bench, folder: Path, turn: int, dice: random.Random) -> str:
    """From the stage whose turn it is, the process gets less memory than that stage takes; without the limit, the run is resumed."""
    more = int(dice.random() * bench.taken[turn] / 3)  # a third: not all that is reserved is needed

    def limit() -> None:
        there = address_space(os.getpid())
        resource.setrlimit(resource.RLIMIT_AS, (there, resource.RLIM_INFINITY))
        if turn:  # before the command begins it is Python alone that would want a few bytes, and fails an assertion of its own
            fill_heap()
        resource.setrlimit(resource.RLIMIT_AS, (there + more, there + more))

    found = squeezed(bench, folder, turn, limit, "memory ran out")
    checked_resume(bench, folder)
    return found


def fill_heap() -> None:
    """Takes, for good, what this process has free: no stage lives on what former ones gave back, as a small network's could."""
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes, malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    for size in BLOCKS_BYTES:
        while malloc(size):
            pass


def trials(what: str, asked: Asked, before: dict[str, Any]) -> dict[str, Any]:
    """Kills, full disks or full memories, the stages in turn: so many that hit (50 kills; of the others one in every stage)."""
    hits, outcomes = Counter[str](before.get("by_stage", {})), Counter[str](before.get("outcomes", {}))
    number, start = before.get("begun", 0), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        board, host = (prepared(place / device, device) for device in ("rpi4", "host"))
        # Measuring takes three processes each time: only that stage is tried on the device that has it.
        turns = [(board, n) for n in range(len(board.stages))] + [(host, host.stages.index("measure"))]
        random.Random(7).shuffle(turns)
        wanted = asked.trials or (50 if what == "kill" else len(turns))
        while hits.total() < wanted and time.monotonic() - start < asked.seconds:
            (bench, turn), folder, dice = turns[number % len(turns)], place / f"{what}-{number}", random.Random(number)
            number += 1
            hit: str | None = bench.stages[turn]
            if what == "kill":
                hit, outcome = kill(bench, folder, turn, dice), "resumed to the same files"
            else:
                outcome = (disk if what == "disk" else memory)(bench, folder, turn, dice)
            if hit is not None:
                hits[hit] += 1
                outcomes[outcome] += 1
        seconds = {name: round(b - a, 3) for name, a, b in zip(host.stages, host.moments, host.moments[1:], strict=False)}
    return {
        "trials": hits.total(),
        "asked": wanted,
        "begun": number,
        "by_stage": {name: hits[name] for name in host.stages},
        "outcomes": dict(outcomes),
        "seconds_of_an_undisturbed_run": seconds,
        "files_compared": len(host.steady),
    }


def growth(asked: Asked, before: dict[str, Any]) -> dict[str, Any]:
    """Resident set after every tenth run of one process; the last over the one after the first GROWTH_WARMUP.

    Every fourth run has data, so scores, refits and judges too.
    """
    process, count = psutil.Process(), asked.trials or 200
    torch.set_num_threads(1)
    model, data, sizes = colour_net(), colour_data(), []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            ep.compress(
                model,
                torch.zeros(1, 3, SIDE, SIDE),
                budget=ep.Budget(macs=0.5),
                device="rpi4",
                data=None if number % 4 else data,
                recipe=ep.Recipe(epochs=0),
                out=Path(name) / str(number),
            )
            sizes.append(process.memory_info().rss)
    base = sizes[min(GROWTH_WARMUP, count) - 1]
    return {
        "runs": count,
        "seconds": round(time.monotonic() - start, 1),
        "first_bytes": sizes[0],
        "after_warmup_bytes": base,
        "last_bytes": sizes[-1],
        "largest_bytes": max(sizes),
        "growth_percent": round(100 * (sizes[-1] / base - 1), 2),
        "every_tenth_bytes": sizes[9::10],
    }


def fuzz(asked: Asked, before: dict[str, Any]) -> dict[str, Any]:
    """Damaged files by kind; each kind in a folder of its own."""
    from tests.hostile import KINDS, LONGEST_S, survey

    found = {}
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = survey(kind, Path(folder), asked.trials or 40, seed=1)
    return {
        "files": sum(s.files for s in found.values()),
        "refused": sum(s.refused for s in found.values()),
        "slowest_s": round(max(s.slowest_s for s in found.values()), 2),
        "limit_s": LONGEST_S,
        "by_kind": {name: [s.files, s.refused, round(s.slowest_s, 3)] for name, s in found.items()},
    }


PARTS: dict[str, Callable[[Asked, dict[str, Any]], dict[str, Any]]] = {
    "fuzz": fuzz,
    "kill": partial(trials, "kill"),
    "disk": partial(trials, "disk"),
    "memory": partial(trials, "memory"),
    "growth": growth,
}


def table(found: dict[str, Any]) -> str:
    """One row per condition that was tried."""
    rows = ["| condition | tried | what came of it |", "|---|---|---|"]
    if entry := found.get("fuzz"):
        came = f"{entry['refused']} refused in one paragraph, the others read; slowest {entry['slowest_s']:.1f} s"
        rows.append(f"| damaged files of {len(entry['by_kind'])} kinds | {entry['files']} | {came}; nothing started or written elsewhere |")
    for name, words in (("kill", "SIGKILL"), ("disk", "disk full"), ("memory", "no more memory")):
        if entry := found.get(name):
            stages = ", ".join(f"{stage} {hits}" for stage, hits in entry["by_stage"].items())
            came = ", ".join(f"{outcome} ({n})" for outcome, n in entry["outcomes"].items())
            came += "" if name == "kill" else "; each resumed to the same files"
            rows.append(f"| {words}, by stage: {stages} | {entry['trials']} | {came} |")
    if entry := found.get("growth"):
        came = f"{entry['after_warmup_bytes'] / 1e6:.0f} MB after {GROWTH_WARMUP} runs, {entry['last_bytes'] / 1e6:.0f} MB after the last"
        rows.append(f"| runs in one process | {entry['runs']} | {came}: {entry['growth_percent']:+.1f}% |")
    return "\n".join(rows)


def main() -> None:
    """Try what was asked for, print it; write it down unless the number of trials was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--trials", type=int, help="per part (per kind for fuzz)")
    parser.add_argument("--seconds", type=float, default=math.inf)
    words = parser.parse_args()
    asked = Asked(words.trials, words.seconds)
    file = RESULTS / "robustness.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in words.parts or PARTS:
        before = found.get(name, {})
        unfinished = asked.trials is None and before.get("trials", 0) < before.get("asked", 0)
        entry = PARTS[name](asked, before if unfinished else {})
        print(json.dumps({name: entry}), flush=True)
        if asked.trials is None:
            found[name] = entry | {"revision": git_revision(), "platform": platform.platform()}
            write_json(file, found)
            text = f"# Hostile conditions\n\n`python -m benchmarks.robustness`\n\n{table(found)}\n"
            (RESULTS / "robustness.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
