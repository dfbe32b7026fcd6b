from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeprune.device import agent, connection
from edgeprune.device import measure as measuring
from edgeprune.device.measure import FULL, QUICK, Measurement, Schedule, measure, measure_host, median_interval_ms
from edgeprune.errors import DeviceError, Unreachable

BRIEF: Schedule = {"processes": 3, "min_runs": 20, "min_seconds": 0.0, "warmup_runs": 2, "warmup_seconds": 0.0}


@dataclass(frozen=True)
class Card:
    attached: bool
    threads: int = 1
    profile: str = "rpi4-ort"
    host: str = ""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "m.onnx"
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 8]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", shapes[:1], shapes[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def measured(artifact: Path) -> Measurement:
    return measure_host(artifact, **BRIEF)


def test_the_figures_belong_together(measured: Measurement) -> None:
    m = measured
    assert 0 < m.min_ms <= m.low_ms <= m.latency_ms <= m.high_ms
    assert m.min_ms <= m.latency_ms <= m.p90_ms <= m.p99_ms
    assert min(m.process_medians_ms) <= m.latency_ms <= max(m.process_medians_ms)
    assert m.runs == 60
    assert 0 <= m.outliers <= m.runs / 4  # by their definition
    assert m.first_ms > 0
    assert m.load_ms > 0
    assert m.peak_memory_bytes > 10e6


def test_the_fingerprint_says_what_was_measured_on_what(measured: Measurement, artifact: Path) -> None:
    f = measured.fingerprint
    assert f["artifact_sha256"] == agent._sha256(str(artifact))
    assert f["agent_sha256"] == agent._sha256(agent.__file__)
    assert f["runtime"].startswith("onnxruntime 1.")
    assert f["cpus"] == [max(os.sched_getaffinity(0))]
    assert {"cpu", "cpu_features", "os", "cores", "kernel", "python", "pointer_bits", "state"} <= f.keys()
    assert len(f["states"]) == 3


def test_a_full_measurement_waits_for_the_temperature_first(artifact: Path) -> None:
    schedule: Schedule = {**BRIEF, "min_seconds": 1.0}
    found = measure_host(artifact, **schedule)
    assert found.fingerprint["settled"].keys() >= {"settled", "waited_seconds", "temperatures_c"}
    assert found.network_memory_bytes < found.peak_memory_bytes


def test_goes_through_json_and_back(measured: Measurement) -> None:
    assert Measurement.from_json(json.loads(json.dumps(measured.to_json()))) == measured
    with pytest.raises(FrozenInstanceError):
        measured.latency_ms = 0.0  # type: ignore[misc]


def test_only_an_attached_device_is_measured(artifact: Path) -> None:
    with pytest.raises(DeviceError, match=r"rpi4-ort is not attached.*predicted unless a board is connected"):
        measure(artifact, Card(attached=False))
    assert measure(artifact, Card(attached=True), **BRIEF).threads == 1


def test_full_is_what_the_protocol_asks_for_and_quick_still_has_fresh_processes() -> None:
    assert FULL == {"processes": 3, "min_runs": 50, "min_seconds": 5.0, "warmup_runs": 10, "warmup_seconds": 1.0}
    assert QUICK["processes"] >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 4096}, "4096 thread"),
        ({"threads": 0}, "0 thread"),
        ({"cpus": [4096]}, "4096"),
        ({"cpus": []}, "CPUs"),
        ({"processes": 2}, "at least 3"),
    ],
)
def test_what_cannot_be_measured(artifact: Path, options: Schedule, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        measure_host(artifact, **options)


def test_a_missing_and_a_broken_artifact(tmp_path: Path, artifact: Path) -> None:
    with pytest.raises(DeviceError, match=r"no artifact .*gone\.onnx"):
        measure_host(tmp_path / "gone.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(artifact.read_bytes()[:20])
    with pytest.raises(DeviceError, match=r"bad_artifact.*broken\.onnx"):
        measure_host(broken, **BRIEF)


def sabotage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> Path:
    """Put a program in the agent's place; it notes its process id and its child's."""
    notes = tmp_path / "pids"
    program = tmp_path / "agent.py"
    program.write_text(
        "import os, subprocess, sys, time, signal\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"with open({str(notes)!r}, 'w') as f: f.write(f'{{os.getpid()}} {{child.pid}}')\n" + body
    )
    monkeypatch.setattr(agent, "__file__", str(program))
    return notes


def assert_gone(notes: Path) -> None:
    for pid in map(int, notes.read_text().split()):
        deadline = time.monotonic() + 10
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether the process lives; one that only waits to be reaped by init does not."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("sys.exit('no luck today')", r"status 1 .*no luck today"),
        ("print('{half')", "without a result"),
        (
            """print('{"ok": false, "id": 1, "protocol": 2, "error": {"kind": "missing_runtime", "message": "No onnxruntime"}}')""",
            "runtime to measure with is missing",
        ),
    ],
)
def test_an_agent_that_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Path, body: str, message: str) -> None:
    # the child must not hold the pipes open, or there would be nothing but the time limit to end the call
    notes = sabotage(monkeypatch, tmp_path, "child.kill()\n" + body)
    with pytest.raises(Unreachable, match=message) as caught:
        measure_host(artifact, **BRIEF)
    assert "\n" not in str(caught.value)
    assert_gone(notes)


def test_an_agent_that_hangs_is_stopped_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Path) -> None:
    notes = sabotage(monkeypatch, tmp_path, "time.sleep(600)")
    monkeypatch.setattr(connection, "START_SECONDS", 5.0)  # it must have started and noted its children by then
    with pytest.raises(Unreachable, match="no result within 5 s"):
        measure_host(artifact, **BRIEF)
    assert_gone(notes)


def test_ctrl_c_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Path) -> None:
    notes = sabotage(monkeypatch, tmp_path, "time.sleep(600)")
    code = f"""
from edgeprune.device import agent
from edgeprune.device.measure import measure_host
agent.__file__ = {str(tmp_path / "agent.py")!r}
try:
    measure_host({str(artifact)!r})
except KeyboardInterrupt:
    print("interrupted")
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True) as host:
        deadline = time.monotonic() + 60
        while not (notes.exists() and len(notes.read_text().split()) == 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        host.send_signal(signal.SIGINT)
        output, _ = host.communicate(timeout=30)
    assert output.strip() == "interrupted"
    assert_gone(notes)


def drawn(
    random: np.random.Generator, *, processes: int, between: float, drift: float
) -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Run times around 10 ms: each process has its own level and its noise is a slow drift with spikes on it."""
    made = []
    for _ in range(processes):
        walk = np.cumsum(random.normal(0, drift, 200)) / np.sqrt(200)
        spikes = random.exponential(0.2, 200) + 5.0 * (random.random(200) < 0.05)
        made.append(10 + random.normal(0, between) + walk + spikes)
    return made


@pytest.mark.parametrize("processes", [3, 5])
@pytest.mark.parametrize(("between", "drift"), [(0.3, 0.05), (0.05, 0.3)])
def test_the_interval_covers_the_truth(processes: int, between: float, drift: float) -> None:
    truth = 10 + 0.2 * np.log(2)  # spikes shift a median little
    hits = 0
    for seed in range(200):
        _, low, high = median_interval_ms(drawn(np.random.default_rng(seed), processes=processes, between=between, drift=drift))
        hits += low <= truth <= high
    assert hits >= 0.9 * 200


def test_the_interval_narrows_with_more_processes_and_is_reproducible() -> None:
    def width(processes: int) -> float:
        draws = [median_interval_ms(drawn(np.random.default_rng(s), processes=processes, between=0.3, drift=0.05)) for s in range(20)]
        return float(np.mean([high - low for _, low, high in draws]))

    assert width(10) < width(5) < width(3)
    same = drawn(np.random.default_rng(1), processes=3, between=0.3, drift=0.05)
    assert median_interval_ms(same) == median_interval_ms(same)


def test_throttling_and_a_falling_frequency_are_problems() -> None:
    calm = {"throttle_word": 0x50000, "frequencies_khz": [1500000]}
    fallen = {"throttle_word": 0x50000, "frequencies_khz": [1000000]}

    def problems(before: dict[str, object], after: dict[str, object]) -> tuple[str, ...]:
        return measuring._problems([{"before": before, "after": after, "cpu_share": 1.0}])

    assert problems({}, {}) == problems(calm, calm) == ()  # throttled some time since boot, not now
    assert problems(calm, fallen) == ("a CPU's frequency fell during the runs",)
    for word in (0x50004, 0x70000):
        (problem,) = problems(calm, {"throttle_word": word})
        assert f"{word:#x}" in problem


def test_a_shared_cpu_is_a_problem_and_the_interval_reaches_down_to_the_fastest_run(artifact: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    busy = f"import os\nos.sched_setaffinity(0, [{cpu}])\nprint(flush=True)\nwhile True: pass"
    schedule: Schedule = {**BRIEF, "min_seconds": 0.3}
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout and other.stdout.readline()
            m = measure_host(artifact, cpus=[cpu], **schedule)
        finally:
            other.kill()
    assert any("other programs used the CPU" in problem for problem in m.problems)
    assert m.low_ms == m.min_ms
