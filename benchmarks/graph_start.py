"""How long `edgeprune inspect` of a ResNet-50 takes, the start of Python and all imports in it, beside those imports alone.

    python -m benchmarks.graph_start

Seconds of the wall clock and of the processor for fresh processes on one thread, medians of ROUNDS rounds in turns. What cannot be faster
than its imports: torch for any network, torchvision (which imports torch's compiler) for one of its own, torch.export for a .pt2 file.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.graph import DATA, RESULTS
from benchmarks.networks import resnet50

ROUNDS = 5
SHIM = f"import sys; sys.path.insert(0, {str(DATA / 'peers')!r}); import torchvision_cpu_shim"
LIBRARY = f"{SHIM}\n\ndef resnet50():\n    import torchvision\n\n    return torchvision.models.resnet50(weights=None)\n"


def commands(folder: Path) -> dict[str, list[str]]:
    """What is timed, by name; the files it needs are written into `folder`."""
    own, library, program = folder / "own.safetensors", folder / "library.safetensors", folder / "program.pt2"
    (folder / "library.py").write_text(LIBRARY)
    save_file(resnet50().state_dict(), own)
    save = f"import library; from safetensors.torch import save_file; save_file(library.resnet50().state_dict(), {str(library)!r})"
    subprocess.run([sys.executable, "-c", save], cwd=folder, check=True)
    torch.export.save(torch.export.export(resnet50().eval(), (torch.zeros(1, 3, 224, 224),)), program)
    inspect = ["-m", "edgeprune", "inspect"]
    return {
        "inspect, own class": [*inspect, str(own), "--model", "benchmarks.networks:resnet50"],
        "import torch": ["-c", "import torch"],
        "inspect, torchvision": [*inspect, str(library), "--model", f"{folder / 'library.py'}:resnet50"],
        "import torch and torchvision": ["-c", f"{SHIM}; import torchvision"],
        "inspect, .pt2": [*inspect, str(program)],
        "torch.export.load of it": ["-c", f"import torch; torch.export.load({str(program)!r})"],
    }


def timed(command: list[str]) -> tuple[float, float]:
    """(wall, processor) seconds of one fresh process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure in turns, print, and write benchmarks/results/graph_start.json and .md."""
    with tempfile.TemporaryDirectory() as folder:
        asked = commands(Path(folder))
        rounds = [{name: timed(command) for name, command in asked.items()} for _ in range(ROUNDS + 1)][1:]
    medians = {name: [round(statistics.median(r[name][part] for r in rounds), 2) for part in (0, 1)] for name in asked}
    lines = ["| what | wall, s | processor, s |", "|---|---|---|", *(f"| {n} | {w:.2f} | {c:.2f} |" for n, (w, c) in medians.items())]
    table = "\n".join(lines)
    print(table)
    (RESULTS / "graph_start.json").write_text(json.dumps({"rounds": ROUNDS, "seconds": medians}, indent=2) + "\n", encoding="utf-8")
    text = f"# From the start of the command to its last line: inspect of a ResNet-50\n\n`python -m benchmarks.graph_start`\n\n{table}\n"
    (RESULTS / "graph_start.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
