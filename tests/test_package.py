"""What an installation offers: its public names, and the files that are not code."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

import edgeprune as ep

ROOT = Path(__file__).parents[1]
VERBS = ["allocate", "device", "export", "load"]  # sub-packages or modules of the same name exist


@pytest.mark.parametrize("name", ep.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(ep, name)
    assert callable(value)
    assert value.__doc__
    assert value.__module__.startswith("edgeprune.")
    assert value.__name__ == name


def test_the_names_of_the_contract_are_there() -> None:
    contract = "trace score allocate slim mask save load device devices predict measure compress export evaluate Budget Plan Scores Recipe"
    assert set(contract.split()) <= set(ep.__all__)


def test_type_checkers_and_python_see_the_same_names() -> None:
    import ast

    tree = ast.parse((ROOT / "edgeprune" / "__init__.py").read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If)]
    declared = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert declared == {name: f"edgeprune.{home}" for name, home in ep._HOMES.items()}


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nothing_like_it"):
        ep.nothing_like_it  # noqa: B018


@pytest.mark.parametrize("name", VERBS)
def test_verbs_stay_verbs_after_their_packages_are_imported(name: str) -> None:
    module = importlib.import_module(f"edgeprune.{name}")
    assert isinstance(module, types.ModuleType)
    assert isinstance(getattr(ep, name), types.FunctionType)


def test_verbs_are_verbs_whatever_comes_first(tmp_path: Path) -> None:
    """In a fresh process: import the sub-package before the verb was ever used."""
    imports = "".join(f"import edgeprune.{name}\n" for name in VERBS)
    code = f"{imports}import edgeprune as ep, types\nfor n in {VERBS!r}:\n    assert isinstance(getattr(ep, n), types.FunctionType), n\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light() -> None:
    code = "import sys, edgeprune; assert not {'torch', 'numpy', 'onnx'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_the_wheel_holds_cards_and_templates(tmp_path: Path) -> None:
    """Unpacked elsewhere, it finds its boards without the repository."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("edgeprune-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "edgeprune").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    cards = {f"edgeprune/devices/{p.name}" for p in (ROOT / "devices").glob("*.toml")}
    assert package | cards <= names
    assert {"edgeprune/report/report.html.j2", "edgeprune/devices/rpi4.toml"} <= names
    assert not [n for n in names if n.startswith(("tests", "benchmarks"))]
    code = "import sys; sys.path.insert(0, 'site'); import edgeprune as ep; print(ep.__file__, ep.device('rpi4').profile)"
    found = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found.split() == [str(tmp_path / "site" / "edgeprune" / "__init__.py"), "rpi4-ort"] or found.startswith("site/")


def test_every_dependency_is_listed_with_its_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(name for names in project["optional-dependencies"].values() for name in names)]
    names = {re.match(r"[\w-]+", name)[0] for name in asked} - {"edgeprune"}  # type: ignore[index]
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    listed = {name for row in re.findall(r"^\| ([\w, -]+) \|", page, flags=re.MULTILINE) for name in row.split(", ")} - {"package"}
    assert listed == names


def test_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "docs" / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version}\n" in (ROOT / "docs" / "changes.md").read_text(encoding="utf-8")
