"""Exported programs (.pt2), read without running code they bring.

torch.export.load trusts its file (checked in torch 2.13): it unpickles sample inputs, weights and constants that say they are pickled,
hands shape expressions to sympy's eval, turns guard strings and argument names into Python source, and calls any attribute of torch
that the graph names ("torch.os.system" among them). So an untrusted file is not loaded: a copy of it is made in memory that holds
only tensors and a graph in which every string was checked, and that copy is loaded.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from edgeprune.errors import ModelError, UsageError
from edgeprune.graph.exported import Unexportable, exported_program
from edgeprune.graph.running import first_line, quiet_torch, single_sample
from edgeprune.run import write_atomic

# from_file is the one aten operator that opens files by name.
_TARGET = re.compile(
    r"torch\.ops\.(aten|torchvision)\.(?!from_file)\w+\.\w+|torch\.sym_\w+|math\.(ceil|floor|trunc)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
_TENSOR_FILE = re.compile(r"data/(weights|constants)/(weight|tensor)_\d+")
_JSON_FILE = re.compile(r"models/model\.json|data/(weights|constants)/model_(weights|constants)_config\.json")
_PLAIN_FILES = ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id")
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
# No brackets, quotes, = or line ends: nothing that could call anything when it ends up in generated source. einsum needs , and >.
_PLAIN_TEXT = re.compile(r"[\w.\-+:/,> ]*")
_SYMPY_NAME = re.compile(
    r"Symbol|Integer|Rational|Float|Add|Mul|Pow|Mod|Max|Min|Abs|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|true|false|oo|int_oo|Where"
    r"|FloorDiv|CleanDiv|CeilDiv|PythonMod|ModularIndexing|FloorToInt|CeilToInt|TruncToInt|ToFloat|IntTrueDiv|FloatTrueDiv"
)
# Others name modules to import; a leaf has the type None.
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_SYNTAX = (ast.Expression, ast.Load, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop)


class _Refused(Exception):
    """Why a file is not plain; the text completes "it holds …"."""


def is_exported_program(names: list[str]) -> bool:
    """Whether an archive with these entries was written by torch.export.save."""
    inside = {_inside(name) for name in names}
    return "models/model.json" in inside or "serialized_exported_program.json" in names


def load_exported_program(path: Path, *, trusted: bool) -> ExportedProgram:
    """The program of a .pt2 file; without `trusted` only one that is data through and through.

    Raises ModelError for a damaged file, one of another torch version, one exported in training mode, and one that could execute code.
    """
    try:
        source = path if trusted else _plain_copy(path)
        program = _load(source)
    except _Refused as error:
        raise ModelError(
            f"{path} is an exported program that was not loaded because it holds {error}, which can execute code. If you trust where it "
            "comes from, use --trust-pickle; otherwise give a state dict (.safetensors) and --model pkg.mod:factory."
        ) from error
    except Exception as error:  # on a damaged file torch's reader raises whatever it stumbles over
        raise ModelError(
            f"{path} is not an exported program that this torch ({torch.__version__}) can read ({first_line(error)}): write it again with "
            "torch.export.save, or give a state dict and --model pkg.mod:factory."
        ) from error
    if name := _training_op(program):
        raise ModelError(f"{path} was exported in training mode ({name}): call model.eval() before torch.export.export.")
    return program


def save_program(model: nn.Module, path: Path, example_inputs: Any) -> Path:
    """Write the network in eval mode, for any batch, as an exported program that `load_exported_program` reads; returns the path.

    Raises UsageError without example inputs, ModelError for a network that cannot be exported.
    """
    if example_inputs is None:
        raise UsageError(f"{path} is to hold a whole network, which is exported: give save(…, example_inputs=) what it runs on.")
    try:
        program = exported_program(model, single_sample(example_inputs))
    except Unexportable as error:
        raise ModelError(f"the network cannot be written to {path}: {error}. Save it as .safetensors instead.") from error
    buffer = io.BytesIO()
    with quiet_torch():
        torch.export.save(program, buffer)
    write_atomic(path, buffer.getvalue())
    return path


def _load(source: Path | io.BytesIO) -> ExportedProgram:
    logger = logging.getLogger("torch.export")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # a damaged file would log a traceback on top of the error
    try:
        return torch.export.load(source)
    finally:
        logger.setLevel(before)


def _plain_copy(path: Path) -> io.BytesIO:
    """The archive again, with nothing in it that is not known to be data; raises _Refused for anything else."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as plain:
        names = archive.namelist()
        if len(set(names)) < len(names) or len({PurePosixPath(name).parts[0] for name in names}) != 1:
            raise ValueError("it is not laid out as torch.export.save does since torch 2.8")
        for name in names:
            plain.writestr(name, _plain_entry(_inside(name), archive.read(name)))
    copy.seek(0)
    return copy


def _plain_entry(name: str, content: bytes) -> bytes:
    if name in _PLAIN_FILES or _TENSOR_FILE.fullmatch(name):
        return content
    if name == _SAMPLE_INPUTS:
        return _plain_pickle(content)
    if _JSON_FILE.fullmatch(name):
        return _plain_json(json.loads(content))
    raise _Refused(f"the entry {name!r}")


def _plain_pickle(content: bytes) -> bytes:
    """Tensors in containers, written again by ourselves."""
    if not content:
        return content
    try:
        value = torch.load(io.BytesIO(content), weights_only=True)
    except pickle.UnpicklingError as error:
        raise _Refused("pickled objects as sample inputs") from error
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _plain_json(document: Any) -> bytes:
    if "graph_module" in document:
        # Guards are only checks of the input's sizes, and metadata only tells where a node came from: neither is needed.
        document["guards_code"] = []
        for node in document["graph_module"]["graph"]["nodes"]:
            node["metadata"] = {}
    for key, text in _strings(document, ""):
        _check_string(key, text)
    return json.dumps(document).encode()


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key it belongs to, text) of every string of a JSON document, the keys among them."""
    if isinstance(value, dict):
        if value.get("use_pickle"):
            raise _Refused("pickled weights")
        for name, item in value.items():
            yield "", name
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, str):
        yield key, value


def _check_string(key: str, text: str) -> None:
    if key == "target":
        if not _TARGET.fullmatch(text):
            raise _Refused(f"a call of {text!r}")
    elif key == "expr_str":
        _check_expression(text)
    elif key in ("in_spec", "out_spec"):
        _check_tree(json.loads(text) if text else None)
    elif not _PLAIN_TEXT.fullmatch(text):
        raise _Refused(f"the text {text[:60]!r} as {key or 'a name'}")


def _check_expression(text: str) -> None:
    """Sizes such as 2*Symbol('s0', integer=True): known functions of numbers and symbols."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise _Refused(f"the expression {text[:60]!r}") from error
    for node in ast.walk(tree):
        plain = isinstance(node, _SYNTAX)
        if isinstance(node, ast.Call):
            plain = isinstance(node.func, ast.Name)  # the name itself comes by in its turn
        elif isinstance(node, ast.Name):
            plain = _SYMPY_NAME.fullmatch(node.id) is not None or re.fullmatch(r"[suz]\d+", node.id) is not None
        elif isinstance(node, ast.Constant):
            plain = not isinstance(node.value, str) or re.fullmatch(r"\w*", node.value) is not None
        if not plain:
            raise _Refused(f"the expression {text[:60]!r}")


def _check_tree(value: Any) -> None:
    """How inputs and outputs nest: built-in containers only, whose keys are plain text."""
    if isinstance(value, dict):
        if "__enum__" in value or value.get("type") not in _CONTAINERS:
            raise _Refused("inputs or outputs of a class of its own")
        for name, item in value.items():
            _check_string("", name)
            _check_tree(item)
    elif isinstance(value, list):
        for item in value:
            _check_tree(item)
    elif isinstance(value, str) and not _PLAIN_TEXT.fullmatch(value):
        nested = value.startswith(("[", "{", '"')) and _is_json(value)
        if not nested:
            raise _Refused(f"the text {value[:60]!r} in its signature")
        _check_tree(json.loads(value))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _training_op(program: ExportedProgram) -> str | None:
    """The first batch norm or dropout that the program runs in training mode."""
    for node in program.graph.nodes:
        name = str(node.target)
        position = {"aten.batch_norm.default": 5, "aten.dropout.default": 2}.get(name)
        if position is not None and len(node.args) > position and node.args[position] is True:
            return name
    return None


def _inside(name: str) -> str:
    """The entry's name below the archive's own top folder."""
    return name.partition("/")[2]
