"""The regression gate as a command."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli.options import AsJson
from edgeprune.errors import GateError, UsageError
from edgeprune.terminal import print_json, print_table, progress_bars, say


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME…", help="reference networks: digits, residual, mobile (default: all)")
    ] = None,
    baseline: Annotated[Path | None, typer.Option(help="compare with the figures an earlier --out wrote")] = None,
    against: Annotated[str | None, typer.Option(help="compare with another git revision, both measured in alternation")] = None,
    max_regression: Annotated[float, typer.Option(help="percent a figure may be worse before this ends with 1", min=0)] = 10.0,
    latency: Annotated[bool, typer.Option(help="measure latency on this machine")] = True,
    instructions: Annotated[
        bool, typer.Option(help="count the ARM instructions of one inference, where `make test-board` has built its emulated board")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="write the figures, to be a baseline")] = None,
    artifacts: Annotated[Path | None, typer.Option(help="keep the artifacts in this folder")] = None,
    as_json: AsJson = False,
) -> None:
    """Figures of fixed reference networks, and a regression gate.

    With --baseline or --against, the exit code is 1 where something got worse, and what did is named with both figures.
    """
    if baseline and against:
        raise UsageError("--baseline and --against are two ways to compare: give one of them.")
    from edgeprune import bench as gate
    from edgeprune.device.emulated import TOLERANCE

    before = gate.read(baseline) if baseline else None
    with progress_bars() as progress:
        if against:
            figures, theirs = gate.beside(against, names or (), instructions=instructions, progress=progress)
            found = gate.changes(figures, theirs, paired=True)
        else:
            with nullcontext(artifacts) if artifacts else tempfile.TemporaryDirectory() as folder:
                figures = gate.run(names or (), Path(folder), latency=latency, instructions=instructions, progress=progress)
            here = gate.machine()
            same, alike = (before is not None and before[1].get(key) == here[key] for key in ("cpu", "emulated"))
            found = gate.changes(figures, before[0], same_machine=same, same_board=alike) if before else ()
    if before and not same:
        say("the baseline is from another kind of machine: latency is not compared.")
    if before and not alike and any(f.instructions for f in figures.values()):
        say(f"the baseline counted instructions of {before[1].get('emulated') or 'nothing'}, here it is {here['emulated']}: not compared.")
    if out:
        gate.write(out, figures)
    worse = gate.regressions(found, max_regression)
    if as_json:
        print_json(gate.words(figures, found, worse))
    else:
        rows: list[list[object]] = [
            [name, figure, gate.digits_of(value)] for name, f in figures.items() for figure, value in f.exact.items()
        ]
        rows += [
            [name, f"{gate.INSTRUCTIONS} on {cpu}", gate.digits_of(count)]
            for name, f in figures.items()
            for cpu, count in f.instructions.items()
        ]
        print_table(["network", "figure", "value"], rows)
        for reason in {f.not_counted for f in figures.values() if not f.instructions}:
            typer.echo(f"{gate.INSTRUCTIONS}: null ({reason})")
        for change in found:
            typer.echo(change.words())
    if worse:
        limits = f"{max_regression:g}% (ARM instructions: {100 * TOLERANCE:g}%)"
        raise GateError(f"worse by more than {limits}: " + "; ".join(change.words() for change in worse) + ".")
