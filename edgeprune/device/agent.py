"""The measuring agent: this one file, standard library only, is what runs on the machine that is measured.

Started as `python agent.py` it answers JSON lines: one request on stdin, one reply on stdout. Nothing else reaches stdout. A request
is {"do": NAME, "id": ANY, …}; a reply repeats the id and is {"ok": true, "protocol": 2, …} or {"ok": false, "protocol": 2, "error":
{"kind": K, "message": M}} with K one of bad_request, missing_runtime, bad_artifact, busy, not_permitted, crashed, late, failed.

    hello                                        the machine, its Python and the runtimes that are installed
    lock owner wait_seconds                      take the board until this process ends; `busy` names who has it, and for how long
    governor name                                set the CPUs' frequency governor until this process ends
    settle wait_seconds                          wait until the temperatures stand still
    measure artifact threads cpus seed           every run time of one session, with memory and the machine's state around it;
            min_runs min_seconds                 the runs go on until both are reached
            warmup_runs warmup_seconds inputs    inputs: {name: {"shape": [...], "dtype": "float32"}}, default: the artifact's, batch 1
    operations artifact threads cpus scratch     microseconds of every operation, where the runtime gives them
    evaluate artifact arrays threads             outputs for the inputs in `arrays` (.npz, or .npy for one input), sample by sample
    sensors power                                the power sources that power.py (its path) finds, and what keeps it from others
    energy artifact power source hz …            power over alternating idle and active windows, see `energy`

`fresh: true` (with limit_seconds) has a request answered by a new process of the agent. The process ends when stdin ends (what was
asked before has --grace seconds left) or, with --silence, when not even an empty line came for so long: a lost connection leaves
nothing behind. numpy and the runtimes are imported only by what needs them. Python 3.9 and later: boards are older than the host.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import functools
import glob
import hashlib
import importlib.util
import json
import os
import platform
import queue
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO

PROTOCOL = 2
RUNTIMES = ("onnxruntime", "ai-edge-litert", "tflite-runtime", "numpy")
LOCK = os.environ.get("EDGEPRUNE_LOCK", "edgeprune-board")  # a name in the kernel's abstract socket space: no file, gone with its owner
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(uint8)": "uint8"}
_TYPES.update({"tensor(int8)": "int8", "tensor(int32)": "int32", "tensor(int64)": "int64", "tensor(bool)": "bool"})
_QUANTIZED = (b"QuantizeLinear", b"QLinearConv", b"QLinearMatMul", b"ConvInteger", b"MatMulInteger", b"QGemm", b"QAttention")

Json = dict[str, Any]


class RequestError(Exception):
    """A request that cannot be answered; `kind` is the machine-readable reason."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def serve(requests: Iterable[str], replies: TextIO, session: Session | None = None) -> None:
    """Answer every line of `requests` with one line on `replies`."""
    session = session or Session()
    for line in requests:
        if not line.strip():
            continue
        identity = None
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise RequestError("bad_request", "a request is a JSON object")
            identity = request.pop("id", None)
            reply = {"ok": True, **session.answer(request)}
        except RequestError as error:
            reply = _failure(error.kind, str(error))
        except (ValueError, TypeError, KeyError) as error:
            reply = _failure("bad_request", f"{type(error).__name__}: {error}")
        except (OSError, MemoryError) as error:
            reply = _failure("failed", f"{type(error).__name__}: {error}")
        replies.write(json.dumps({**reply, "id": identity, "protocol": PROTOCOL}) + "\n")
        replies.flush()


class Session:
    """What lasts as long as the process: the lock, the governors as they were, and the process that is at work."""

    def __init__(self) -> None:
        self._lock: socket.socket | None = None
        self._child: subprocess.Popen[str] | None = None
        self._governors: dict[str, str] = {}

    def answer(self, request: Json) -> Json:
        """The reply to one request."""
        if request.pop("fresh", False):
            return self._fresh(request, request.pop("limit_seconds"))
        answers: dict[str, Callable[..., Json]] = {"hello": hello, "lock": self._take, "governor": self._govern, "settle": settle}
        answers |= {"measure": measure, "operations": operations, "evaluate": evaluate, "sensors": sensors, "energy": energy}
        name = request.pop("do", None)
        if name not in answers:
            raise RequestError("bad_request", f"unknown request {name!r}: there is {', '.join(answers)}")
        return answers[name](**request)

    def end(self) -> None:
        """Leave the board as it was found."""
        if self._child:
            self._child.kill()
        for path, name in self._governors.items():
            with open(path, "w", encoding="ascii") as file:
                file.write(name)

    def _fresh(self, request: Json, limit_seconds: float) -> Json:
        """The reply of a new process; it dies with this one, because its stdin does."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(request.get("threads", 1)), "PYTHONHASHSEED": "0"}
        command = [sys.executable, os.path.abspath(__file__), "--grace", "0"]
        pipes: Json = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, env=environment, **pipes) as child:
            assert child.stdin and child.stdout and child.stderr
            self._child, late = child, threading.Event()
            errors: collections.deque[str] = collections.deque(maxlen=1)  # the last line says why
            listener = threading.Thread(target=errors.extend, args=(filter(str.strip, child.stderr),), daemon=True)

            def stop() -> None:
                late.set()
                child.kill()

            timer = threading.Timer(limit_seconds, stop)
            listener.start()
            timer.start()
            try:
                os.write(child.stdin.fileno(), (json.dumps(request) + "\n").encode())
                line = child.stdout.readline()
            except BrokenPipeError:
                line = ""
            try:
                if not line.endswith("\n"):
                    child.wait(timeout=2.0)  # its own status says more than that of being killed
            except subprocess.TimeoutExpired:
                pass
            finally:
                timer.cancel()
                child.kill()
                listener.join(timeout=1.0)
                self._child = None
            status = child.wait()
        if late.is_set():
            raise RequestError("late", f"gave no result within {limit_seconds:.0f} s and was stopped")
        if not line.endswith("\n"):
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise RequestError("crashed", f"{how} without a result ({errors[-1].strip() if errors else 'nothing on stderr'})")
        reply: Json = json.loads(line)
        if not reply["ok"]:
            raise RequestError(reply["error"]["kind"], reply["error"]["message"])
        return reply

    def _take(self, owner: str, wait_seconds: float = 0.0) -> Json:
        """The board for this process; the kernel gives it back when the process ends, however it ends."""
        if self._lock:
            return {"owner": owner}
        name, end = "\0" + LOCK, time.monotonic() + wait_seconds
        taken = socket.socket(socket.AF_UNIX)
        while True:
            try:
                taken.bind(name)
                break
            except OSError:
                if time.monotonic() >= end:
                    taken.close()
                    raise RequestError("busy", _holder(name)) from None
                time.sleep(0.2)
        taken.listen()
        self._lock = taken
        since = time.monotonic()

        def tell() -> None:
            while True:
                asker, _ = taken.accept()
                with asker:
                    asker.sendall(json.dumps({"owner": owner[:100], "seconds": time.monotonic() - since}).encode())

        threading.Thread(target=tell, daemon=True).start()
        return {"owner": owner}

    def _govern(self, name: str, root: str = "/") -> Json:
        """Set every CPU's governor; what they were before comes back and is restored at the end."""
        paths = sorted(glob.glob(os.path.join(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")))
        before = {path: _text(path).strip() for path in paths}
        try:
            for path in paths:
                with open(path, "w", encoding="ascii") as file:
                    file.write(name)
                self._governors.setdefault(path, before[path])
        except PermissionError as error:
            raise RequestError("not_permitted", f"{error.filename} is root's to write") from error
        return {"before": sorted(set(before.values())), "cpus": len(paths)}


def _holder(name: str) -> str:
    """Who holds the lock; the process and user are the kernel's word, the rest is the holder's."""
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(2.0)
            asking.connect(name)
            pid, uid, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            told = json.loads(asking.recv(4096).decode())
            return f"in use by {told['owner']} for {told['seconds']:.0f} s (process {pid}, user id {uid})"
    except (OSError, ValueError, KeyError):
        return "in use by somebody who does not answer"


def hello() -> Json:
    """The machine and what is installed on it."""
    system = dict(line.split("=", 1) for line in _text("/etc/os-release").splitlines() if "=" in line)
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "machine": platform.machine(),
        "pointer_bits": 8 * struct.calcsize("P"),
        "system": platform.system(),
        "os": system.get("PRETTY_NAME", "").strip('"'),
        "kernel": platform.release(),
        "cpu": cpu_field("model name", "CPU part") or platform.processor() or "unknown",
        "cpu_features": cpu_field("flags", "Features"),
        "board": (_text("/proc/device-tree/model") or _text("/sys/firmware/devicetree/base/model")).strip("\0 \n"),
        "nvpmodel": _text("/var/lib/nvpmodel/status").strip(),
        "cores": os.cpu_count() or 1,
        "cpus": sorted(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(os.path.dirname(os.path.abspath(__file__))).free,
        "runtimes": {name: found for name in RUNTIMES if (found := _version(name))},
        "agent_sha256": _sha256(os.path.abspath(__file__)),
        "state": machine_state(),
    }


def cpu_field(*keys: str, root: str = "/") -> str:
    """The first of these fields that /proc/cpuinfo has, its distinct values joined: x86 names its CPU, ARM numbers its cores' parts."""
    lines = [line.partition(":") for line in _text(os.path.join(root, "proc/cpuinfo")).splitlines()]
    found = [sorted({value.strip() for name, _, value in lines if name.strip() == key}) for key in keys]
    return next((", ".join(values) for values in found if values), "")


def machine_state(root: str = "/", cpus: Iterable[int] | None = None) -> Json:
    """What can spoil a measurement, now: frequencies (of `cpus`, default: all), governors, temperatures, the Pi's throttle word, load.

    Absent files: absent keys.
    """
    cpu = os.path.join(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/")
    zones = glob.glob(os.path.join(root, "sys/class/thermal/thermal_zone*/temp"))
    throttle = _text(os.path.join(root, "sys/devices/platform/soc/soc:firmware/get_throttled")).strip()
    load = _text(os.path.join(root, "proc/loadavg")).split()
    texts = {int(path.rpartition("/cpufreq")[0].rpartition("cpu")[2]): _text(path).strip() for path in glob.glob(cpu + "scaling_cur_freq")}
    frequencies = {number: int(text) for number, text in texts.items() if text.isdigit()}
    state = {
        "frequencies_khz": [khz for number, khz in sorted(frequencies.items()) if cpus is None or number in cpus],
        "governors": sorted({_text(path).strip() for path in glob.glob(cpu + "scaling_governor")} - {""}),
        "temperatures_c": [int(text) / 1000 for path in sorted(zones) if (text := _text(path).strip()).lstrip("-").isdigit()],
        "throttle_word": int(throttle, 16) if throttle else None,
        "load_average": float(load[0]) if load else None,
    }
    return {key: value for key, value in state.items() if value not in ([], None)}


def settle(wait_seconds: float, window_seconds: float = 5.0, within_c: float = 1.0, root: str = "/") -> Json:
    """Wait until no temperature moves by more than `within_c` over a window, or the limit; at once where there is no sensor."""
    started, seen = time.monotonic(), [machine_state(root).get("temperatures_c", [])]
    settled = not seen[0]
    while not settled and time.monotonic() - started < wait_seconds:
        time.sleep(window_seconds / 5)
        seen.append(machine_state(root).get("temperatures_c", []))
        last = seen[-6:]
        settled = len(last) == 6 and all(max(zone) - min(zone) <= within_c for zone in zip(*last))
    return {"settled": settled, "waited_seconds": time.monotonic() - started, "temperatures_c": seen[-1]}


class Loaded:
    """An artifact in its runtime. `set` takes inputs by name, `run` is one inference, `outputs` what it gave."""

    def __init__(self, artifact: str, threads: int, profile: str = "") -> None:
        opener = {".onnx": self._onnx, ".tflite": self._tflite}.get(os.path.splitext(artifact)[1])
        if opener is None:
            raise RequestError("bad_artifact", f"{artifact} is neither .onnx nor .tflite")
        try:
            import numpy  # noqa: F401  the runtimes' own import errors name it less clearly

            opener(artifact, threads, profile)
        except ImportError as error:
            raise RequestError("missing_runtime", f"{error} (Python {sys.executable})") from error
        self.load_ms = (time.perf_counter_ns() - self._imported_ns) / 1e6

    def _onnx(self, artifact: str, threads: int, profile: str) -> None:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # or it keeps a device id and a database in the account's cache folder
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        self.errors = tuple(e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception))
        self.runtime = "onnxruntime " + _version("onnxruntime")
        self.baseline_bytes, self._imported_ns = _status_bytes("VmRSS"), time.perf_counter_ns()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
        options.enable_profiling, options.profile_file_prefix = bool(profile), profile or "unused"
        session = self.guarded(lambda: onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"]))
        shapes = {node.name: [d if isinstance(d, int) else 1 for d in node.shape] for node in session.get_inputs()}
        self.inputs = {n.name: {"shape": shapes[n.name], "dtype": _TYPES[n.type]} for n in session.get_inputs()}
        with open(artifact, "rb") as file:
            content = file.read()
        self.quantized = any(word in content for word in _QUANTIZED)
        feed: Json = {}
        kept: list[Any] = []
        self.set: Callable[[Json], None] = feed.update
        self.run: Callable[[], None] = lambda: self.guarded(lambda: kept.__setitem__(slice(None), session.run(None, feed)))
        self.outputs: Callable[[], list[Any]] = lambda: list(kept)
        self.end_profiling = session.end_profiling

    def _tflite(self, artifact: str, threads: int, profile: str) -> None:
        package = "ai-edge-litert" if _version("ai-edge-litert") else "tflite-runtime"
        interpreter_module = importlib.import_module(package.replace("-", "_") + ".interpreter")
        self.baseline_bytes, self._imported_ns = _status_bytes("VmRSS"), time.perf_counter_ns()
        self.errors = (ValueError, RuntimeError)
        self.runtime = f"{package} {_version(package)}"
        interpreter = self.guarded(lambda: interpreter_module.Interpreter(model_path=artifact, num_threads=threads))
        self.guarded(interpreter.allocate_tensors)
        details = {d["name"]: d for d in interpreter.get_input_details()}
        self.inputs = {name: {"shape": [int(n) for n in d["shape"]], "dtype": d["dtype"].__name__} for name, d in details.items()}
        self.quantized = any(d["dtype"].__name__ == "int8" for d in interpreter.get_tensor_details())

        def set_inputs(arrays: Json) -> None:
            for name, array in arrays.items():
                self.guarded(functools.partial(interpreter.set_tensor, details[name]["index"], array))

        self.set = set_inputs  # outside the timed run, as the runtime's own benchmark does
        self.run = lambda: self.guarded(interpreter.invoke)
        self.outputs = lambda: [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]

    def guarded(self, call: Callable[[], Any]) -> Any:
        """What `call` gives; the runtime's complaints become ours."""
        try:
            return call()
        except self.errors as error:
            raise RequestError("bad_artifact", str(error)) from error

    def fill(self, inputs: Json | None, seed: int) -> Json:
        """Set random inputs, uniform in [0, 1) or whole numbers below 100; what they were comes back."""
        import numpy as np

        random, signature = np.random.default_rng(seed), {**self.inputs, **(inputs or {})}
        self.set({n: (random.random(t["shape"]) * (1 if "float" in t["dtype"] else 100)).astype(t["dtype"]) for n, t in signature.items()})
        return signature


def measure(
    artifact: str,
    threads: int = 1,
    cpus: list[int] | None = None,
    seed: int = 0,
    inputs: Json | None = None,
    **schedule: float,
) -> Json:
    """Run times of every inference in ns, the first one and loading in ms, peak memory of the process in bytes.

    network_memory_bytes: what the process had at most in its inferences, beyond what it had when the runtime was imported.
    """
    steps = {"min_runs": 50, "min_seconds": 5.0, "warmup_runs": 10, "warmup_seconds": 1.0, **schedule}
    if len(steps) > 4:
        raise RequestError("bad_request", f"unknown option(s) in {', '.join(schedule)}")
    loaded, facts = _loaded(artifact, threads, cpus, seed=seed, inputs=inputs)
    loading_bytes = _forget_loading()
    started = time.perf_counter_ns()
    loaded.run()
    first_ms = (time.perf_counter_ns() - started) / 1e6
    warmup = _warm(loaded.run, steps["warmup_runs"], steps["warmup_seconds"])
    before = machine_state(cpus=facts["cpus"])  # those that idle may slow down
    started, started_cpu = time.perf_counter_ns(), time.thread_time_ns()
    times_ns = _loop(loaded.run, max(1, steps["min_runs"]), steps["min_seconds"])
    cpu_share = (time.thread_time_ns() - started_cpu) / (time.perf_counter_ns() - started)
    return {
        "times_ns": times_ns,
        "first_ms": first_ms,
        "warmup_runs": len(warmup),
        "cpu_share": cpu_share,  # how much of the time the calling thread had a CPU: well below 1, others had it
        "peak_memory_bytes": max(peak := peak_memory_bytes(), loading_bytes),
        "network_memory_bytes": peak - loaded.baseline_bytes,
        "before": before,
        "after": machine_state(cpus=facts["cpus"]),
        **facts,
    }


def operations(
    artifact: str,
    *,
    threads: int = 1,
    cpus: list[int] | None = None,
    scratch: str | None = None,
    min_runs: float = 20,
    min_seconds: float = 1.0,
) -> Json:
    """Median time of every operation in microseconds, in the order of execution; null where the runtime has no profiler for us.

    Profiling costs time of its own: the sum is more than the latency that `measure` finds. `scratch`: where the runtime may write
    its trace for a moment.
    """
    if not artifact.endswith(".onnx"):
        return {"operations": None, "reason": "LiteRT's Python interface has no profiler"}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        loaded, _ = _loaded(artifact, threads, cpus, profile=os.path.join(folder, "trace"))
        _loop(loaded.run, min_runs, min_seconds)
        with open(loaded.end_profiling(), encoding="utf-8") as file:
            events = json.load(file)
    found: dict[str, tuple[str, list[int]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"][: -len("_kernel_time")]
            found.setdefault(name, (event["args"].get("op_name", ""), []))[1].append(event["dur"])
    rows = [{"name": name, "op": op, "time_us": sorted(times)[len(times) // 2]} for name, (op, times) in found.items()]
    return {"operations": rows, "runs": max((len(times) for _, times in found.values()), default=0)}


def evaluate(artifact: str, arrays: str, threads: int = 1) -> Json:
    """The outputs for every sample in the file `arrays`, batch first, as base64 of C-ordered values; run one sample at a time.

    Arrays of a .npz belong to the inputs of the same names, or in their order to the artifact's inputs where no name fits.
    """
    loaded = Loaded(artifact, threads)
    import numpy as np

    content = np.load(arrays, allow_pickle=False)
    given = {name: content[name] for name in content.files} if arrays.endswith(".npz") else {"": content}
    if len(given) != len(loaded.inputs):
        raise RequestError("bad_request", f"{len(given)} array(s) for {len(loaded.inputs)} input(s)")
    if given.keys() != loaded.inputs.keys():
        given = dict(zip(loaded.inputs, given.values()))
    for name, array in given.items():
        wanted = loaded.inputs[name]
        if list(array.shape[1:]) != wanted["shape"][1:] or str(array.dtype) != wanted["dtype"]:
            raise RequestError("bad_request", f"input {name} is {array.dtype} {list(array.shape)}, the artifact takes {wanted}")
    results: list[list[Any]] = []
    for sample in range(min(map(len, given.values()))):
        loaded.set({name: array[sample : sample + 1] for name, array in given.items()})
        loaded.run()
        results.append(loaded.outputs())
    joined = [np.ascontiguousarray(np.concatenate(parts)) for parts in zip(*results)]
    outputs = [{"shape": a.shape, "dtype": str(a.dtype), "base64": base64.b64encode(a.tobytes()).decode()} for a in joined]
    return {"outputs": outputs, "quantized": loaded.quantized, "runtime": loaded.runtime}


def sensors(power: str) -> Json:
    """The power sources of this machine and what keeps it from others."""
    sources, obstacles = _module(power).survey()
    return {"sources": [source.facts() for source in sources], "obstacles": obstacles}


def energy(
    artifact: str, *, power: str | None = None, source: str | None = None, hz: float = 10.0, threads: int = 1,
    cpus: list[int] | None = None, trials: int = 5, idle_seconds: float = 10.0, active_seconds: float = 10.0,
) -> Json:  # fmt: skip
    """Power samples and the windows they fall in: idle, active, idle, active, …, idle, by the monotonic clock.

    `source` None: the sensor is elsewhere (a meter at the host) and only the windows come back; `clock_ns` is this clock at the reply.
    """
    loaded, facts = _loaded(artifact, threads, cpus)
    _loop(loaded.run, 10, 1.0)
    recorder = None
    if source is not None:
        module = _module(str(power))
        recorder = module.Recorder(next(s for s in module.survey()[0] if s.name == source), hz)
    before, clock = machine_state(), time.monotonic_ns
    windows: list[Json] = []
    for trial in range(2 * trials + 1):
        started, runs = clock(), 0
        if trial % 2:
            runs = len(_loop(loaded.run, 1, active_seconds))
        else:
            time.sleep(idle_seconds)
        windows.append({"start_ns": started, "end_ns": clock(), "runs": runs})
    samples = recorder.stop() if recorder else []
    return {"samples": samples, "windows": windows, "before": before, "after": machine_state(), "clock_ns": clock(), **facts}


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far: Python, runtime, weights and activations."""
    import resource

    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_loading() -> int:
    """The largest resident size so far; what loading left behind is given back to the system, and the peak is counted anew."""
    import ctypes

    peak = peak_memory_bytes()
    with contextlib.suppress(OSError, AttributeError):  # another C library, or a kernel that keeps its one peak
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    return peak


def _status_bytes(field: str) -> int:
    lines = (line.split() for line in _text("/proc/self/status").splitlines() if line.startswith(field + ":"))
    return next((int(words[1]) * 1024 for words in lines), 0)


def _loaded(
    artifact: str, threads: int, cpus: list[int] | None, *, seed: int = 0, inputs: Json | None = None, profile: str = ""
) -> tuple[Loaded, Json]:
    """(the artifact with random inputs set, what is to be known about how it runs)."""
    if cpus:
        os.sched_setaffinity(0, cpus)  # before the runtime starts its threads: they inherit it
    loaded = Loaded(artifact, threads, profile)
    signature = loaded.fill(inputs, seed)
    facts = {"load_ms": loaded.load_ms, "inputs": signature, "threads": threads, "cpus": sorted(os.sched_getaffinity(0))}
    return loaded, {**facts, "artifact_sha256": _sha256(artifact), "runtime": loaded.runtime, "quantized": loaded.quantized}


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


def _warm(infer: Callable[[], None], min_runs: float, min_seconds: float) -> list[int]:
    """`_loop`, and on until the last fifth of the runs is as fast as the fifth before it, within 2 %; five times as long at most."""
    times_ns, end = _loop(infer, min_runs, min_seconds), time.perf_counter_ns() + int(4e9 * min_seconds)
    while time.perf_counter_ns() < end:
        fifth = max(1, len(times_ns) // 5)
        last, before = (sorted(part)[len(part) // 2] for part in (times_ns[-fifth:], times_ns[-2 * fifth : -fifth] or times_ns))
        if abs(last - before) <= 0.02 * before:
            break
        times_ns += _loop(infer, 1, min_seconds / 5)
    return times_ns


def _module(path: str) -> Any:
    """power.py, wherever it was pushed to."""
    spec = importlib.util.spec_from_file_location("edgeprune_power", path)
    if spec is None or spec.loader is None:
        raise RequestError("bad_request", f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _failure(kind: str, message: str) -> Json:
    return {"ok": False, "error": {"kind": kind, "message": message}}


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


def _attended(session: Session, grace: float, silence: float | None) -> Iterator[str]:
    """The lines of stdin; when they end or stop coming, so does the process, whatever it is doing by then."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        rest = b""
        while select.select([0], [], [], silence)[0] and (chunk := os.read(0, 1 << 16)):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                lines.put(line.decode(errors="replace"))
        lines.put(None)
        time.sleep(grace)
        session.end()
        os._exit(3)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get()) is not None:
        yield line


def main() -> None:
    """Serve stdin, with stdout kept for replies alone: what native libraries print goes to stderr."""
    parser = argparse.ArgumentParser(description="edgeprune's measuring agent: JSON lines on stdin and stdout")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds that what was asked has left when stdin ends")
    parser.add_argument("--silence", type=float, help="seconds without any line, even an empty one, after which to end")
    options = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session = Session()
    serve(_attended(session, options.grace, options.silence), replies, session)
    session.end()


if __name__ == "__main__":
    main()
