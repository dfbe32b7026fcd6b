"""Damaged and hostile files: every reader answers with one of our errors or with a value, and nothing else happens (hostile.py).

The quick round damages a few files of each kind in every test run, the slow one forty of each (over 500 in all).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeprune.data import load_data
from edgeprune.errors import EdgepruneError
from edgeprune.load import load_model
from tests.colours import FACTORY, SIDE, write_npz
from tests.hostile import KINDS, mutants, survey, watched, write_program


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused_or_read(name: str, tmp_path: Path) -> None:
    assert survey(KINDS[name], tmp_path, 8, seed=0).refused >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_hundreds_of_damaged_files(name: str, tmp_path: Path) -> None:
    assert survey(KINDS[name], tmp_path, 40, seed=1).refused >= 8


DEEDS: dict[str, Callable[[Path], object]] = {
    "a file outside": lambda folder: (folder.parent / "outside").write_text("x"),
    "a folder outside": lambda folder: (folder.parent / "outside").mkdir(),
    "moved outside": lambda folder: (folder / "mine").rename(folder.parent / "outside"),
    "a process": lambda folder: subprocess.run(["true"], check=True),
    "unpickled": lambda folder: pickle.loads(pickle.dumps(os.getcwd)),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_the_watch_sees(deed: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with watched(folder) as seen:
        (folder / "mine").write_text("x")
        list(folder.iterdir())
    assert seen == []
    with watched(folder) as seen:
        DEEDS[deed](folder)
    assert len(seen) == 1


def test_mutants_are_many_and_the_same_again() -> None:
    content = json.dumps({"a": [1, {"b": "y"}], "c": 2.0}).encode()
    found = list(mutants(content, 40, seed=3))
    assert found == list(mutants(content, 40, seed=3)) != list(mutants(content, 40, seed=4))
    assert content not in found and len(set(found)) > 25


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
