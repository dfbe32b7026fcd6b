"""A folder is a registry: every file in it is one way to do a thing, found by name, described without importing it.

The listing reads the file's docstring and its upper-case constants as text, so that `edgeprune criteria` needs no torch. Files of
other packages join through an entry point group with modules of the same form.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeprune.errors import UsageError

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One registered file: its name, first docstring line, and constants such as NEEDS and PAPER."""

    name: str
    module: str
    summary: str
    constants: dict[str, Any]


def entries(folder: str) -> tuple[Entry, ...]:
    """What `edgeprune/<folder>` and the entry points `edgeprune.<group>` offer, by name.

    The group of folder criteria is edgeprune.criteria, of allocate edgeprune.allocators.
    """
    found = []
    for path in sorted((PACKAGE / folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name) and target.id in ("NEEDS", "PAPER")
        }
        if "NEEDS" in constants:
            summary = (ast.get_docstring(tree) or "").partition("\n")[0]
            found.append(Entry(path.stem.rstrip("_"), f"edgeprune.{folder}.{path.stem}", summary, constants))
    group = {"criteria": "edgeprune.criteria", "allocate": "edgeprune.allocators"}[folder]
    for point in entry_points(group=group):
        found.append(Entry(point.name, point.value.partition(":")[0], f"from {point.dist.name if point.dist else point.value}", {}))
    return tuple(found)


def find(folder: str, name: str, kind: str) -> ModuleType:
    """The module registered under `name`. Raises UsageError with near matches."""
    known = {e.name: e for e in entries(folder)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"there is no {kind} named {name!r}.{hint} There are: {', '.join(sorted(known))}.")
    return importlib.import_module(known[name].module)
