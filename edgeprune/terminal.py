"""What commands print: JSON and tables on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from edgeprune.train import Progress

_FIGURE = re.compile(r"[-+]?[\d,.]*\d( ?[kMG%])?$|-$|$")


@contextmanager
def quiet_unless_first() -> Iterator[None]:
    """Of the processes that `accelerate launch` starts only the first one talks; the others complain to stderr if they must."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def say(text: str) -> None:
    """One line on stderr, from the first process."""
    if os.environ.get("RANK", "0") != "0":
        return
    typer.echo(f"edgeprune: {text}", err=True)


def complain(text: str) -> None:
    """An error as one paragraph on stderr."""
    words = " ".join(f"edgeprune: {text}".split())
    typer.echo(textwrap.fill(words, width=110, break_long_words=False, break_on_hyphens=False), err=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, indent=2, default=str))


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns under their names, figures to the right: folded to fit a terminal, whole lines where something else reads them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, show_header=any(head))
    for number, name in enumerate(head):
        figures = all(_FIGURE.match(str(row[number])) for row in rows) and bool(rows)
        table.add_column(name, justify="right" if figures else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 100_000
    with console.capture() as printed:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars with the time left, on stderr; a line for every new task where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(file=sys.stderr)
    first = os.environ.get("RANK", "0") == "0"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, disable=not (first and console.is_terminal)) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                # What a resumed task had done before counts as done, but not as speed.
                tasks[what] = bars.add_task(what, total=total, completed=done)
                if not console.is_terminal:
                    say(f"{what} …")
            bars.update(tasks[what], completed=done, total=total)

        yield progress
