"""Damaged and hostile files: every reader answers with one of our errors or with a value, and nothing else happens.

A mutation fuzzer with fixed seeds: bits flipped, files cut, blocks overwritten, repeated or taken out, for every kind of file that
edgeprune reads. The quick round runs a few of each in every test run, the slow one forty-five of each (over 500 in all).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import edgeprune as ep
from edgeprune import bench
from edgeprune.cli.runs import report
from edgeprune.data import load_data
from edgeprune.device.card import device
from edgeprune.errors import EdgepruneError
from edgeprune.export import export, load_artifact
from edgeprune.load import load_model
from edgeprune.result import COMMON
from edgeprune.run import Run
from tests.colours import FACTORY, SIDE, colour_net, images, write_npz, write_weights

EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)


@dataclass(frozen=True)
class Kind:
    """A file that edgeprune reads: how a good one is made, and what reads it."""

    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


def write_portable(path: Path) -> None:
    model = colour_net()
    graph = ep.trace(model, EXAMPLE)
    plan = ep.Plan.uniform(graph, keep=0.5)
    ep.save(ep.slim(model, graph, plan), path, plan=plan)


def write_program(path: Path) -> None:
    torch.export.save(torch.export.export(colour_net(), (EXAMPLE,)), path)


@cache
def tflite() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return export(colour_net(), EXAMPLE, Path(folder) / "a.tflite", format="tflite").path.read_bytes()


def write_tflite(path: Path) -> None:
    path.write_bytes(tflite())


def write_card(path: Path) -> None:
    path.write_bytes((Path(__file__).resolve().parents[1] / "devices" / "rpi4.toml").read_bytes())


def write_image(path: Path) -> None:
    Image.fromarray(images(1)[0][0]).resize((32, 32)).save(path)


def read_image(path: Path) -> object:
    """A data folder in which one image is the file."""
    root = path.parent / "folder"
    for n, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(4):
            Image.fromarray(images(8)[0][4 * n + k]).save(root / name / f"{k}.png")
    (root / "a" / "0.png").write_bytes(path.read_bytes())
    return [batch[0].shape for batch in load_data(root, size=(SIDE, SIDE)).train.batches(8)]


def write_manifest(path: Path) -> None:
    with Run.open(path.parent / "run", asked={"a": 1}, command=["x"], resume=False) as run:
        run.record("inputs", {"model": "m"})
    path.write_bytes((path.parent / "run" / "run.json").read_bytes())


def read_manifest(path: Path) -> object:
    (path.parent / "run").mkdir(exist_ok=True)
    (path.parent / "run" / "run.json").write_bytes(path.read_bytes())
    with Run.open(path.parent / "run", asked={"a": 1}, command=["x"], resume=True) as run:
        return run.cached("stage", {}, lambda: 1, write=lambda v: {"v": v}, read=lambda facts: facts["v"])


def write_result(path: Path) -> None:
    figures = [
        {"name": name, "before": {"value": 2.0}, "after": {"value": 1.0}, "basis": "predicted"}
        for name in ("accuracy", "latency", "macs", "params", "size")
    ]
    path.write_text(json.dumps(dict.fromkeys(COMMON) | {"title": "x", "created": "", "budgets": [], "figures": figures, "artifacts": []}))


def read_result(path: Path) -> None:
    """The file beside a good one, as `edgeprune report` puts them together."""
    for name in ("good", "done"):
        (path.parent / name).mkdir(exist_ok=True)
    write_result(path.parent / "good" / "result.json")
    (path.parent / "done" / "result.json").write_bytes(path.read_bytes())
    report([path.parent / "good", path.parent / "done"], path.parent / "good")
    report([path.parent / "done"], path.parent / "done")


KINDS = {
    "state dict": Kind("w.pt", write_weights, lambda p: load_model(p, factory=FACTORY, input_shape=(1, 3, SIDE, SIDE))),
    "slim weights": Kind("s.safetensors", write_portable, lambda p: ep.load(p, model=colour_net())),
    "exported program": Kind("m.pt2", write_program, load_model),
    "arrays": Kind("d.npz", write_npz, lambda p: load_data(p).fingerprint),
    "device card": Kind("rpi4.toml", write_card, lambda p: device(str(p))),
    "artifact": Kind("a.onnx", lambda p: export(colour_net(), EXAMPLE, p), lambda p: load_artifact(p)(EXAMPLE.numpy())),
    "TFLite artifact": Kind("a.tflite", write_tflite, lambda p: load_artifact(p)(EXAMPLE.numpy())),
    "png": Kind("i.png", write_image, read_image),
    "jpeg": Kind("i.jpg", write_image, read_image),
    "manifest": Kind("run.json", write_manifest, read_manifest),
    "result": Kind("result.json", write_result, read_result),
    "baseline": Kind("b.json", lambda p: bench.write(p, {"n": bench.Figures({"macs": 1.0}, ((1.0, 2.0),))}), bench.read),
}


def mutants(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Damaged versions of a file, the same for the same seed."""
    random = np.random.default_rng(seed)
    for number in range(count):
        damaged = bytearray(content)
        at = int(random.integers(len(content)))
        size = int(random.integers(1, max(2, len(content) // 4)))
        match number % 6:
            case 0:
                del damaged[at:]
            case 1:  # headers decide most: half of the flips fall there
                for place in random.integers(min(len(content), 512 if number % 12 == 1 else len(content)), size=4):
                    damaged[place] ^= 1 << int(random.integers(8))
            case 2:
                damaged[at : at + size] = random.bytes(size)
            case 3:
                damaged[at:at] = damaged[at : at + size]
            case 4:
                del damaged[at : at + size]
            case _:
                damaged[at : at + 8] = struct.pack("<q", int(random.integers(-(2**62), 2**62)))
        yield bytes(damaged)


def survives(kind: Kind, folder: Path, count: int, seed: int) -> int:
    """How many of the damaged files were refused; anything but an EdgepruneError comes through."""
    good = folder / kind.file
    kind.make(good)
    kind.read(good)
    content = good.read_bytes()
    before = {p for p in folder.rglob("*") if p != good}
    refused = 0
    for number, damaged in enumerate(mutants(content, count, seed)):
        good.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind.read(good)
        except EdgepruneError as error:
            assert "\n\n" not in str(error) and len(str(error)) < 2000, f"mutant {number}"
            refused += 1
    left = {p for p in folder.rglob("*") if p != good} - before
    expected = {p for p in left if "checkpoints" in p.parts or p.suffix in (".json", ".txt", ".lock", ".html", ".md")}
    assert left == expected
    return refused


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused_or_read(name: str, tmp_path: Path) -> None:
    assert survives(KINDS[name], tmp_path, 6, seed=0) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_hundreds_of_damaged_files(name: str, tmp_path: Path) -> None:
    assert survives(KINDS[name], tmp_path, 48, seed=1) >= 10


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "m.pt2", "d.npz", "s.safetensors"])
def test_no_file_runs_code(name: str, tmp_path: Path) -> None:
    path, target = tmp_path / name, tmp_path / "exploded"
    if name.endswith(".npz"):
        buffer = io.BytesIO()
        np.save(buffer, np.array([Bomb(target)], dtype=object), allow_pickle=True)
        with zipfile.ZipFile(path, "w") as archive:
            for part in ("x_train", "y_train", "x_val", "y_val"):
                archive.writestr(f"{part}.npy", buffer.getvalue())
    elif name.endswith(".pt2"):
        write_program(path)
        with zipfile.ZipFile(path) as archive:
            entries = {n: archive.read(n) for n in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for entry, content in entries.items():
                archive.writestr(entry, pickle.dumps(Bomb(target)) if entry.endswith((".pt", ".pkl")) else content)
    else:
        path.write_bytes(pickle.dumps({"a": Bomb(target)}))
    with pytest.raises(EdgepruneError):
        if name.endswith(".npz"):
            load_data(path)
        else:
            load_model(path, factory=None if name.endswith(".pt2") else FACTORY, input_shape=(1, 3, SIDE, SIDE))
    assert not target.exists()


def test_a_path_in_an_archive_leads_nowhere(tmp_path: Path) -> None:
    write_npz(tmp_path / "d.npz")
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as archive:
        archive.writestr("../outside.npy", b"x")
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "d.npz").rename(inner / "d.npz")
    with contextlib.suppress(EdgepruneError):
        load_data(inner / "d.npz")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["d.npz", "inner"]
