"""Time and memory of the whole: `compress --epochs 0` on MobileNetV2 at 224x224 pixels, and the commands that only look something up.

    python -m benchmarks.whole

Fresh processes, from the start of the command to its last line; peak memory is the kernel's figure for the process (its largest resident
set). compress takes THREADS threads, random weights, real photos (EDGEPRUNE_DATA/imagenet, JPEG files of 256x256 pixels, made-up classes:
only the work matters here) and a tenth off the predicted latency of a Raspberry Pi 4. The light commands are medians of ROUNDS. Writes
whole.json and whole.md into benchmarks/results; exit code 1 where a limit of LIMITS is missed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.graph_start import SHIM
from benchmarks.revision import git_revision
from benchmarks.training import photos

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
THREADS = 2
IMAGES = (800, 200)  # train, val
LIGHT = (["--help"], ["criteria"], ["device", "list"])
LIMITS = {"compress": 60.0, "memory": 3e9, "light": 0.5}  # seconds, bytes, seconds
FACTORY = f"{SHIM}\n\ndef network():\n    import torchvision\n\n    return torchvision.models.mobilenet_v2(weights=None)\n"


def timed(words: list[str], folder: Path) -> tuple[float, float]:
    """(wall seconds, bytes of the largest resident set) of one fresh process of the command.

    The kernel counts from the fork, so a process that stays smaller than this one has this one's size.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(Path(__file__).parents[1])}
    start = time.perf_counter()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "edgeprune", *words], cwd=folder, env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError((folder / "log").read_text())
    return seconds, used.ru_maxrss * 1024.0


def compress(folder: Path) -> dict[str, Any]:
    """One run: seconds, memory, the seconds of its stages and what is left for imports, reading and the report."""
    (folder / "factory.py").write_text(FACTORY)
    save = "import factory, torch; from safetensors.torch import save_file; torch.manual_seed(0)\n"
    save += "save_file(factory.network().state_dict(), 'mobilenet_v2.safetensors')"
    subprocess.run([sys.executable, "-c", save], cwd=folder, check=True)
    photos(folder / "photos", IMAGES[0], val=IMAGES[1])
    words = "compress mobilenet_v2.safetensors --model factory.py:network --device rpi4 --latency-ms 55 --epochs 0 --data photos --out run"
    seconds, memory = timed([*words.split(), "--input-shape", "1,3,224,224"], folder)
    stages = {name: entry["seconds"] for name, entry in json.loads((folder / "run" / "run.json").read_text())["stages"].items()}
    return {
        "command": f"edgeprune {words}",
        "threads": THREADS,
        "images": IMAGES,
        "wall_s": round(seconds, 1),
        "peak_memory_bytes": memory,
        "stages_s": stages,
        "rest_s": round(seconds - sum(stages.values()), 1),
    }


def rows(found: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    whole = found["compress"]
    stages = sorted(whole["stages_s"].items(), key=lambda item: -item[1])
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages if seconds >= 0.1)
    return [
        "| command | wall, s | limit, s | peak memory, GB | limit, GB | where the time goes, s |",
        "|---|---|---|---|---|---|",
        f"| compress --epochs 0, MobileNetV2 224x224, {whole['threads']} threads | {whole['wall_s']:.1f} | {LIMITS['compress']:.0f} "
        f"| {whole['peak_memory_bytes'] / 1e9:.2f} | {LIMITS['memory'] / 1e9:.0f} "
        f"| {spent}; imports, reading, report {whole['rest_s']:.1f} |",
        *(f"| {name} | {entry['wall_s']:.2f} | {LIMITS['light']} | | | |" for name, entry in found["light"].items()),
    ]


def write_table(found: dict[str, Any]) -> None:
    """Print the table and write whole.md."""
    table = "\n".join(rows(found))
    print(table)
    text = f"# Time and memory of the whole\n\n`python -m benchmarks.whole`\n\n{table}\n"
    (RESULTS / "whole.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Measure, print, write; exit code 1 where a limit is missed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = {" ".join(words): [timed(words, folder)[0] for _ in range(ROUNDS + 1)][1:] for words in LIGHT}
        light = {words: {"wall_s": round(statistics.median(seconds), 3)} for words, seconds in times.items()}
        found: dict[str, Any] = {
            "revision": git_revision(),
            "machine": {"cpu_count": os.cpu_count(), "platform": platform.platform()},
            "limits": LIMITS,
            "compress": compress(folder),
            "light": light,
        }
    (RESULTS / "whole.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    write_table(found)
    whole = found["compress"]
    missed = whole["wall_s"] > LIMITS["compress"] or whole["peak_memory_bytes"] > LIMITS["memory"]
    sys.exit(missed or any(entry["wall_s"] > LIMITS["light"] for entry in light.values()))


if __name__ == "__main__":
    main()
