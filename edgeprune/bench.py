"""The regression gate: what this revision makes of fixed networks, beside a baseline file or another revision.

Every reference network goes through the whole of `compress` to half its MACs without training. What comes out is compared:
MACs, parameters, bytes and accuracy are the same on every run of the same code, so any difference beyond the limit counts.
Latency is not: a machine is faster at some hours than at others. So nothing is compared that was not measured in alternation, the
network's processes with those of a yardstick (a fixed graph that no revision changes; for a baseline) or with those of the other
revision's artifact; and a network counts as slower only when the lower end of the ratio's 95 % interval lies beyond the limit.
Instructions that one inference executes on an emulated ARM CPU repeat within a percent, whatever the machine does, so one percent is
their limit.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.device.emulated import TOLERANCE, counts, default_folder, runtime
from edgeprune.errors import UsageError
from edgeprune.run import product_version, write_json

if TYPE_CHECKING:
    from edgeprune.train import Progress

NETWORKS = ("digits", "residual", "mobile")
HIGHER_IS_BETTER = ("accuracy",)
INSTRUCTIONS = "arm_insns_per_inference"
TURNS = 4  # of three processes each, the two sides in alternation
_RESAMPLES = 4000


@dataclass(frozen=True)
class Figures:
    """What one network came to: `exact` by name (the same on every run of the same code), and run times side by side.

    beside_ms: (this network, yardstick or other revision) medians of processes that ran in alternation; empty when not measured.
    instructions: executed by one inference, by the emulated ARM CPU; where there are none, `not_counted` says why.
    """

    exact: Mapping[str, float]
    beside_ms: tuple[tuple[float, float], ...] = ()
    instructions: Mapping[str, int] = field(default_factory=dict)
    not_counted: str = "not asked for"


@dataclass(frozen=True)
class Change:
    """One figure of one network, before and after; `worse` is the relative loss (0.1: a tenth worse), `low` its certain part."""

    network: str
    figure: str
    before: float
    after: float
    worse: float
    low: float

    def words(self) -> str:
        """One line for people."""
        if self.before == self.after:
            return f"{self.network}: {self.figure} {digits_of(self.after)}, unchanged"
        sign = "worse" if self.worse > 0 else "better"
        return f"{self.network}: {self.figure} {digits_of(self.before)} -> {digits_of(self.after)} ({abs(self.worse):.2%} {sign})"


def digits_of(figure: float) -> str:
    """A figure as people compare it: a count with all its digits, six of anything else."""
    return f"{figure:,.0f}" if float(figure).is_integer() else f"{figure:.6g}"


def run(names: Sequence[str], artifacts: Path, *, latency: bool, instructions: bool = False, progress: Progress) -> dict[str, Figures]:
    """Figures of the named reference networks (none: all), their artifacts written to `artifacts`/NAME.onnx.

    Takes about 15 s a network, twice that with `latency` (beside the yardstick), and 20 s more with `instructions` where there is an
    emulated board. Raises UsageError for an unknown name.
    """
    chosen = tuple(names) or NETWORKS
    if unknown := [n for n in chosen if n not in NETWORKS]:
        raise UsageError(f"unknown reference network {unknown[0]!r}; there is: {', '.join(NETWORKS)}.")
    artifacts.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, name in enumerate(chosen):
        progress("compressing reference networks", number, len(chosen))
        found[name] = Figures(_compressed(name, artifacts / f"{name}.onnx"))
    progress("compressing reference networks", len(chosen), len(chosen))
    if instructions:
        found = counted(found, artifacts, progress=progress)
    if not latency:
        return found
    with tempfile.TemporaryDirectory() as folder:
        ruler = yardstick(Path(folder) / "yardstick.onnx")
        return {
            name: replace(figures, beside_ms=alternate(artifacts / f"{name}.onnx", ruler, what=name, progress=progress))
            for name, figures in found.items()
        }


def counted(figures: Mapping[str, Figures], artifacts: Path, *, progress: Progress) -> dict[str, Figures]:
    """The figures with instructions counted in `artifacts`/NAME.onnx, or the reason why they cannot be counted here."""
    found, reason = counts({name: artifacts / f"{name}.onnx" for name in figures}, progress=progress)
    return {name: replace(known, instructions=found.get(name, {}), not_counted=reason) for name, known in figures.items()}


def beside(
    revision: str, names: Sequence[str], *, instructions: bool = False, progress: Progress
) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """(this revision's figures, the other's), with latencies measured in alternation and instructions counted in this one run.

    Raises UsageError where edgeprune does not run from its git checkout, or the revision has no bench of its own.
    """
    with tempfile.TemporaryDirectory() as folder, _checkout(revision, Path(folder)) as (checkout, python_path):
        theirs = Path(folder) / "theirs.json"
        command = [sys.executable, "-m", "edgeprune", "bench", *names, "--no-latency"]
        command += ["--artifacts", f"{folder}/theirs", "--out", str(theirs)]
        progress(f"compressing with {revision}", 0, 1)
        there = os.environ | {"PYTHONPATH": python_path, "EDGEPRUNE_EMULATED_BOARD": f"{folder}/none"}  # what is counted is counted here
        done = subprocess.run(command, cwd=checkout, env=there, capture_output=True, text=True, check=False)
        if done.returncode or not theirs.is_file():
            last = done.stderr.strip().splitlines()[-1:] or ["no word"]
            raise UsageError(f"revision {revision} could not run its bench ({last[0]}): choose one that has `edgeprune bench`.")
        progress(f"compressing with {revision}", 1, 1)
        ours = run(names, Path(folder) / "ours", latency=False, progress=progress)
        other = read(theirs)[0]
        if instructions:
            ours, other = (
                counted(figures, Path(folder) / side, progress=progress) for side, figures in (("ours", ours), ("theirs", other))
            )
        timed = {}
        for name, figures in ours.items():
            files = (Path(folder) / side / f"{name}.onnx" for side in ("ours", "theirs"))
            timed[name] = replace(figures, beside_ms=alternate(*files, what=name, progress=progress))
        return timed, other


def alternate(first: Path, second: Path, *, what: str, progress: Progress) -> tuple[tuple[float, float], ...]:
    """Process medians in ms of two artifacts on this machine, measured in alternation; about 20 s for small networks."""
    from edgeprune.device.measure import QUICK, measure_host

    pairs: list[tuple[float, float]] = []
    for turn in range(TURNS):
        progress(f"measuring {what}", turn, TURNS)
        sides = (first, second) if turn % 2 == 0 else (second, first)  # neither side always comes first
        times = {file: measure_host(file, **(QUICK | {"processes": 3})).process_medians_ms for file in sides}
        pairs.extend(zip(times[first], times[second], strict=True))
    progress(f"measuring {what}", TURNS, TURNS)
    return tuple(pairs)


def changes(
    after: Mapping[str, Figures],
    before: Mapping[str, Figures],
    *,
    same_machine: bool = True,
    same_board: bool = True,
    paired: bool = False,
) -> tuple[Change, ...]:
    """Every figure both sides have. `paired`: `after` was measured beside `before` itself, not beside the yardstick.

    Latencies are compared on the same machine only, instructions on emulated boards with the same runtime (`same_board`).
    """
    found = []
    for name in after:
        if name not in before:
            continue
        now, then = after[name], before[name]
        for figure in now.exact:
            if figure in then.exact:
                found.append(_exact(name, figure, then.exact[figure], now.exact[figure]))
        for cpu in now.instructions if same_board else ():
            if cpu in then.instructions:
                found.append(_exact(name, f"{INSTRUCTIONS} on {cpu}", then.instructions[cpu], now.instructions[cpu]))
        if paired and now.beside_ms:
            found.append(_latency(name, now.beside_ms, None))
        elif same_machine and now.beside_ms and then.beside_ms:
            found.append(_latency(name, now.beside_ms, then.beside_ms))
    return tuple(found)


def regressions(found: Sequence[Change], max_regression_percent: float) -> tuple[Change, ...]:
    """The changes that are worse by more than the limit beyond doubt; of instructions, by more than a percent."""

    def limit(figure: str) -> float:
        return min(max_regression_percent / 100, TOLERANCE if figure.startswith(INSTRUCTIONS) else math.inf)

    return tuple(change for change in found if change.low > limit(change.figure))


def machine() -> dict[str, Any]:
    """What decides whether latencies may be compared (CPU, cores, runtimes) and counts of instructions (the emulated board's runtime)."""
    from edgeprune.device.agent import hello

    facts = {key: value for key, value in hello().items() if key in ("cpu", "machine", "cores", "runtimes")}
    return facts | {"emulated": runtime(default_folder())}


def words(figures: Mapping[str, Figures], found: Sequence[Change], worse: Sequence[Change]) -> dict[str, Any]:
    """The JSON object of the command and, without changes, of a baseline."""
    networks = {name: _entry(f) for name, f in figures.items()}
    compared = {"changes": [asdict(c) for c in found], "regressions": [asdict(c) for c in worse]}
    return {"edgeprune": product_version(), "machine": machine(), "networks": networks, **compared}


def _entry(figures: Figures) -> dict[str, Any]:
    entry = {"exact": dict(figures.exact), "beside_ms": figures.beside_ms, INSTRUCTIONS: dict(figures.instructions) or None}
    return entry | ({} if figures.instructions else {f"{INSTRUCTIONS}_is_null_because": figures.not_counted})


def write(path: Path, figures: Mapping[str, Figures]) -> None:
    """A file that `read` takes as a baseline."""
    write_json(path, words(figures, (), ()))


def read(path: Path) -> tuple[dict[str, Figures], Mapping[str, Any]]:
    """(figures by network, the machine they are from). Raises UsageError for a file that `write` did not write."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        figures = {
            str(name): Figures(
                {str(key): float(value) for key, value in entry["exact"].items()},
                tuple((float(a), float(b)) for a, b in entry["beside_ms"]),
                {str(cpu): int(count) for cpu, count in (entry.get(INSTRUCTIONS) or {}).items()},
                str(entry.get(f"{INSTRUCTIONS}_is_null_because", "")),
            )
            for name, entry in text["networks"].items()
        }
        return figures, dict(text["machine"])
    except OSError as error:
        raise UsageError(
            f"the baseline {path} cannot be read ({error.strerror}): write one with `edgeprune bench --out {path}`."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is no baseline ({type(error).__name__}: {error}): write one with `edgeprune bench --out FILE`."
        ) from error


def yardstick(path: Path) -> Path:
    """A fixed graph to measure beside: six 3x3 convs with ReLU, written without any of the exporter's code."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    widths = (3, 16, 32, 32, 32, 32, 32)
    nodes, weights, last = [], [], "input"
    for number, (narrow, wide) in enumerate(pairwise(widths)):
        values = (random.standard_normal((wide, narrow, 3, 3)) / math.sqrt(9 * narrow)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{number}"))
        nodes.append(helper.make_node("Conv", [last, f"w{number}"], [f"c{number}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        last = f"r{number}"
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 32, 32]) for n, c in (("input", 3), (last, widths[-1]))]
    graph = helper.make_graph(nodes, "yardstick", shapes[:1], shapes[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def _compressed(name: str, target: Path) -> dict[str, float]:
    """Exact figures of a reference network at half its MACs; the artifact goes to `target`."""
    import torch

    from edgeprune.api import compress
    from edgeprune.plan import Budget
    from edgeprune.reference import reference
    from edgeprune.train import Recipe

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        model, example, data = reference(name)
        result = compress(
            model, example, budget=Budget(macs=0.5), device="rpi4", data=data, recipe=Recipe(epochs=0), out=Path(folder) / name, name=name
        )
        content = (result.folder / "model.onnx").read_bytes()
    target.write_bytes(content)
    reached = {figure["name"]: figure["after"]["value"] for figure in result.facts["figures"]}
    return {"size_bytes": len(content)} | {name: reached[name] for name in ("macs", "params", "accuracy") if name in reached}


def _exact(network: str, figure: str, before: float, after: float) -> Change:
    loss = (before - after if figure in HIGHER_IS_BETTER else after - before) / abs(before) if before else float(after != before)
    return Change(network, figure, before, after, loss, loss)


def _latency(network: str, after: Sequence[tuple[float, float]], before: Sequence[tuple[float, float]] | None) -> Change:
    """Latency by the ratio to what was measured beside it; without `before`, that was the other revision."""
    now = _log_ratios(after)
    then = _log_ratios(before) if before else np.zeros(1)
    low = math.expm1(lower_bound(now, then))
    worse = math.expm1(float(np.median(now) - np.median(then)))
    was = float(np.median([b for _, b in after])) if before is None else float(np.median([a for a, _ in before]))
    return Change(network, "latency_ms", was, was * (1 + worse), worse, low)


def lower_bound(now: NDArray[np.float64], then: NDArray[np.float64]) -> float:
    """The lower end of the 95 % bootstrap interval of median(now) - median(then), widened for few values by the t quantile."""
    from scipy.special import stdtrit

    random = np.random.default_rng(0)
    drawn = [np.median(side[random.integers(len(side), size=(_RESAMPLES, len(side)))], axis=1) for side in (now, then)]
    difference = float(np.median(now) - np.median(then))
    deviation = float(np.percentile(drawn[0] - drawn[1], 2.5)) - difference
    fewest = min((len(side) for side in (now, then) if len(side) > 1), default=2)
    return difference + min(0.0, deviation) * float(stdtrit(fewest - 1, 0.975)) / 1.959964


def _log_ratios(pairs: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    both = np.log(np.array(pairs, dtype=np.float64))
    ratios: NDArray[np.float64] = both[:, 0] - both[:, 1]
    return ratios


@contextmanager
def _checkout(revision: str, folder: Path) -> Iterator[tuple[Path, str]]:
    """A worktree of another revision of this very code, gone afterwards: (its folder, what PYTHONPATH finds it by)."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        raise UsageError("--against compares revisions, so edgeprune must run from its git checkout; here it is installed without one.")
    place = folder / "checkout"
    git = ["git", "-C", str(root), "worktree"]
    added = subprocess.run([*git, "add", "--detach", str(place), revision], capture_output=True, text=True, check=False)
    if added.returncode:
        raise UsageError(f"git cannot check out {revision!r}: {added.stderr.strip().splitlines()[-1]}.")
    try:
        yield place, str(place)
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], capture_output=True, check=False)
