"""Every command of docs/quickstart.md on a small network and small data, in the order of the page; the other pages' options exist."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer.main
from PIL import Image

from edgeprune.cli import app, main
from tests.colours import SIDE, arrays, write_weights

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
COMMANDS = [line for line in re.findall(r"^    (edgeprune .+)$", QUICKSTART, flags=re.MULTILINE) if "--host" not in line]
PACKAGE = """
from tests.colours import ColourNet


def build_network():
    return ColourNet()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page says the reader has."""
    folder = tmp_path_factory.mktemp("reader")
    write_weights(folder / "model.pt")
    (folder / "my_package.py").write_text(PACKAGE)
    (folder / "edgeprune.toml").write_text(
        'model = "my_package:build_network"\ndevice = "rpi4"\nlatency-ms = 30\ndata = "photos/"\nepochs = 0\n'
    )
    found = arrays(train=90, val=30)
    for part in ("train", "val"):
        for number, (image, label) in enumerate(zip(found[f"x_{part}"], found[f"y_{part}"], strict=True)):
            target = folder / "photos" / part / f"class{label}"
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image, np.uint8)).resize((SIDE, SIDE)).save(target / f"{number}.png")
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], int]:
    """One line of the page in that folder; the network takes 8x8 pixels."""

    def typed(line: str) -> int:
        words = shlex.split(line)
        if "model.pt" in words:
            words += ["--input-shape", f"1,3,{SIDE},{SIDE}"]
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "path", [str(place), *sys.path])
        monkeypatch.setattr(sys, "argv", words)
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return typed


def test_the_page_in_order(run: Callable[[str], int], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) > 10
    for line in COMMANDS:
        code = run(line)
        said = capsys.readouterr()
        assert code == 0, f"{line}: {said.err}"
        assert "Traceback" not in said.err
    assert (place / "runs" / "int8" / "model.onnx").is_file() and (place / "exported").is_dir()
    assert len(list((place / "runs" / "several").glob("*/model.onnx"))) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_options_on_every_page_exist(page: Path) -> None:
    group = typer.main.get_group(app)
    for line in re.findall(r"(?:^    |`)(edgeprune [^`\n#]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        words = line.split()
        command = group.commands[words[1]]
        if words[1] == "device":
            command = command.commands[words[2]]  # type: ignore[attr-defined]  # a group of commands
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        assert {w for w in words if w.startswith("--")} <= options, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
