from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.device import agent

BRIEF = {"min_runs": 5, "min_seconds": 0.0, "warmup_runs": 2, "warmup_seconds": 0.0}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """y = x @ w with a free batch."""
    weight = numpy_helper.from_array(np.ones((8, 4), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", size]) for n, size in (("x", 8), ("y", 4))]
    graph = helper.make_graph([node], "g", shapes[:1], shapes[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def ask(*requests: object) -> list[dict[str, Any]]:
    lines = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in requests)
    done = subprocess.run([sys.executable, agent.__file__], input=lines, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_says_who_it_is() -> None:
    (reply,) = ask({"do": "hello", "id": 7})
    assert (reply["ok"], reply["id"], reply["protocol"]) == (True, 7, agent.PROTOCOL)
    assert reply["runtimes"]["onnxruntime"]
    assert reply["cpu"]
    assert reply["cores"] >= len(reply["cpus"]) >= 1
    assert reply["agent_sha256"] == hashlib.sha256(Path(agent.__file__).read_bytes()).hexdigest()


def test_measures_every_run(artifact: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    (reply,) = ask({"do": "measure", "artifact": str(artifact), "threads": 1, "cpus": [cpu], **BRIEF})
    assert reply["ok"]
    assert len(reply["times_ns"]) == 5
    assert min(reply["times_ns"]) > 0
    assert reply["warmup_runs"] == 2
    assert reply["cpus"] == [cpu]
    assert reply["inputs"] == {"x": {"shape": [1, 8], "dtype": "float32"}}
    assert reply["peak_memory_bytes"] > 10e6
    assert reply["artifact_sha256"] == hashlib.sha256(artifact.read_bytes()).hexdigest()


def test_the_memory_of_inferences_is_told_apart_from_what_loading_took() -> None:
    garbage = np.ones(8_000_000)
    del garbage
    loading = agent._forget_loading()
    assert agent.peak_memory_bytes() <= loading - 50e6


def test_runs_until_runs_and_seconds_are_reached(artifact: Path) -> None:
    (reply,) = ask({"do": "measure", "artifact": str(artifact), **BRIEF, "min_seconds": 0.05})
    assert len(reply["times_ns"]) > 5
    assert sum(reply["times_ns"]) <= 10e9


def test_warms_up_until_the_runs_are_equally_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose runs become shorter, ever less so, settles; one whose runs become longer and longer is not waited for forever.

    By a clock that only the runs move: two runs that a busy machine makes equally long by chance would end the warm-up.
    """
    now_ns = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now_ns[0])

    def paced(seconds: Callable[[int], float]) -> Callable[[], None]:
        numbers = itertools.count()

        def run() -> None:
            now_ns[0] += int(1e9 * seconds(next(numbers)))

        return run

    settling = agent._warm(paced(lambda n: 0.002 + 0.02 * 0.9**n), 5, 0.1)
    assert len(settling) > 15
    restless = agent._warm(paced(lambda n: 0.001 * 1.1**n), 5, 0.05)
    assert sum(restless) > 0.15e9
    assert len(agent._warm(lambda: None, 7, 0.0)) == 7


def test_inputs_can_be_given(artifact: Path) -> None:
    given = {"x": {"shape": [3, 8], "dtype": "float32"}}
    (reply,) = ask({"do": "measure", "artifact": str(artifact), "inputs": given, **BRIEF})
    assert reply["inputs"] == given


def test_bad_requests_are_answered_and_the_next_one_still_works(artifact: Path) -> None:
    truncated = artifact.with_name("truncated.onnx")
    truncated.write_bytes(artifact.read_bytes()[:40])
    replies = ask(
        "{not json",
        "[1, 2]",
        "",
        {"do": "dance"},
        {"do": "measure", "id": 1},
        {"do": "measure", "artifact": str(artifact), "speed": 3},
        {"do": "measure", "artifact": str(artifact), "min_runs": "many"},
        {"do": "measure", "artifact": str(artifact), "cpus": [4096]},
        {"do": "measure", "artifact": str(truncated), **BRIEF},
        {"do": "measure", "artifact": "/no/such.onnx", **BRIEF},
        {"do": "measure", "artifact": str(artifact), "inputs": {"x": {"shape": [1, 9], "dtype": "float32"}}, **BRIEF},
        {"do": "hello"},
    )
    kinds = [None if r["ok"] else r["error"]["kind"] for r in replies]
    assert kinds == [*["bad_request"] * 6, "failed", *["bad_artifact"] * 3, None]
    assert replies[3]["id"] == 1


def test_tflite_files_are_measured_and_evaluated(tflite_artifact: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    measured, evaluated, operations = ask(
        {"do": "measure", "artifact": str(tflite_artifact), **BRIEF},
        {"do": "evaluate", "artifact": str(tflite_artifact), "arrays": str(tmp_path / "x.npy")},
        {"do": "operations", "artifact": str(tflite_artifact)},
    )
    assert measured["runtime"].startswith("ai-edge-litert")
    assert measured["inputs"] == {"x": {"shape": [1, 8], "dtype": "float32"}}
    (out,) = evaluated["outputs"]
    found = np.frombuffer(base64.b64decode(out["base64"]), out["dtype"]).reshape(out["shape"])
    np.testing.assert_array_equal(found, np.maximum(x, 0))
    assert operations["operations"] is None
    assert "profiler" in operations["reason"]


def test_operations_come_in_the_order_they_run(artifact: Path, tmp_path: Path) -> None:
    (reply,) = ask({"do": "operations", "artifact": str(artifact), "min_runs": 3, "min_seconds": 0, "scratch": str(tmp_path)})
    assert [o["op"] for o in reply["operations"]] == ["MatMul"]
    assert reply["runs"] == 3
    assert list(tmp_path.iterdir()) == [artifact]  # the runtime's trace is gone


def test_a_fresh_process_does_the_work(artifact: Path) -> None:
    both = {"do": "measure", "artifact": str(artifact), **BRIEF}
    here, fresh, late = ask(both, {**both, "fresh": True, "limit_seconds": 60}, {**both, "fresh": True, "limit_seconds": 0.01})
    assert len(fresh["times_ns"]) == len(here["times_ns"]) == 5
    assert late["error"]["kind"] == "late"


def test_the_process_ends_when_its_input_ends_whatever_it_is_doing(artifact: Path) -> None:
    for words, end in ((["--grace", "0"], True), (["--silence", "0.5", "--grace", "0"], False)):
        with subprocess.Popen(
            [sys.executable, agent.__file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin
            process.stdin.write(json.dumps({"do": "measure", "artifact": str(artifact), "min_seconds": 600}) + "\n")
            process.stdin.flush()
            if end:
                process.stdin.close()
            assert process.wait(timeout=30) == 3


def test_the_lock_is_one_process_s_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRUNE_LOCK", f"edgeprune-test-{os.getpid()}")
    with subprocess.Popen([sys.executable, agent.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin
        assert first.stdout
        first.stdin.write('{"do": "lock", "owner": "alice"}\n')
        first.stdin.flush()
        assert json.loads(first.stdout.readline())["ok"]
        (busy,) = ask({"do": "lock", "owner": "bob"})
        assert busy["error"]["kind"] == "busy"
        assert re.match(r"in use by alice for \d+ s \(process ", busy["error"]["message"])
        first.kill()
    (free,) = ask({"do": "lock", "owner": "bob", "wait_seconds": 5})
    assert free["ok"]


def test_governors_are_put_back(tmp_path: Path) -> None:
    name = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
    root = board(tmp_path, {name.format(n): "ondemand\n" for n in (0, 1)})
    session = agent.Session()
    assert session._govern("performance", root) == {"before": ["ondemand"], "cpus": 2}
    assert (tmp_path / name.format(1)).read_text() == "performance"
    session.end()
    assert (tmp_path / name.format(1)).read_text() == "ondemand"


def test_settling_waits_for_still_temperatures(tmp_path: Path) -> None:
    root = board(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "50000\n"})
    assert agent.settle(5, window_seconds=0.05, root=root)["settled"]
    assert agent.settle(0, root=str(tmp_path / "none")) == {
        "settled": True,
        "waited_seconds": pytest.approx(0, abs=1),
        "temperatures_c": [],
    }
    assert not agent.settle(0, root=root)["settled"]


def test_a_missing_runtime_is_named(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what an absent package looks like to `import`
    replies = io.StringIO()
    agent.serve(io.StringIO(json.dumps({"do": "measure", "artifact": str(artifact)}) + "\n"), replies)
    reply = json.loads(replies.getvalue())
    assert reply["error"]["kind"] == "missing_runtime"
    assert "onnxruntime" in reply["error"]["message"]


def test_needs_only_the_standard_library_until_it_measures() -> None:
    code = f"""
import runpy, sys
sys.path[:] = [p for p in sys.path if "site-packages" not in p]
module = runpy.run_path({agent.__file__!r})
module["hello"]()
sys.exit(any(name in sys.modules for name in ("numpy", "onnxruntime", "edgeprune")))
"""
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False, timeout=60).returncode == 0


def test_ends_when_it_is_killed_or_its_input_ends() -> None:
    for end in ("close", "kill"):
        with subprocess.Popen([sys.executable, agent.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin and process.stdout
            process.stdin.write('{"do": "hello"}\n')
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["ok"]
            process.stdin.close() if end == "close" else process.kill()
            assert process.wait(timeout=30) == (0 if end == "close" else -signal.SIGKILL)


def board(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


def test_reads_the_state_of_a_board(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu/cpu{}/cpufreq/"
    root = board(
        tmp_path,
        {
            cpu.format(0) + "scaling_cur_freq": "1500000\n",
            cpu.format(0) + "scaling_governor": "ondemand\n",
            cpu.format(1) + "scaling_cur_freq": "600000\n",
            cpu.format(1) + "scaling_governor": "ondemand\n",
            "sys/class/thermal/thermal_zone0/temp": "48312\n",
            "sys/class/thermal/thermal_zone1/temp": "",
            "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
            "proc/loadavg": "0.25 0.10 0.05 1/100 4242\n",
        },
    )
    assert agent.machine_state(root) == {
        "frequencies_khz": [1500000, 600000],
        "governors": ["ondemand"],
        "temperatures_c": [48.312],
        "throttle_word": 0x50005,
        "load_average": 0.25,
    }
    assert agent.machine_state(root, cpus=[1])["frequencies_khz"] == [600000]
    assert agent.machine_state(str(tmp_path / "empty")) == {}


def test_names_an_arm_cpu_by_its_part(tmp_path: Path) -> None:
    text = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n\nprocessor\t: 1\nCPU part\t: 0xd08\n"
    keys = ("model name", "CPU part")
    assert agent.cpu_field(*keys, root=board(tmp_path, {"proc/cpuinfo": text})) == "0xd08"
    assert agent.cpu_field(*keys, root=board(tmp_path, {"proc/cpuinfo": "model name\t: Fast CPU @ 3 GHz\n" * 2})) == "Fast CPU @ 3 GHz"
    assert agent.cpu_field(*keys, root=str(tmp_path / "empty")) == ""
