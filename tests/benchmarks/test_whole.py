"""The benchmark of time and memory on commands that take none; its limits are for a machine that is idle."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from benchmarks.whole import LIMITS, rows, timed


def test_a_process_has_seconds_and_memory(tmp_path: Path) -> None:
    seconds, memory = timed(["device", "list"], tmp_path)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # the kernel gives a process at least the size of its parent
    assert 0 < seconds < 60 and 10e6 < memory < max(LIMITS["memory"], 1.5 * own)
    with pytest.raises(RuntimeError, match="No such command"):
        timed(["devices"], tmp_path)


def test_the_table_names_where_the_time_goes() -> None:
    whole = {
        "threads": 2,
        "wall_s": 41.0,
        "peak_memory_bytes": 2e9,
        "stages_s": {"trace": 0.04, "score": 20.0, "export": 4.0},
        "rest_s": 3.5,
    }
    found = {"compress": whole, "light": {"--help": {"wall_s": 0.3}}}
    lines = rows(found)
    assert "score 20.0, export 4.0; imports, reading, report 3.5" in lines[2] and "trace" not in lines[2]
    assert len(lines) == 4
