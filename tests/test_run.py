import copy
import errno
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edgeprune import run as run_module
from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.run import Run, default_folder, hash_file, replacing, write_atomic, write_json

ROOT = Path(__file__).parents[1]


def start(folder: Path, *, resume: bool = False) -> Run:
    return Run.open(folder, asked={"latency_ms": 30}, command=["edgeprune", "compress"], resume=resume)


class Pipeline:
    """Two stages over a run; `computed` lists what was not read back."""

    def __init__(self) -> None:
        self.computed: list[str] = []

    def stage(self, run: Run, name: str, inputs: dict[str, Any], value: int) -> int:
        def compute() -> int:
            self.computed.append(name)
            return value

        def write(value: int) -> dict[str, Any]:
            write_json(run.path(f"parts/{name}.json"), value)
            return {"files": [f"parts/{name}.json"], "value": value}

        return run.cached(name, inputs, compute, write=write, read=lambda facts: int(facts["value"]))

    def go(self, run: Run, *, criterion: str = "l1", epochs: int = 1) -> tuple[int, int]:
        return self.stage(run, "score", {"criterion": criterion}, 3), self.stage(run, "train", {"epochs": epochs}, 4)


def test_manifest(tmp_path: Path) -> None:
    with start(tmp_path / "x") as run:
        run.record("inputs", {"model": "abc"})
        Pipeline().go(run)
    manifest = json.loads((tmp_path / "x" / "run.json").read_text())
    assert (manifest["status"], manifest["asked"], manifest["inputs"]) == ("done", {"latency_ms": 30}, {"model": "abc"})
    assert manifest["command"] == ["edgeprune", "compress"]
    assert manifest["versions"]["python"] == sys.version.split()[0]
    assert manifest["versions"]["torch"].startswith("2.")
    assert manifest["stages"]["train"]["facts"]["value"] == 4
    assert manifest["stages"]["train"]["seconds"] >= 0
    assert "train" in (tmp_path / "x" / "log.txt").read_text()


def test_resume_reads_back(tmp_path: Path) -> None:
    pipeline = Pipeline()
    with start(tmp_path) as run:
        first = pipeline.go(run)
    with start(tmp_path, resume=True) as run:
        assert pipeline.go(run) == first
    assert pipeline.computed == ["score", "train"]


@pytest.mark.parametrize(
    ("changes", "again"),
    [({"epochs": 2}, ["train"]), ({"criterion": "l2"}, ["score", "train"]), ({"criterion": "l2", "epochs": 2}, ["score", "train"])],
)
def test_changed_inputs_and_what_follows_are_computed_again(tmp_path: Path, changes: dict[str, Any], again: list[str]) -> None:
    pipeline = Pipeline()
    with start(tmp_path) as run:
        pipeline.go(run)
    with start(tmp_path, resume=True) as run:
        pipeline.go(run, **changes)
    assert pipeline.computed[2:] == again


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("5")])
def test_damaged_files_are_computed_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    pipeline = Pipeline()
    with start(tmp_path) as run:
        pipeline.go(run)
    damage(tmp_path / "parts" / "train.json")
    with start(tmp_path, resume=True) as run:
        pipeline.go(run)
    assert pipeline.computed[2:] == ["train"]
    assert json.loads((tmp_path / "parts" / "train.json").read_text()) == 4


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    start(tmp_path).close()
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UsageError, match=r"--resume.*--out"):
        start(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == before
    start(tmp_path, resume=True).close()


def test_two_runs_refuse_each_other(tmp_path: Path) -> None:
    with start(tmp_path), pytest.raises(UsageError, match=f"in use.*{os.getpid()}"):
        start(tmp_path, resume=True)
    start(tmp_path, resume=True).close()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text('{"pid": 999999, "host": "elsewhere"}')
    with start(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError("x"), "failed")])
def test_status_of_a_broken_run(tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), start(tmp_path):
        raise error
    assert json.loads((tmp_path / "run.json").read_text())["status"] == status
    start(tmp_path, resume=True).close()


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}]
from tests.test_run import Pipeline, start
from edgeprune.run import replacing
run = start(Path({folder!r}))
Pipeline().stage(run, "score", {{"criterion": "l1"}}, 3)
with replacing(run.path("parts/train.json")) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_kill_9_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED.format(root=str(ROOT), folder=str(tmp_path))], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "ready\n"
    with pytest.raises(UsageError, match=f"in use.*{child.pid}"):
        start(tmp_path, resume=True)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "parts" / "train.json").exists()
    assert list((tmp_path / "parts").glob(".*.tmp"))
    pipeline = Pipeline()
    with start(tmp_path, resume=True) as run:
        assert not list(tmp_path.rglob("*.tmp"))
        assert pipeline.go(run) == (3, 4)
    assert pipeline.computed == ["train"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 0, "stages": {}}', '{"format": 1}', '{"format": 1, "stages": {"a": 3}}'])
def test_damaged_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"cannot be resumed.*--out"):
        start(tmp_path, resume=True)
    assert (tmp_path / "run.json").read_text() == content


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_file_in_place_of_the_folder(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"cannot be written.*--out"):
        start(tmp_path / folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", raising(errno.EROFS))
    with pytest.raises(UsageError, match="Read-only"):
        start(tmp_path / "x")


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int) -> None:
    (tmp_path / "a.json").write_text("old")
    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(Path, "write_bytes", write_some_then_fail(code))
        elif step == "fsync":
            patch.setattr(os, "fsync", raising(code))
        else:
            patch.setattr(Path, "replace", raising(code))
        with pytest.raises(EdgepruneError, match="cannot be written" if code == errno.EACCES else r"no space left.*--resume"):
            write_atomic(tmp_path / "a.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_full_disk_in_the_middle_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline()
    with pytest.raises(EdgepruneError, match=r"no space left.*--resume"), start(tmp_path) as run:
        pipeline.stage(run, "score", {"criterion": "l1"}, 3)
        monkeypatch.setattr(Path, "write_bytes", write_some_then_fail(errno.ENOSPC))
        pipeline.stage(run, "train", {"epochs": 1}, 4)
    monkeypatch.undo()
    with start(tmp_path, resume=True) as run:
        pipeline.go(run)
    assert pipeline.computed == ["score", "train", "train"]


def test_replacing_removes_what_a_failed_writer_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ValueError("mine")
    assert not list(tmp_path.iterdir())


def test_a_new_run_removes_only_its_own_leftovers(tmp_path: Path) -> None:
    for name in (".run.json.12.tmp", ".notes.tmp", "mine.tmp"):
        (tmp_path / name).write_text("x")
    start(tmp_path).close()
    assert {".notes.tmp", "mine.tmp"} == {path.name for path in tmp_path.glob("*.tmp")} | {path.name for path in tmp_path.glob(".*.tmp")}


def test_default_folder_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        folder = default_folder("resnet56", "rpi4")
        folder.mkdir(parents=True)
        names.append(str(folder))
    assert names == ["runs/resnet56-rpi4", "runs/resnet56-rpi4-2", "runs/resnet56-rpi4-3"]


def test_hash_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_import_is_light() -> None:
    code = "import sys, edgeprune.run; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_module._git_commit() is None


def raising(code: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def write_some_then_fail(code: int) -> Callable[[Path, bytes], int]:
    def fail(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:1])
        raise OSError(code, os.strerror(code))

    return fail


def test_a_part_has_its_own_stages_and_files(tmp_path: Path) -> None:
    """Read back like any other stage, and changed by what came before it."""

    def stages_of(resume: bool, first: int) -> dict[str, bool]:
        with Run.open(tmp_path / "run", asked={}, command=["x"], resume=resume) as run:
            values = [first]
            for part in ("round-1", "", "round-2"):
                with run.inside(part):
                    values.append(number_stage(run, values[-1]))
            assert values == [first, first + 1, first + 2, first + 3]
            assert run.path("n.json") == tmp_path / "run" / "n.json"
            return run.used

    assert list(stages_of(False, 5)) == ["round-1: n", "n", "round-2: n"]
    assert [json.loads((tmp_path / "run" / part / "n.json").read_text()) for part in ("round-1", "", "round-2")] == [6, 7, 8]
    assert set(stages_of(True, 5).values()) == {True}
    (tmp_path / "run" / "round-1" / "n.json").write_text("0")
    assert stages_of(True, 5) == {"round-1: n": False, "n": True, "round-2: n": True}
    assert set(stages_of(True, 6).values()) == {False}


def number_stage(run: Run, n: int) -> int:
    """n + 1, by way of a file."""

    def write(value: int) -> dict[str, Any]:
        write_json(run.path("n.json"), value)
        return {"files": ["n.json"]}

    return run.cached("n", {"n": n}, lambda: n + 1, write=write, read=lambda _: int(json.loads(run.path("n.json").read_text())))


class Pair:
    """Two threads: what the leader says, the other hears, in order."""

    def __init__(self, words: queue.Queue[Any], *, leads: bool) -> None:
        self.leads = leads
        self.words = words

    def told(self, value: Any) -> Any:
        if not self.leads:
            return self.words.get(timeout=60)
        self.words.put(copy.deepcopy(value))
        return value


def test_the_leader_computes_and_writes_the_other_reads(tmp_path: Path) -> None:
    words: queue.Queue[Any] = queue.Queue()
    computed: list[tuple[bool, str]] = []

    def work(leads: bool) -> list[int]:
        with Run.open(tmp_path / "run", asked={}, command=["x"], team=Pair(words, leads=leads)) as run:

            def stage(name: str, together: bool) -> int:
                def compute() -> int:
                    computed.append((leads, name))
                    return 10 + len(name)

                return run.cached(name, {}, compute, write=lambda v: {"v": v}, read=lambda facts: int(facts["v"]), together=together)

            return [stage("alone", False), stage("together", True)]

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(work, False)
        assert work(True) == other.result(timeout=60) == [15, 18]
    assert sorted(computed) == [(False, "together"), (True, "alone"), (True, "together")]
    assert (tmp_path / "run" / "log.txt").read_text().count("alone:") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"
