"""Damaged and hostile files: what makes each kind that edgeprune reads, what reads it, and a mutation fuzzer with fixed seeds.

Bits flipped, files cut, blocks overwritten, repeated or taken out; in JSON also values replaced by others of any type, in text words. A
reader may answer with one of our errors or with a value. Anything else, more than LONGEST_S, and any process started, unpickled name,
connection or file written elsewhere meanwhile is a failure.
"""

from __future__ import annotations

import faulthandler
import json
import os
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

import edgeprune as ep
from edgeprune import bench
from edgeprune.cli import app
from edgeprune.cli.runs import report
from edgeprune.data import load_data
from edgeprune.device.card import device
from edgeprune.errors import EdgepruneError, ExportError, UsageError
from edgeprune.export import export, load_artifact
from edgeprune.export.verify import keep_samples, verify, write_list
from edgeprune.load import load_model
from edgeprune.result import COMMON
from edgeprune.run import Run, hash_file
from tests.colours import FACTORY, SIDE, colour_net, images, write_npz, write_weights

LONGEST_S = 30
EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)


@dataclass(frozen=True)
class Kind:
    """A file that edgeprune reads: how a good one is made, and what reads it."""

    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


def write_portable(path: Path) -> None:
    model = colour_net()
    graph = ep.trace(model, EXAMPLE)
    plan = ep.Plan.uniform(graph, keep=0.5)
    ep.save(ep.slim(model, graph, plan), path, plan=plan)


def write_program(path: Path) -> None:
    torch.export.save(torch.export.export(colour_net(), (EXAMPLE,)), path)


@cache
def tflite() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return export(colour_net(), EXAMPLE, Path(folder) / "a.tflite", format="tflite").path.read_bytes()


def write_tflite(path: Path) -> None:
    path.write_bytes(tflite())


def write_card(path: Path) -> None:
    path.write_bytes((Path(__file__).resolve().parents[1] / "devices" / "rpi4.toml").read_bytes())


def write_image(path: Path) -> None:
    Image.fromarray(images(1)[0][0]).resize((32, 32)).save(path)


def read_image(path: Path) -> object:
    """A data folder in which one image is the file."""
    root = path.parent / "folder"
    for n, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(4):
            Image.fromarray(images(8)[0][4 * n + k]).save(root / name / f"{k}.png")
    (root / "a" / "0.png").write_bytes(path.read_bytes())
    return [batch[0].shape for batch in load_data(root, size=(SIDE, SIDE)).train.batches(8)]


def write_manifest(path: Path) -> None:
    with Run.open(path.parent / "run", asked={"a": 1}, command=["x"], resume=False) as run:
        run.record("inputs", {"model": "m"})
    path.write_bytes((path.parent / "run" / "run.json").read_bytes())


def read_manifest(path: Path) -> object:
    (path.parent / "run").mkdir(exist_ok=True)
    (path.parent / "run" / "run.json").write_bytes(path.read_bytes())
    with Run.open(path.parent / "run", asked={"a": 1}, command=["x"], resume=True) as run:
        return run.cached("stage", {}, lambda: 1, write=lambda v: {"v": v}, read=lambda facts: facts["v"])


def write_result(path: Path) -> None:
    figures = [
        {"name": name, "before": {"value": 2.0}, "after": {"value": 1.0}, "basis": "predicted"}
        for name in ("accuracy", "latency", "macs", "params", "size")
    ]
    path.write_text(json.dumps(dict.fromkeys(COMMON) | {"title": "x", "created": "", "budgets": [], "figures": figures, "artifacts": []}))


def read_result(path: Path) -> None:
    """The file beside a good one, as `edgeprune report` puts them together."""
    for name in ("good", "done"):
        (path.parent / name).mkdir(exist_ok=True)
    write_result(path.parent / "good" / "result.json")
    (path.parent / "done" / "result.json").write_bytes(path.read_bytes())
    report([path.parent / "good", path.parent / "done"], path.parent / "good")
    report([path.parent / "done"], path.parent / "done")


def write_options(path: Path) -> None:
    """No budget among them: whatever is left of it, compress ends before it does anything."""
    path.write_text(f'model = "{FACTORY}"\ndevice = "rpi4"\nseed = 1\nround-to = 8\nkeep-dense = ["a"]\nmax-remove = 0.5\nflip = false\n')


def read_options(path: Path) -> None:
    done = CliRunner().invoke(app, ["compress", "net.pt", "--config", str(path)])
    if isinstance(done.exception, SystemExit) and done.exit_code == 2:  # what the parser says of a wrong value
        raise UsageError(" ".join(done.output.split())[-500:])
    if done.exception and "no budget given" not in str(done.exception):
        raise done.exception


def write_verifiable(path: Path) -> None:
    """A folder of which every check passes."""
    folder = path.parent
    write_list(folder, [export(colour_net(), EXAMPLE, folder / "model.onnx")])
    keep_samples(folder, colour_net(), EXAMPLE)
    reached = {"name": "macs", "asked": 9.0, "reached": 8.0, "basis": "counted", "met": True}
    (folder / "result.json").write_text(json.dumps({"budgets": [reached]}))
    hashes = {name: hash_file(folder / name) for name in ("artifacts.json", "samples.safetensors")}
    (folder / "run.json").write_text(json.dumps({"asked": {"budget": {"macs": 9.0}}, "stages": {"export": {"sha256": hashes}}}))


def read_verifiable(path: Path) -> None:
    failed = [check for check in verify(path.parent) if not check.passed]
    if failed:
        raise ExportError(f"{failed[0].name}: {failed[0].found}")


KINDS = {
    "state dict": Kind("w.pt", write_weights, lambda p: load_model(p, factory=FACTORY, input_shape=(1, 3, SIDE, SIDE))),
    "slim weights": Kind("s.safetensors", write_portable, lambda p: ep.load(p, model=colour_net())),
    "exported program": Kind("m.pt2", write_program, load_model),
    "arrays": Kind("d.npz", write_npz, lambda p: load_data(p).fingerprint),
    "device card": Kind("rpi4.toml", write_card, lambda p: device(str(p))),
    "artifact": Kind("a.onnx", lambda p: export(colour_net(), EXAMPLE, p), lambda p: load_artifact(p)(EXAMPLE.numpy())),
    "TFLite artifact": Kind("a.tflite", write_tflite, lambda p: load_artifact(p)(EXAMPLE.numpy())),
    "options": Kind("edgeprune.toml", write_options, read_options),
    "list of artifacts": Kind("artifacts.json", write_verifiable, read_verifiable),
    "manifest, verified": Kind("run.json", write_verifiable, read_verifiable),
    "result, verified": Kind("result.json", write_verifiable, read_verifiable),
    "samples": Kind("samples.safetensors", write_verifiable, read_verifiable),
    "png": Kind("i.png", write_image, read_image),
    "jpeg": Kind("i.jpg", write_image, read_image),
    "manifest": Kind("run.json", write_manifest, read_manifest),
    "result": Kind("result.json", write_result, read_result),
    "baseline": Kind("b.json", lambda p: bench.write(p, {"n": bench.Figures({"macs": 1.0}, ((1.0, 2.0),))}), bench.read),
}


@dataclass(frozen=True)
class Survey:
    """What came of the damaged versions of one kind of file."""

    files: int
    refused: int
    slowest_s: float


def survey(kind: Kind, folder: Path, count: int, *, seed: int) -> Survey:
    """`count` damaged versions, read one after the other in `folder`. Raises what no user should see, AssertionError for side effects."""
    good = folder / kind.file
    kind.make(good)
    kind.read(good)
    content = good.read_bytes()
    before = {p for p in folder.rglob("*") if p != good}
    refused, slowest = 0, 0.0
    for number, damaged in enumerate(mutants(content, count, seed)):
        good.write_bytes(damaged)
        start = time.monotonic()
        with watched(folder) as seen:
            refused += _refused(kind, good)
        slowest = max(slowest, time.monotonic() - start)
        assert seen == [], f"mutant {number} did {seen[:3]}"
    left = {p for p in folder.rglob("*") if p != good} - before
    assert [p for p in left if "checkpoints" not in p.parts and p.suffix not in (".json", ".txt", ".lock", ".html", ".md")] == []
    return Survey(count, refused, slowest)


def _refused(kind: Kind, file: Path) -> bool:
    faulthandler.dump_traceback_later(LONGEST_S, exit=True)  # native code hangs without looking at signals
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read(file)
    except EdgepruneError as error:
        assert "\n\n" not in str(error) and len(str(error)) < 2000
        return True
    finally:
        faulthandler.cancel_dump_traceback_later()
    return False


def mutants(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Damaged versions of a file, the same for the same seed; of JSON and text every other one stays well-formed."""
    random = np.random.default_rng(seed)
    whole = _structured(content)
    for number in range(count):
        yield whole(random) if whole and number % 2 else _damaged(content, number // (2 if whole else 1), random)


def _damaged(content: bytes, number: int, random: np.random.Generator) -> bytes:
    damaged = bytearray(content)
    at = int(random.integers(len(content)))
    size = int(random.integers(1, max(2, len(content) // 4)))
    match number % 6:
        case 0:
            del damaged[at:]
        case 1:  # headers decide most: half of the flips fall there
            for place in random.integers(min(len(content), 512 if number % 12 == 1 else len(content)), size=4):
                damaged[place] ^= 1 << int(random.integers(8))
        case 2:
            damaged[at : at + size] = random.bytes(size)
        case 3:
            damaged[at:at] = damaged[at : at + size]
        case 4:
            del damaged[at : at + size]
        case _:
            damaged[at : at + 8] = struct.pack("<q", int(random.integers(-(2**62), 2**62)))
    return bytes(damaged)


STRANGE: tuple[Any, ...] = (None, True, -1, 0, 10**40, 1e308, "", "x", "../../outside", "9" * 5000, [], [[]], {}, {"a": {}}, ["x", 3])


def _structured(content: bytes) -> Callable[[np.random.Generator], bytes] | None:
    """Makes versions of a JSON file in which one value is a strange one or missing, of a text in which one word is; else None."""
    try:
        json.loads(content)
    except ValueError:
        try:
            words = content.decode().split(" ")
        except ValueError:
            return None

        def in_text(random: np.random.Generator) -> bytes:
            changed = list(words)
            changed[int(random.integers(len(words)))] = json.dumps(STRANGE[int(random.integers(len(STRANGE)))])
            return " ".join(changed).encode()

        return in_text

    def in_json(random: np.random.Generator) -> bytes:
        value = json.loads(content)
        places = list(_places(value))
        holder, key = places[int(random.integers(len(places)))]
        choice = int(random.integers(len(STRANGE) + 1))
        if choice == len(STRANGE):
            del holder[key]
        else:
            holder[key] = STRANGE[choice]
        return json.dumps(value).encode()

    return in_json


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside, by what holds it and where."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield value, key
        yield from _places(part)


STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pickle.find_class")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_watching: list[tuple[Path, list[str]]] = []  # an audit hook stays for ever: it looks here whether anybody wants to know


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """What Python did meanwhile that reading a file never needs: processes, connections, unpickling, writing outside `folder`."""
    _add_hook()
    seen: list[str] = []
    _watching.append((folder.resolve(), seen))
    try:
        yield seen
    finally:
        _watching.pop()


@cache
def _add_hook() -> None:
    sys.addaudithook(_hook)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watching or not (event == "open" or event in STARTS or event in CHANGES):
        return
    folder, seen = _watching[-1]
    if event in STARTS and args[1:2] != (["git", "rev-parse", "HEAD"],):  # an opened run notes the commit
        seen.append(f"{event} {args!r:.200}")
    elif event in CHANGES or (event == "open" and args[2] & WRITING):
        seen.extend(f"{event} {path}" for path in args[: 2 if event == "os.rename" else 1] if _elsewhere(path, folder))


def _elsewhere(path: object, folder: Path) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False  # a file that is open already
    found = Path(os.path.abspath(os.fsdecode(path)))
    return not (found.is_relative_to(folder) or "__pycache__" in found.parts or found == Path(os.devnull))
