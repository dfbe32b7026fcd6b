"""The benchmark of hostile conditions: its own logic, and (slow) a few trials of every kind in a process of their own, as it forks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.robustness import PARTS, STOPPED, finished, lines, table

ROOT = Path(__file__).parents[2]
STAGES = {"start": 2, "export": 1}
FOUND: dict[str, Any] = {
    "fuzz": {"files": 80, "refused": 60, "slowest_s": 0.42, "by_kind": {"png": [40, 30, 0.1], "manifest": [40, 30, 0.42]}},
    "kill": {"trials": 3, "asked": 3, "by_stage": STAGES, "outcomes": {"resumed to the same files": 3}},
    "disk": {"trials": 3, "asked": 3, "by_stage": STAGES, "outcomes": {"one paragraph, exit code 1": 3}},
    "memory": {"trials": 3, "asked": 3, "by_stage": STAGES, "outcomes": {"done all the same": 1, "one paragraph, exit code 1": 2}},
    "growth": {"runs": 200, "after_warmup_bytes": 500_000_000, "last_bytes": 510_000_000, "growth_percent": 2.0},
}


def test_a_log_is_read_from_its_latest_start(tmp_path: Path) -> None:
    assert lines(tmp_path) == []
    log = ["T started: edgeprune x", "T trace: 0.1 s", "T resumed: edgeprune x", "T trace: read back", "T score: 2.0 s"]
    (tmp_path / "log.txt").write_text("\n".join(log) + "\n")
    assert lines(tmp_path) == log[2:]


def test_what_a_run_had_done_is_read_from_its_log() -> None:
    """What it says of an error, or of a round of measuring, is no stage."""
    log = ["T started: edgeprune x", "T trace: 0.1 s", "T round 1: 3.2 ms measured", "T score: 2.0 s", "T MemoryError: no more"]
    assert finished(log) == [log[0], log[1], log[3]] and finished([]) == []


def test_the_table_has_a_row_for_every_condition() -> None:
    rows = table(FOUND).splitlines()[2:]
    assert len(rows) == len(FOUND) == len(PARTS)
    assert "start 2, export 1" in rows[1] and "resumed to the same files (3)" in rows[1]
    assert "500 MB after 10 runs, 510 MB after the last: +2.0%" in rows[4]
    assert len(table({"fuzz": FOUND["fuzz"]}).splitlines()) == 3


def may_mount(folder: Path) -> bool:
    done = subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, check=False)
    return done.returncode == 0 and subprocess.run(["umount", str(folder)], check=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("part", "trials"), [("kill", 8), ("disk", 6), ("memory", 6), ("growth", 30)])
def test_a_few_trials(part: str, trials: int, tmp_path: Path) -> None:
    if part == "disk" and not may_mount(tmp_path):
        pytest.skip("mounting a file system needs root")
    command = [sys.executable, "-m", "benchmarks.robustness", part, "--trials", str(trials)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)[part]
    if part == "growth":
        assert found["runs"] == trials and found["growth_percent"] < 5
        return
    assert sum(found["by_stage"].values()) == sum(found["outcomes"].values()) == trials
    assert sum(hits > 0 for hits in found["by_stage"].values()) >= (trials - 3 if part == "kill" else trials)
    if part == "disk":
        assert set(found["outcomes"]) == {STOPPED}
