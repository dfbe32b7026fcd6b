"""Builds what people install, installs it where nothing is, with and without each extra, and runs the demo there.

    python -m benchmarks.packages build            # sdist, and the wheel from the unpacked sdist
    python -m benchmarks.packages core             # an empty environment: torch and the wheel; what each extra would add is named
    python -m benchmarks.packages ssh cluster tflite
    python -m benchmarks.packages dev              # what it installs is resolved, not installed: it holds the other extras
    python -m benchmarks.packages demo             # `edgeprune demo` in the core environment

Without words: all of it, in this order. Dependencies come from the registry, at the versions of .ci/constraints.txt. An extra's environment
is an empty one that sees the core's packages. In each, `pip check` must be content and a command that needs the extra must run into what
comes behind it (no board, no cluster; TFLite really writes a file); in the core it must name the extra. All commands run outside the
repository, with Python's isolated mode where Python is called directly. Environments stay in --folder, so that parts can be run one by
one. Writes packages.json and .md into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.revision import git_revision
from edgeprune.run import hash_file, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
TORCH = "torch==2.13.0"
INPUTS = """
import numpy as np, torch, net
torch.save(net.net().state_dict(), "net.pt")
x, y = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8), np.arange(60) % 3
np.savez("data.npz", x_train=x[:40], y_train=y[:40], x_val=x[40:], y_val=y[40:])
"""
NET = """
from torch import nn


def net():
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
"""


@dataclass(frozen=True)
class Extra:
    """A command that needs the extra, and what it says with it."""

    command: str
    answer: str


EXTRAS = {
    "ssh": Extra("device check rpi4 --host nobody@127.0.0.1:1", "no connection to"),
    "cluster": Extra(
        "compress net.pt --model net.py:net --device rpi4 --macs 0.7 --data data.npz --epochs 0 --allocate layer_compensated "
        "--cluster dask://127.0.0.1:1 --out clustered",
        "no Dask scheduler answers",
    ),
    "tflite": Extra("export net.pt --model net.py:net --input-shape 1,3,16,16 --format tflite --out exported", "model.tflite"),
}


def said(command: list[str | Path], folder: Path, *, code: int | None = 0) -> str:
    """What a command prints, outside the repository and with none of it in its environment. Raises RuntimeError for another exit code."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "EDGEPRUNE_DATA")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if "Traceback" in text or (code is not None and done.returncode != code):
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{text}")
    return text


def built(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is made from it, in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    (sdist,) = folder.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as unpacked, tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
        (source,) = Path(unpacked).iterdir()
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=source, check=True, capture_output=True
        )
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


class Place:
    """The folder of archives and environments, and what was found."""

    def __init__(self, folder: Path, found: dict[str, Any]) -> None:
        self.folder = folder
        self.found = found

    @property
    def wheel(self) -> Path:
        """The one that was built."""
        (wheel,) = (self.folder / "dist").glob("*.whl")
        return wheel

    def program(self, environment: str, name: str) -> Path:
        """A program of an environment."""
        return self.folder / environment / "bin" / name

    def build(self) -> dict[str, Any]:
        """Sizes and numbers of files."""
        sdist, wheel = built(self.folder / "dist")
        with tarfile.open(sdist) as archive, zipfile.ZipFile(wheel) as zipped:
            files = {sdist: len(archive.getnames()), wheel: len(zipped.namelist())}
        return {path.name: {"bytes": path.stat().st_size, "files": count} for path, count in files.items()}

    def core(self) -> dict[str, Any]:
        """The wheel and its dependencies; every extra is named by the command that lacks it."""
        entry = self._installed("core", [TORCH], [str(self.wheel)])
        where = said([self.program("core", "python"), "-I", "-c", "import edgeprune; print(edgeprune.__file__)"], self.folder).strip()
        if not Path(where).is_relative_to(self.folder / "core"):
            raise RuntimeError(f"edgeprune is imported from {where}")
        for name, extra in EXTRAS.items():
            text = self._tried("core", extra)
            if f"pip install 'edgeprune[{name}]'" not in text:
                raise RuntimeError(f"without {name}: {text}")
        return entry | {"names_what_is_missing": list(EXTRAS)}

    def extra(self, name: str) -> dict[str, Any]:
        """The same with one extra, on top of the core's packages."""
        entry = self._installed(name, [f"{self.wheel}[{name}]"], on_core=True)
        wanted = EXTRAS[name]
        text = self._tried(name, wanted)
        if wanted.answer not in text:
            raise RuntimeError(f"with {name}: {text}")
        return entry | {"answers": wanted.answer}

    def dev(self) -> dict[str, Any]:
        """What pip would install for development."""
        report = self.folder / "dev.json"
        wanted = [TORCH, f"{self.wheel}[dev]"]
        self._pip("core", ["--dry-run", "--ignore-installed", "--report", str(report), *wanted])
        names = [entry["metadata"]["name"] for entry in json.loads(report.read_text())["install"]]
        return {"resolved": len(names), "installed": False}

    def demo(self) -> dict[str, Any]:
        """The demo from the wheel."""
        out = self.folder / "demo"
        shutil.rmtree(out, ignore_errors=True)
        start = time.monotonic()
        text = said([self.program("core", "edgeprune"), "demo", "--out", out], self.folder)
        made = sorted(p.relative_to(out).as_posix() for p in out.glob("*/model.onnx"))
        if not made or not list(out.glob("*/report.html")):
            raise RuntimeError(f"the demo wrote {made}: {text}")
        return {"seconds": round(time.monotonic() - start, 1), "artifacts": made}

    def _tried(self, environment: str, extra: Extra) -> str:
        """What the command says in this environment, on one line; in a fresh folder with a network and data."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            (folder / "net.py").write_text(NET)
            said([self.program("core", "python"), "-c", f"import sys; sys.path.insert(0, '.'){INPUTS}"], folder)
            return " ".join(said([self.program(environment, "edgeprune"), *extra.command.split()], folder, code=None).split())

    def _installed(self, name: str, *steps: list[str], on_core: bool = False) -> dict[str, Any]:
        """How many packages, in how many seconds; an environment that is there for this very wheel is taken as it is."""
        start, note = time.monotonic(), self.folder / name / "installed.json"
        if note.exists() and (before := json.loads(note.read_text()))["wheel"] == hash_file(self.wheel):
            return {key: before[key] for key in ("packages", "seconds")}
        shutil.rmtree(self.folder / name, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(self.folder / name)], check=True)
        if on_core:
            (packages,) = (self.folder / "core" / "lib").glob("python*/site-packages")
            (own,) = (self.folder / name / "lib").glob("python*/site-packages")
            (own / "core.pth").write_text(f"{packages}\n")
            steps = (["--no-deps", "--force-reinstall", str(self.wheel)], *steps)  # its own command, not the core's
        for step in steps:
            self._pip(name, step)
        said([self.program(name, "python"), "-m", "pip", "check"], self.folder)
        listed = json.loads(
            said([self.program(name, "python"), "-m", "pip", "list", "--format", "json", "--local"], self.folder).splitlines()[0]
        )
        entry = {"packages": len(listed), "seconds": round(time.monotonic() - start, 1)}
        write_json(note, entry | {"wheel": hash_file(self.wheel)})
        return entry

    def _pip(self, environment: str, words: list[str]) -> None:
        pip: list[str | Path] = [self.program(environment, "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        said([*pip, "--constraint", ROOT / ".ci" / "constraints.txt", *words], self.folder)


def table(found: dict[str, Any]) -> str:
    """One row per environment."""
    rows = ["| environment | packages | what was tried |", "|---|---|---|"]
    if core := found.get("core"):
        demo = f", `edgeprune demo` outside the repository ({found['demo']['seconds']:.0f} s)" if "demo" in found else ""
        rows.append(f"| the wheel alone | {core['packages']} | pip check, each missing extra is named{demo} |")
    for name in EXTRAS:
        if entry := found.get(name):
            rows.append(f'| with [{name}] | {entry["packages"]} more | pip check, a command that needs it: "{entry["answers"]}" |')
    if dev := found.get("dev"):
        rows.append(f"| with [dev] | {dev['resolved']} in all | resolved, not installed |")
    return "\n".join(rows)


def main() -> None:
    """Do what was asked for, print it, write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("build", "core", *EXTRAS, "dev", "demo")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-packages")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "packages.json"
    place = Place(asked.folder.resolve(), json.loads(file.read_text()) if file.exists() else {})
    for name in asked.parts or parts:
        step: Callable[[], dict[str, Any]] = partial(place.extra, name) if name in EXTRAS else getattr(place, name)
        place.found[name] = step() | {"revision": git_revision()}
        print(json.dumps({name: place.found[name]}), flush=True)
        write_json(file, place.found)
        text = f"# Installed where nothing was\n\n`python -m benchmarks.packages`\n\n{table(place.found)}\n"
        (RESULTS / "packages.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
