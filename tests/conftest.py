"""Fixtures that all tests share."""

from __future__ import annotations

import os
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
os.environ["XDG_CONFIG_HOME"] = str(ROOT / "tests" / "no such folder")  # a calibrated card of the user's would replace a shipped one
for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):  # rich would take the files that tests write for terminals
    os.environ.pop(name, None)
torch.set_num_threads(1)  # the networks are tiny: threads would only wait for each other


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets and peers' tables (EDGEPRUNE_DATA, ../shared/data by default); skips where absent."""
    path = Path(os.environ.get("EDGEPRUNE_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data folder at {path}: set EDGEPRUNE_DATA")
    return path


@pytest.fixture(scope="session")
def torchvision(data_dir: Path) -> Any:
    """torchvision; its CPU shim first, where the wheel was built for another torch."""
    shim = data_dir / "peers" / "torchvision_cpu_shim.py"
    if not shim.is_file():
        pytest.skip(f"no {shim.name} in {shim.parent}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(shim))
        return pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def _same_randomness() -> Iterator[None]:
    """Every test starts from the same seed and leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
