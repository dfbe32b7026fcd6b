from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Command


def test_the_gate_names_what_got_worse_with_both_figures(edgeprune: Command, here: Path) -> None:
    assert edgeprune("bench", "mobile", "--no-latency", "--no-instructions", "--out", "base.json").code == 0
    same = edgeprune("bench", "mobile", "--no-latency", "--no-instructions", "--baseline", "base.json", "--json")
    assert same.code == 0 and json.loads(same.out)["regressions"] == []
    text = json.loads(Path("base.json").read_text())
    text["networks"]["mobile"]["exact"]["size_bytes"] /= 2
    Path("base.json").write_text(json.dumps(text))
    worse = edgeprune("bench", "mobile", "--no-latency", "--no-instructions", "--baseline", "base.json")
    assert worse.code == 1
    assert "mobile: size_bytes" in worse.message and "100.00% worse" in worse.message


def test_two_ways_to_compare_at_once_are_refused(edgeprune: Command, here: Path) -> None:
    done = edgeprune("bench", "--baseline", "base.json", "--against", "HEAD")
    assert done.code == 2 and "give one of them" in done.message


def test_a_missing_baseline_is_known_before_anything_runs(edgeprune: Command, here: Path) -> None:
    done = edgeprune("bench", "--baseline", "base.json")
    assert done.code == 2 and "cannot be read" in done.message
