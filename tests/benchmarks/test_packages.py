"""What is built for others to install; installing it takes minutes and a registry: `make package`."""

from __future__ import annotations

import re
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from benchmarks.packages import EXTRAS, ROOT, built, said, table


def test_every_extra_is_tried() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert EXTRAS.keys() == extras.keys() - {"dev"}
    assert set(re.findall(r"edgeprune\[([\w,]+)\]", extras["dev"][0])[0].split(",")) == EXTRAS.keys()


def test_commands_run_outside_the_repository(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ.get('PYTHONPATH'), os.getcwd(), '' in sys.path)"
    assert said([sys.executable, "-c", code], tmp_path).split() == ["None", str(tmp_path.resolve()), "False"]
    with pytest.raises(RuntimeError, match="ended with 3"):
        said([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)
    with pytest.raises(RuntimeError, match="Traceback"):
        said([sys.executable, "-c", "1 / 0"], tmp_path, code=None)


def test_the_table_tells_what_was_only_resolved() -> None:
    found = {"core": {"packages": 60}, "ssh": {"packages": 3, "answers": "no connection to"}, "dev": {"resolved": 130}}
    assert [row.split(" | ")[1] for row in table(found).splitlines()[2:]] == ["60", "3 more", "130 in all"]
    assert "resolved, not installed" in table(found)


@pytest.mark.slow
def test_the_sdist_is_all_that_is_needed(tmp_path: Path) -> None:
    """The wheel made from it holds the package and the cards; the tests, the pages and the licence travel with it."""
    sdist, wheel = built(tmp_path)
    with tarfile.open(sdist) as archive, zipfile.ZipFile(wheel) as zipped:
        travelling = {name.partition("/")[2] for name in archive.getnames()}
        installed = set(zipped.namelist())
    wanted = {"LICENSE", "README.md", "Makefile", "pyproject.toml", "tests/conftest.py", "docs/quickstart.md", "benchmarks/packages.py"}
    assert wanted <= travelling
    assert not [name for name in travelling if "__pycache__" in name or name.endswith(".pyc")]
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "edgeprune").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert package | {f"edgeprune/devices/{p.name}" for p in (ROOT / "devices").glob("*.toml")} <= installed
    assert any(name.endswith("/licenses/LICENSE") for name in installed)
    assert not [name for name in installed if name.startswith(("tests", "benchmarks"))]
