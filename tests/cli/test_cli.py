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


def test_help_shows_whole_sentences() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    for words in (["--help"], ["device", "--help"]):
        command = [sys.executable, "-m", "edgeprune", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        commands = done.stdout.partition("Commands:\n")[2]
        assert commands and "..." not in commands
        assert done.stdout.startswith("Usage: edgeprune ")


def test_the_module_is_the_command(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "edgeprune", "device", "show", "rpi9"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("edgeprune: no device is called 'rpi9'.")
    assert "Traceback" not in done.stderr


def test_shells_complete_commands_and_options(tmp_path: Path) -> None:
    """The script that a shell sources, and what it is answered; nothing heavy is imported for a press of the tab key."""
    code = """
import os, sys
from edgeprune.cli import main
sys.argv = ["edgeprune"]
for asked, typed in (("source_bash", ""), ("source_zsh", ""), ("complete_bash", "comp"), ("complete_bash", "device l"),
                     ("complete_bash", "compress m.pt --lat")):
    words = f"edgeprune {typed}"
    os.environ |= {"_EDGEPRUNE_COMPLETE": asked, "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    try:
        main()
    except SystemExit as end:
        assert not end.code, (asked, typed, end.code)
    print("---")
assert not {"torch", "onnx", "numpy"} & sys.modules.keys()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bash, zsh, commands, devices, options, _ = done.stdout.split("---\n")
    assert "complete_bash" in bash and bash.rstrip().endswith("edgeprune")
    assert "#compdef edgeprune" in zsh
    assert (commands.split(), devices.split(), options.split()) == (["compress"], ["list"], ["--latency-ms"])
