"""Commands on finished runs, from their folders alone."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.errors import UsageError


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN…", help="a run folder; of several a comparison is written")],
    out: Annotated[Path, typer.Option("--out", help="folder of the comparison")] = Path("runs/comparison"),
) -> None:
    """The report of a finished run again, or one of several runs.

    Writes report.html and report.md; of several runs, a comparison.
    """
    from jinja2 import TemplateError

    from edgeprune.report import write

    named = ", ".join(map(str, folders))
    try:
        if len(folders) == 1:
            pages = write(_facts_of(folders[0]), folders[0])
        else:
            pages = write(_compared([part for folder in folders for part in _parts(folder)], out), out)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration, TemplateError) as error:
        raise UsageError(
            f"result.json in {named} does not hold what compress writes there ({type(error).__name__}: {error}): "
            "take it from a copy, or let compress --resume write it again."
        ) from error
    typer.echo(pages[0])


def _parts(folder: Path) -> list[Path]:
    """The runs of a folder: itself, or one for each of its budgets."""
    return [folder / point["folder"] for point in _facts_of(folder).get("points") or []] or [folder]


def _compared(folders: list[Path], out: Path) -> dict[str, Any]:
    from edgeprune.result import comparison

    runs = {Path(os.path.relpath(folder, out)).as_posix(): _facts_of(folder) for folder in folders}
    if len(runs) < 2:
        raise UsageError(f"{folders[0]} is the only run given: name another one to compare it with.")
    command = shlex.join(["edgeprune", "report", *map(str, folders), "--out", str(out)])
    created = max(run["created"] for run in runs.values())
    return comparison(runs, title=f"{len(runs)} runs", created=created, command=command)


def _facts_of(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"damaged: {error}"
        raise UsageError(f"{folder} holds no finished run (result.json: {reason}): give the folder that compress printed.") from error
    return facts
