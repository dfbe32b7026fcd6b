"""The command in processes of its own: what it imports, and `python -m edgeprune`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIGHT = [["--help"], ["compress", "--help"], ["criteria"], ["allocators"], ["device", "list"], ["device", "show", "rpi4"]]


def test_light_commands_import_nothing_heavy(tmp_path: Path) -> None:
    """In one process of their own, one after the other."""
    code = f"""
import sys
from edgeprune.cli import main
for words in {LIGHT!r}:
    sys.argv = ["edgeprune", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
    heavy = {{"torch", "onnx", "onnxruntime", "plotly", "scipy", "sklearn"}} & sys.modules.keys()
    assert not heavy, (words, heavy)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "knapsack" in done.stdout


def test_the_module_is_the_command(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "edgeprune", "device", "show", "rpi9"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("edgeprune: no device is called 'rpi9'.")
    assert "Traceback" not in done.stderr
