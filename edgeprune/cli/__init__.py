"""The commands, and nothing else: options in, one api call, words out; here they are gathered in the order of --help.

Exit codes: 0 done; 1 a gate failed, or disk or memory ran out; 2 usage; 3 no plan meets the budget; 4 device or connection; 5 export or
parity; 6 model or data; 130 interrupted. Errors are one paragraph on stderr; a traceback means a bug. With --json, stdout holds one
JSON object.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path

import typer

from edgeprune.cli import artifacts, bench, board, compress, look, runs
from edgeprune.errors import EdgepruneError, out_of_memory
from edgeprune.run import disk_is_full, write_error
from edgeprune.terminal import complain, quiet_unless_first

app = typer.Typer(
    name="edgeprune",
    help="Compress trained CNNs for small boards: a smaller network that meets the budget, ready to deploy, with the evidence.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
devices_app = typer.Typer(help="Boards and their profiles.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(devices_app, name="device")
for command in (
    compress.compress,
    compress.demo,
    look.inspect,
    board.profile,
    artifacts.export,
    artifacts.evaluate,
    artifacts.verify,
    runs.report,
    bench.bench,
    look.criteria,
    look.allocators,
):
    app.command()(command)
devices_app.command("list")(board.list_)
devices_app.command("show")(board.show)
devices_app.command("calibrate")(board.calibrate)
devices_app.command("check")(board.check)


MEMORY_RAN_OUT = (
    "memory ran out ({}): allow the process more, or need less with a smaller --batch-size or --input-shape or fewer --jobs. A run that "
    "had begun goes on with --resume."
)


def main() -> None:
    """The command `edgeprune`: every error of ours, and memory that ran out, becomes one paragraph and its exit code."""
    gc.set_threshold(100_000, 50, 100)  # what torch and a network's library import stays: by default it is looked through dozens of times
    try:
        with quiet_unless_first():
            app(prog_name="edgeprune")
        return
    except (EdgepruneError, MemoryError, RuntimeError, OSError, ImportError) as error:
        short = out_of_memory(error)
        if isinstance(error, OSError) and disk_is_full(error):  # of the temporary files, say
            error = write_error(error, Path(error.filename or tempfile.gettempdir()))
        if not short and not isinstance(error, EdgepruneError):
            raise
        text, code = str(error), EdgepruneError.exit_code if short else getattr(error, "exit_code", 1)
        first = (text.strip().splitlines() or ["Python had none left"])[0][:200]
    complain(MEMORY_RAN_OUT.format(first) if short else text)  # behind the handler: what the failed step held is free again
    sys.exit(code)
