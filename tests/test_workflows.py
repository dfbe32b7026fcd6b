"""The workflow files: valid by the published schema, and every step is something that a developer runs too."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def check(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def steps(workflow: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        yield from job["steps"]


def test_every_workflow_is_valid_and_a_misspelt_key_is_not(tmp_path: Path) -> None:
    assert {w.stem for w in WORKFLOWS} == {"tests", "arm", "boards"}
    done = check(*WORKFLOWS)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOWS[0].read_text().replace("timeout-minutes", "timeout-minuts"))
    assert check(wrong).returncode == 1


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda w: w.stem)
def test_every_step_runs_a_target_of_the_makefile_or_the_ci_script(workflow: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    runs = [step["run"] for step in steps(workflow) if "run" in step]
    assert runs
    for run in runs:
        if run != "bash .ci/run":
            command, target, *assignments = run.split()
            assert command == "make" and target in targets, run
            assert all(re.match(r"[A-Z_]+=", word) for word in assignments), run


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda w: w.stem)
def test_no_untrusted_text_reaches_a_shell(workflow: Path) -> None:
    assert all("${{" not in step.get("run", "") for step in steps(workflow))
