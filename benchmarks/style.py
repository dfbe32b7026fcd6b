"""The shape of the code in one row: sizes, nesting, comments, annotations, tests (`make style`); tests/test_shape.py sets limits."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)
SPACE = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class File:
    """What one file counts: lines by kind, code lines and nesting of each function, functions with all annotations."""

    lines: int
    code: int
    comments: int
    docstrings: int
    functions: tuple[tuple[int, int], ...]
    typed: int


def read(path: Path) -> File:
    """The counts of a Python file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    said = {line for node in ast.walk(tree) for line in _docstring(node)}
    code = {n for t in tokens if t.type not in SPACE for n in range(t.start[0], t.end[0] + 1)} - said
    functions = [n for n in ast.walk(tree) if isinstance(n, Function)]
    return File(
        len(text.splitlines()), len(code), sum(t.type == tokenize.COMMENT for t in tokens), len(said),
        tuple((sum(f.lineno <= n <= (f.end_lineno or 0) for n in code), _nesting(f)) for f in functions), sum(map(_typed, functions)),
    )  # fmt: skip


def row(package: Sequence[File], tests: Sequence[File]) -> str:
    """One line of a Markdown table."""
    code, comments, docstrings = (sum(getattr(f, name) for f in package) for name in ("code", "comments", "docstrings"))
    functions = [f for file in package for f in file.functions]
    lengths, nestings, said = [n for n, _ in functions], [d for _, d in functions], code + comments + docstrings
    long = sum(n > 50 for n in lengths) / len(lengths)
    cells = (
        len(package), f"{code:,}", _spread([f.lines for f in package]), _spread(lengths), f"{long:.1%}",
        f"{_tenth(nestings)} / {max(nestings)}", f"{comments / said:.0%} / {docstrings / said:.0%}",
        f"{sum(f.typed for f in package) / len(functions):.0%}", f"{sum(f.code for f in tests) / code:.2f}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _docstring(node: ast.AST) -> range:
    if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
        return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    return range(0)


def _nesting(node: ast.AST, depth: int = 0) -> int:
    inner = [c for c in ast.iter_child_nodes(node) if not isinstance(c, Function | ast.ClassDef | ast.Lambda)]
    return max([depth, *(_nesting(c, depth + isinstance(c, BLOCKS)) for c in inner)])


def _typed(function: Function) -> bool:
    a = function.args
    own = [x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
    return function.returns is not None and all(x.annotation for x in own)


def _spread(values: Sequence[int]) -> str:
    return f"{statistics.median(values):.0f} / {_tenth(values)} / {max(values)}"


def _tenth(values: Sequence[int]) -> int:
    """What a tenth of the values exceeds."""
    return sorted(values)[int(0.9 * len(values))]


def main() -> None:
    """Print the row under its head."""
    package, tests = ([read(p) for p in sorted((ROOT / name).rglob("*.py"))] for name in ("edgeprune", "tests"))
    head = (
        "files | code lines | file med / p90 / max | function med / p90 / max | functions > 50 | nesting p90 / max | comments / docstrings"
    )
    print(f"| {head} | typed | tests : source |\n|{'---|' * 9}\n{row(package, tests)}")


if __name__ == "__main__":
    main()
