"""Commands on finished runs, from their folders alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.errors import UsageError


def report(folder: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write report.html and report.md of a finished run again."""
    from edgeprune.report import write

    typer.echo(write(_facts_of(folder), folder)[0])


def _facts_of(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"damaged: {error}"
        raise UsageError(f"{folder} holds no finished run (result.json: {reason}): give the folder that compress printed.") from error
    return facts
