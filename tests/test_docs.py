"""Every command of docs/quickstart.md on a small network and small data, in the order of the page; the other pages' options exist."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

import edgeprune as ep
from edgeprune.cli import app, main
from tests.colours import SIDE, arrays, write_weights

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
INDENTED = [textwrap.dedent(block).strip() for block in re.findall(r"(?:^(?:    .*)?\n)+", QUICKSTART, flags=re.MULTILINE) if block.strip()]
COMMANDS = [line for block in INDENTED for line in block.splitlines() if line.startswith("edgeprune ") and "--host" not in line]
PYTHON = [block for block in INDENTED if block.startswith("import ")]
WITH_TIMM = [block for block in PYTHON if "timm" in block]
PACKAGE = """
import torch
from tests.colours import colour_net, images


def build_network():
    return colour_net()


x, y = images(96)
x = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
train_loader = [(x[n : n + 16], torch.from_numpy(y)[n : n + 16]) for n in range(0, 96, 16)]
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
    for block in (b for b in PYTHON if b not in WITH_TIMM):
        ran(block)
    assert (place / "trained.safetensors").is_file()
    assert (place / "runs" / "int8" / "model.onnx").is_file() and (place / "exported").is_dir()
    assert len(list((place / "runs" / "several").glob("*/model.onnx"))) == 2


def ran(block: str) -> dict[str, Any]:
    """The names that a piece of Python leaves, with the network it ends with, if any, at most half of the dense one and really trained."""
    names: dict[str, Any] = {}
    exec(compile(block, "quickstart.md", "exec"), names)
    if "graph" in names:
        example = names["images"][:1]
        assert ep.trace(names["model"], example).macs <= 0.5 * names["graph"].macs
        assert all(p.grad is not None and p.grad.isfinite().all() for p in names["model"].parameters())
    return names


def test_python_of_the_page_is_all_there() -> None:
    assert len(PYTHON) == 4 and len(WITH_TIMM) == 1
    assert max(len(block.partition("\n\n")[2].splitlines()) for block in PYTHON) < 18


def test_the_plain_loop_trains(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    names = ran(next(block for block in PYTHON if "torch.optim" in block))
    before = ep.slim(names["build_network"](), names["graph"], names["plan"]).train()
    images, labels = (torch.cat(parts) for parts in zip(*names["train_loader"], strict=True))
    with torch.no_grad():
        losses = [float(torch.nn.functional.cross_entropy(model(images), labels)) for model in (before, names["model"])]
    assert losses[1] < 0.9 * losses[0]


def test_timm_trains_it(place: Path, torchvision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    names = ran(WITH_TIMM[0])
    averaged = names["average"].module.state_dict()
    assert {k: v.shape for k, v in averaged.items()} == {k: v.shape for k, v in names["model"].state_dict().items()}
    assert type(names["model"]).__name__ == "MobileNetV3"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_options_on_every_page_exist(page: Path) -> None:
    group: Any = typer.main.get_command(app)  # with the options for completion
    for line in re.findall(r"(?:^    |`)(edgeprune [^`\n#]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        words = line.split()
        command = group if words[1].startswith("--") else group.commands[words[1]]
        if words[1] == "device":
            command = command.commands[words[2]]
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        assert {w for w in words if w.startswith("--")} <= options, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
