"""The commands as a user meets them, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgeprune.cli import main
from tests.colours import FACTORY, write_npz, write_weights

NET = ["net.pt", "--model", FACTORY]
QUICK = [*NET, "--data", "data.npz", "--device", "rpi4", "--epochs", "0"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one paragraph of an error: what comes after the lines of progress."""
        assert "Traceback" not in self.err
        lines = self.err.strip().splitlines()
        begin = max(n for n, line in enumerate(lines) if line.startswith("edgeprune: "))
        assert not any(line.startswith(" ") for line in lines[begin:])
        assert max(map(len, lines[begin:])) < 200
        return " ".join(lines[begin:])


Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.pt and data.npz."""
    folder = tmp_path_factory.mktemp("inputs")
    write_weights(folder / "net.pt")
    write_npz(folder / "data.npz")
    return folder


@pytest.fixture
def here(tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory with the inputs in it."""
    for file in inputs.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def edgeprune(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command, in this process (which has torch already)."""

    def run(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["edgeprune", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        return Outcome(int(end.value.code or 0), out, err)

    return run


def nothing_new(here: Path, *allowed: str) -> bool:
    left = {p.name for p in here.iterdir()} - {"net.pt", "data.npz", "__pycache__", *allowed}
    assert not left, left
    return True
