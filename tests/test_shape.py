"""The shape of the code (STYLE.md, its section on habits that are tested): sizes, annotations, smells, cycles, a test file per file.

Allow-lists are short, give a reason, and fail when an entry is no longer needed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "edgeprune"
FILES = sorted(p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py"))

FILE_LINES = 400
FUNCTION_LINES = 60
DEPTH = 4

LONGER_FILES: dict[str, int] = {"edgeprune/device/agent.py": 620}  # boards get the agent as one file

UNTYPED: set[tuple[str, str]] = set()

BROAD_EXCEPTS = {
    "edgeprune/graph/trace.py": "the user's forward may raise anything",
    "edgeprune/graph/slim.py": "the user's forward and deepcopy may raise anything",
    "edgeprune/graph/exported.py": "the user's forward, and what torch.export makes of it, may raise anything",
    "edgeprune/graph/rehearse.py": "the user's forward may raise anything",
    "edgeprune/graph/symbolic.py": "the user's forward may raise anything when torch.fx calls it without tensors",
    "edgeprune/load.py": "the user's factory, and torch's readers on damaged bytes, may raise anything",
    "edgeprune/pt2.py": "torch's reader on damaged bytes may raise anything",
}

PRINTERS: dict[str, str] = {}

TESTED_ELSEWHERE: dict[str, str] = {
    "edgeprune/__init__.py": "tests/test_package.py",
    "edgeprune/allocate/__init__.py": "tests/allocate/test_search.py",
    "edgeprune/criteria/__init__.py": "tests/criteria/test_registry.py",
    "edgeprune/cli/options.py": "tests/cli/test_compress.py",
    "edgeprune/errors.py": "tests/cli/test_compress.py",
    "edgeprune/export/__init__.py": "tests/export/test_formats.py",
    "edgeprune/graph/build.py": "tests/graph/test_trace.py",
    "edgeprune/graph/kinds.py": "tests/graph/test_rules.py",
    "edgeprune/graph/rehearse.py": "tests/graph/test_trace.py",
    "edgeprune/graph/moves.py": "tests/graph/test_rules.py",
    "edgeprune/graph/places.py": "tests/graph/test_rules.py",
    "edgeprune/images.py": "tests/test_data.py",
    "edgeprune/train/recording.py": "tests/train/test_reconstruct.py",
    "edgeprune/sources.py": "tests/test_data.py",
    "edgeprune/train/__init__.py": "tests/train/test_recipe.py",
    "edgeprune/train/targets.py": "tests/train/test_reconstruct.py",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def functions(file: str) -> list[Function]:
    return [n for n in ast.walk(tree(file)) if isinstance(n, Function)]


def code_lines(file: str, function: Function) -> int:
    """Lines with code in them: no blank lines, comments or docstring; commands without their signature, which is the list of options."""
    text = (ROOT / file).read_text(encoding="utf-8").splitlines()
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    lines = set(range(body[0].lineno, (function.end_lineno or 0) + 1)) if body else set()
    if not file.startswith("edgeprune/cli/"):
        lines |= set(range(function.lineno, function.body[0].lineno))
    return sum(1 for n in lines if (line := text[n - 1].strip()) and not line.startswith("#"))


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How deep blocks lie in each other; elif is no deeper than its if."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
    deepest = depth
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            if isinstance(child, Function | ast.Lambda | ast.ClassDef):
                deepest = max(deepest, nesting(child, 0))
                continue
            flat = isinstance(node, ast.If) and field == "orelse" and isinstance(child, ast.If)
            deepest = max(deepest, nesting(child, depth + (isinstance(child, blocks) and not flat)))
    return deepest


@pytest.mark.parametrize("file", FILES)
def test_file_length(file: str) -> None:
    lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
    assert lines <= LONGER_FILES.get(file, FILE_LINES), "split it, or simplify it"


@pytest.mark.parametrize("file", FILES)
def test_function_length_and_nesting(file: str) -> None:
    assert {f.name: n for f in functions(file) if (n := code_lines(file, f)) > FUNCTION_LINES} == {}
    assert {f.name: n for f in functions(file) if (n := nesting(f)) > DEPTH} == {}


@pytest.mark.parametrize("file", FILES)
def test_everything_is_annotated(file: str) -> None:
    missing = []
    for function in functions(file):
        a = function.args
        given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        bare = [p.arg for p in given if p.annotation is None and p.arg not in ("self", "cls")]
        if (bare or function.returns is None) and (file, function.name) not in UNTYPED:
            missing.append((function.name, bare, "returns" if function.returns is None else ""))
    assert missing == []


@pytest.mark.parametrize("file", FILES)
def test_public_things_have_docstrings(file: str) -> None:
    def bare(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                if ast.get_docstring(node) is None:
                    yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from bare(node.body, f"{node.name}.")

    assert ast.get_docstring(tree(file)) is not None
    assert list(bare(tree(file).body)) == []


@pytest.mark.parametrize("file", FILES)
def test_no_mutable_defaults(file: str) -> None:
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    made = {"list", "dict", "set", "bytearray", "defaultdict"}
    found = [
        (f.name, ast.unparse(d))
        for f in functions(file)
        for d in (*f.args.defaults, *filter(None, f.args.kw_defaults))
        if isinstance(d, mutable) or (isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id in made)
    ]
    assert found == []


def broad(file: str) -> list[int]:
    """Lines of handlers that catch everything and do more than raise it again."""
    names = {"Exception", "BaseException"}
    return [
        n.lineno
        for n in ast.walk(tree(file))
        if isinstance(n, ast.ExceptHandler)
        and (n.type is None or names & {x.id for x in ast.walk(n.type) if isinstance(x, ast.Name)})
        and not (isinstance(n.body[-1], ast.Raise) and n.body[-1].exc is None)
    ]


def test_no_broad_excepts() -> None:
    found = {file: lines for file in FILES if (lines := broad(file))}
    assert found.keys() == BROAD_EXCEPTS.keys(), "an unlisted broad except, or an entry that is no longer needed"


def test_nothing_prints() -> None:
    found = {
        file
        for file in FILES
        for n in ast.walk(tree(file))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"
    }
    assert found <= PRINTERS.keys()


def test_no_star_imports_and_no_unfinished_business() -> None:
    stars = [file for file in FILES for n in ast.walk(tree(file)) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
    assert stars == []
    unfinished = [file for file in FILES if any(w in (ROOT / file).read_text() for w in ("TODO", "FIXME", "XXX", "NotImplementedError("))]
    assert unfinished == []


def test_no_file_named_for_what_was_left_over() -> None:
    names = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
    assert [file for file in FILES if names & set(Path(file).with_suffix("").parts)] == []


def modules() -> dict[str, str]:
    """edgeprune.graph.trace -> its file."""
    return {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in FILES}


def imported(name: str) -> set[str]:
    """The modules of ours that importing `name` runs: imports at top level, not those inside functions or for type checkers only."""
    known, found = modules(), set()
    stack: list[ast.stmt] = list(tree(known[name]).body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
        elif isinstance(node, ast.If | ast.Try | ast.With):
            stack += [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{a.name}" for a in node.names}
            found |= (inner & known.keys()) or {node.module}
    return (found & known.keys()) - {name}


def test_no_import_cycles() -> None:
    graph = {name: imported(name) for name in modules()}
    assert sum(map(len, graph.values())) > len(graph), "no edges found: this test has gone blind"
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def mirror(file: str) -> str:
    """edgeprune/graph/trace.py -> tests/graph/test_trace.py; a package -> tests/graph/test_graph.py; global_.py -> test_global.py."""
    parts = Path(file).with_suffix("").parts[1:]
    stem = parts[-2] if parts[-1] == "__init__" and len(parts) > 1 else parts[-1]
    return Path("tests", *parts[:-1], f"test_{stem.strip('_')}.py").as_posix()


def has_code(file: str) -> bool:
    """Not only a docstring and names that are passed on."""
    return any(isinstance(n, Function | ast.ClassDef) for n in tree(file).body)


@pytest.mark.parametrize("file", [file for file in FILES if has_code(file)])
def test_every_file_has_its_test_file(file: str) -> None:
    assert (ROOT / TESTED_ELSEWHERE.get(file, mirror(file))).is_file()


def test_allow_lists_are_not_stale() -> None:
    untyped = {(file, f.name) for file, _ in UNTYPED for f in functions(file) if f.returns is None}
    assert untyped == UNTYPED
    assert {**LONGER_FILES, **BROAD_EXCEPTS, **PRINTERS, **TESTED_ELSEWHERE}.keys() <= set(FILES)
    assert [file for file in LONGER_FILES if len((ROOT / file).read_text().splitlines()) <= FILE_LINES] == []
    assert [file for file in TESTED_ELSEWHERE if (ROOT / mirror(file)).is_file()] == []
