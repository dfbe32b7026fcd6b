"""The measuring agent: this one file, standard library only, is what runs on the machine that is measured.

Started as `python agent.py` it answers JSON lines: one request on stdin, one reply on stdout, until stdin ends. Nothing else
reaches stdout. A request is {"do": NAME, "id": ANY, …}; a reply repeats the id and is {"ok": true, "protocol": 1, …} or
{"ok": false, "protocol": 1, "error": {"kind": K, "message": M}} with K one of bad_request, missing_runtime, bad_artifact, failed.

    hello                                        the machine, its Python and the runtimes that are installed
    measure artifact threads cpus seed           every run time of one session, with memory and the machine's state around it;
            min_runs min_seconds                 the runs go on until both are reached
            warmup_runs warmup_seconds inputs    inputs: {name: {"shape": [...], "dtype": "float32"}}, default: the artifact's, batch 1

numpy and onnxruntime are imported only by `measure`. Runs on Python 3.9 and later: boards are older than the host.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import platform
import struct
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO

PROTOCOL = 1
RUNTIMES = ("onnxruntime", "ai-edge-litert", "tflite-runtime", "numpy")
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(uint8)": "uint8"}
_TYPES.update({"tensor(int8)": "int8", "tensor(int32)": "int32", "tensor(int64)": "int64", "tensor(bool)": "bool"})

Json = dict[str, Any]


class RequestError(Exception):
    """A request that cannot be answered; `kind` is the machine-readable reason."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer every line of `requests` with one line on `replies`."""
    for line in requests:
        if not line.strip():
            continue
        identity = None
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise RequestError("bad_request", "a request is a JSON object")
            identity = request.get("id")
            reply = {"ok": True, **_answer(request)}
        except RequestError as error:
            reply = {"ok": False, "error": {"kind": error.kind, "message": str(error)}}
        except (ValueError, TypeError, KeyError) as error:
            reply = {"ok": False, "error": {"kind": "bad_request", "message": f"{type(error).__name__}: {error}"}}
        except (OSError, MemoryError) as error:
            reply = {"ok": False, "error": {"kind": "failed", "message": f"{type(error).__name__}: {error}"}}
        replies.write(json.dumps({"id": identity, "protocol": PROTOCOL, **reply}) + "\n")
        replies.flush()


def hello() -> Json:
    """The machine and what is installed on it."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "pointer_bits": 8 * struct.calcsize("P"),
        "system": platform.system(),
        "kernel": platform.release(),
        "cpu": cpu_model(),
        "board": _text("/proc/device-tree/model").strip("\0 "),
        "cores": os.cpu_count() or 1,
        "cpus": sorted(os.sched_getaffinity(0)),
        "runtimes": {name: found for name in RUNTIMES if (found := _version(name))},
        "agent_sha256": _sha256(os.path.abspath(__file__)),
    }


def cpu_model(root: str = "/") -> str:
    """The CPU's name; on ARM, whose cpuinfo has none, the part numbers of its cores ("0xd08")."""
    lines = [line.partition(":") for line in _text(os.path.join(root, "proc/cpuinfo")).splitlines()]
    for key in ("model name", "CPU part"):
        names = {value.strip() for name, _, value in lines if name.strip() == key}
        if names:
            return ", ".join(sorted(names))
    return platform.processor() or "unknown"


def machine_state(root: str = "/") -> Json:
    """What can spoil a measurement, now: frequencies, governors, temperatures, the Pi's throttle word, load. Absent files: absent keys."""
    cpu = os.path.join(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/")
    zones = glob.glob(os.path.join(root, "sys/class/thermal/thermal_zone*/temp"))
    throttle = _text(os.path.join(root, "sys/devices/platform/soc/soc:firmware/get_throttled")).strip()
    load = _text(os.path.join(root, "proc/loadavg")).split()
    state = {
        "frequencies_khz": [int(text) for path in sorted(glob.glob(cpu + "scaling_cur_freq")) if (text := _text(path).strip()).isdigit()],
        "governors": sorted({_text(path).strip() for path in glob.glob(cpu + "scaling_governor")} - {""}),
        "temperatures_c": [int(text) / 1000 for path in sorted(zones) if (text := _text(path).strip()).lstrip("-").isdigit()],
        "throttle_word": int(throttle, 16) if throttle else None,
        "load_average": float(load[0]) if load else None,
    }
    return {key: value for key, value in state.items() if value not in ([], None)}


def measure(
    artifact: str,
    threads: int = 1,
    cpus: list[int] | None = None,
    seed: int = 0,
    inputs: Json | None = None,
    **schedule: float,
) -> Json:
    """Run times of every inference in ns, the first one and loading in ms, peak memory of the process in bytes."""
    steps = {"min_runs": 50, "min_seconds": 5.0, "warmup_runs": 10, "warmup_seconds": 1.0}
    unknown = schedule.keys() - steps.keys()
    if unknown:
        raise RequestError("bad_request", f"unknown option(s) {', '.join(sorted(unknown))}")
    steps.update(schedule)
    if cpus:
        os.sched_setaffinity(0, cpus)  # before the runtime starts its threads: they inherit it
    infer, load_ms, signature = _session(artifact, threads, inputs, seed)
    started = time.perf_counter_ns()
    infer()
    first_ms = (time.perf_counter_ns() - started) / 1e6
    warmup = _loop(infer, steps["warmup_runs"], steps["warmup_seconds"])
    before = machine_state()
    started, started_cpu = time.perf_counter_ns(), time.thread_time_ns()
    times_ns = _loop(infer, max(1, steps["min_runs"]), steps["min_seconds"])
    cpu_share = (time.thread_time_ns() - started_cpu) / (time.perf_counter_ns() - started)
    after = machine_state()
    return {
        "times_ns": times_ns,
        "first_ms": first_ms,
        "load_ms": load_ms,
        "warmup_runs": len(warmup),
        "cpu_share": cpu_share,  # how much of the time the calling thread had a CPU: well below 1, others had it
        "peak_memory_bytes": peak_memory_bytes(),
        "before": before,
        "after": after,
        "inputs": signature,
        "threads": threads,
        "cpus": sorted(os.sched_getaffinity(0)),
        "artifact_sha256": _sha256(artifact),
        "runtime": "onnxruntime " + _version("onnxruntime"),
    }


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far (VmHWM): Python, runtime, weights and activations."""
    for line in _text("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _answer(request: Json) -> Json:
    arguments = {key: value for key, value in request.items() if key not in ("do", "id")}
    if request.get("do") == "hello":
        return hello()
    if request.get("do") == "measure":
        return measure(**arguments)
    raise RequestError("bad_request", f"unknown request {request.get('do')!r}: there is hello, measure")


def _session(artifact: str, threads: int, inputs: Json | None, seed: int) -> tuple[Callable[[], None], float, Json]:
    """(a function that runs one inference, load time in ms, the inputs it uses)."""
    try:
        import numpy as np
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError as error:
        raise RequestError("missing_runtime", f"{error} (Python {sys.executable})") from error
    errors = tuple(e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    started = time.perf_counter_ns()
    try:
        session = onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
    except errors as error:
        raise RequestError("bad_artifact", str(error)) from error
    load_ms = (time.perf_counter_ns() - started) / 1e6
    signature: dict[str, Json] = {}
    for node in session.get_inputs():
        signature[node.name] = {"shape": [d if isinstance(d, int) else 1 for d in node.shape], "dtype": _TYPES[node.type]}
    signature.update(inputs or {})
    random = np.random.default_rng(seed)
    feed = {name: _random_input(random, **tensor) for name, tensor in signature.items()}

    def infer() -> None:
        try:
            session.run(None, feed)
        except errors as error:
            raise RequestError("bad_artifact", str(error)) from error

    return infer, load_ms, signature


def _random_input(random: Any, shape: list[int], dtype: str) -> Any:
    """Uniform in [0, 1), or whole numbers below 100."""
    return (random.random(shape) * (1 if "float" in dtype else 100)).astype(dtype)


def _loop(infer: Callable[[], None], min_runs: float, min_seconds: float) -> list[int]:
    """Run times in ns, until both limits are reached."""
    times_ns: list[int] = []
    clock = time.perf_counter_ns
    end = clock() + int(min_seconds * 1e9)
    while len(times_ns) < min_runs or clock() < end:
        started = clock()
        infer()
        times_ns.append(clock() - started)
    return times_ns


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        # a wheel under another name (onnxruntime-gpu) still gives the module
        return "unknown version" if importlib.util.find_spec(package.replace("-", "_")) else ""


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # absent on this machine, or there but unreadable (thermal zones give EINVAL)
        return ""


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def main() -> None:
    """Serve stdin, with stdout kept for replies alone: what native libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
