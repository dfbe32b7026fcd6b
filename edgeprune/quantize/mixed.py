"""Which layers become int8: the least loss that costs no more time than asked, decided by timings of this machine and then measured.

Every layer has a time in fp32 and in int8 (one profiled run of each whole network by onnxruntime), a loss when it is rounded
(influence.py: of its weights and of the 8-bit tensor it reads), and every tensor between an int8 and a float node costs a conversion.
For one price of loss the best choice is a minimum cut of the network's graph, exactly; the price is lowered until the predicted time
meets the budget: what is asked for, at most the faster of all-fp32 and all-int8; by default 1 % above the fastest choice.
Predictions are not trusted: the plan and the faster end are timed in turns, and while the plan is more than 1 % slower, the half of
its layers that differ from that end and matter least goes over to it. The end itself is the last resort, so whoever measures again
finds the plan at most SLOWER times the faster end, noise of 2 % included.
Another device (Elsewhere): its card has fp32 times, which are multiplied by what int8 does to each layer here: an assumption, and the
facts say so. With a board attached its own timings judge and repair; without, nothing is measured and the prediction stands.
Where a size is asked, float layers are stored in 16 bits, then in 4, the largest and least important first, until the file fits.
Source: Greig, Porteous, Seheult, Exact Maximum A Posteriori Estimation for Binary Images, 1989, for the cut; the model is ours.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from edgeprune.export.session import session_of
from edgeprune.quantize.bits import BitPlan, Precision
from edgeprune.quantize.calibrate import Batch, Ranges, observe
from edgeprune.quantize.elsewhere import Elsewhere, Ratio
from edgeprune.quantize.grid import grid_errors
from edgeprune.quantize.influence import Influence, influences
from edgeprune.quantize.network import ARITHMETIC, MOVES, Network

SLOWER = 1.03  # times the faster end: what a plan may take
REPAIRED = 1.01  # times the faster end: what it must measure when it is chosen
WORTH = 1.01  # times the fastest choice: what accuracy is worth where no latency is asked for
_CONVERSION_NS = (1500.0, 0.25)  # of one tensor between the precisions: per call, and per element
_RUNS = 30
_SESSIONS = 3  # where a session's memory happens to lie makes a difference of some percent
_PAIRS = 30  # of runs in each
_FILE_BYTES = 8192  # of metadata, which comes later
_STEPS = 24  # of the bisection
_LARGEST = 2**30  # the sum of the cut's whole numbers


@dataclass(frozen=True)
class Choice:
    """The plan, and how it was come to, as plain values: predicted and measured figures, all of this machine."""

    plan: BitPlan
    facts: Mapping[str, Any]


def mixed_plan(
    proto: onnx.ModelProto,
    write: Callable[[BitPlan], onnx.ModelProto],
    batches: Callable[[], Any],
    *,
    threads: int = 1,
    latency_ms: float | None = None,
    size_bytes: float | None = None,
    elsewhere: Elsewhere | None = None,
) -> Choice:
    """The precision of every layer; `write` gives the network with a plan, `batches` calibration batches, again at every call.

    `latency_ms` and `size_bytes` of the file are limits, None where there is none; `threads` of this machine.
    """
    network = Network(proto)
    layers = network.layers.keys()
    ends = {"fp32": proto, "int8": write(BitPlan(dict.fromkeys(layers, "int8")))}
    influence = influences(proto, batches())
    problem = _Problem.of(network, ends, influence, batches, threads)
    if elsewhere is not None:
        problem = problem.moved(elsewhere.layer_ms)
    ratio: Ratio | None = elsewhere.ratio if elsewhere else lambda one, other: time_ratio(one, other, threads)
    predicted = {"fp32": problem.milliseconds(set()), "int8": problem.milliseconds(set(problem.units))}
    over_fp32 = ratio(ends["int8"], ends["fp32"]) if ratio else predicted["int8"] / predicted["fp32"]
    faster = "int8" if over_fp32 < 1 else "fp32"
    fastest_ms = problem.milliseconds(problem.solved(0.0))
    budget_ms = fastest_ms * WORTH if latency_ms is None else min(*predicted.values(), max(latency_ms, fastest_ms))
    units = problem.solved(budget_ms)
    chosen, end = units & layers, set(layers) if faster == "int8" else set()

    def over_end() -> float:
        if chosen == end:
            return 1.0
        return ratio(write(_plan(chosen)), ends[faster]) if ratio else problem.milliseconds(units) / predicted[faster]

    predicted_layers, repairs, over = len(chosen), 0, over_end()
    while over > REPAIRED and ratio:
        differing = sorted(chosen ^ end, key=lambda unit: (problem.importance(unit), unit))
        chosen = chosen ^ set(differing[: -(-len(differing) // 2)])
        over, repairs = over_end(), repairs + 1
    plan = _plan(chosen) if size_bytes is None else _fitting(_plan(chosen), network, influence, write, size_bytes)
    facts = {
        "basis": elsewhere.basis if elsewhere else f"timed on this machine, {threads} thread(s), batch 1",
        "int8_over_fp32": round(over_fp32, 4),
        "predicted_ms": {"budget": budget_ms, **predicted},
        "int8_layers_predicted": predicted_layers,
        "int8_layers": len(chosen),
        "layers": len(layers),
        "faster_end": faster,
        "over_faster_end": over,
        "repairs": repairs,
    }
    return Choice(plan, facts)


def _fitting(
    plan: BitPlan,
    network: Network,
    influence: Mapping[str, Influence],
    write: Callable[[BitPlan], onnx.ModelProto],
    size_bytes: float,
) -> BitPlan:
    """The plan with as many float layers as needed stored in 16 bits, then in 4; the smallest file where none fits."""
    excess = write(plan).ByteSize() + _FILE_BYTES - size_bytes
    kept = [name for name in network.layers if plan.precision(name) == "fp32"]
    weights = {name: network.layers[name].weight for name in kept}
    loss = {name: _rounding_loss(weights[name], influence[name], 4) / weights[name].size for name in kept}
    steps: tuple[tuple[Precision, float, list[str]], ...] = (
        ("fp16", 2.0, sorted(kept, key=lambda name: -weights[name].size)),
        ("int4", 1.5, sorted(kept, key=lambda name: loss[name])),
    )
    layers = dict(plan.layers)
    for precision, saved, order in steps:
        for name in order:
            if excess > 0:
                layers[name] = precision
                excess -= saved * weights[name].size
    return BitPlan(layers)


@dataclass(frozen=True, eq=False)
class _Problem:
    """Units are layers and arithmetic nodes; `edges` their tensors, (maker, reader) -> ns of a conversion; "" is always float."""

    units: tuple[str, ...]
    float_ns: Mapping[str, float]
    byte_ns: Mapping[str, float]
    loss: Mapping[str, float]
    edges: Mapping[tuple[str, str], float]

    @staticmethod
    def of(
        network: Network,
        ends: Mapping[str, onnx.ModelProto],
        influence: Mapping[str, Influence],
        batches: Callable[[], Any],
        threads: int,
    ) -> _Problem:
        """Measured times, predicted losses."""
        unit_of = _units(network)
        sizes = _Sizes([name for node in network.nodes for name in network.activations(node)])
        ranges = Ranges({layer.input for layer in network.layers.values()})
        observe(network.proto, _first(batches()), sizes, ranges)
        owners = _owners(network, unit_of)
        times = {end: _profiled(proto, owners, threads) for end, proto in ends.items()}
        edges: dict[tuple[str, str], float] = {}
        for node in network.nodes:
            for tensor in network.activations(node):
                maker, reader = _maker(network, tensor, unit_of), unit_of.get(id(node), "")
                if maker != reader and (reader or not _passes(network, node)):
                    cost = _CONVERSION_NS[0] + _CONVERSION_NS[1] * sizes.elements[tensor]
                    edges[maker, reader] = max(edges.get((maker, reader), 0.0), cost)
        units = tuple(dict.fromkeys(unit_of.values()))
        own = {end: {unit: found.get(unit, 0.0) for unit in units} for end, found in times.items()}
        return _Problem(units, own["fp32"], own["int8"], _losses(network, influence, ranges.found()), edges)

    def moved(self, layer_ms: Mapping[str, float]) -> _Problem:
        """The same problem where fp32 layers take `layer_ms`; all else keeps its proportion to them."""
        known = [unit for unit in self.units if self.float_ns[unit] and layer_ms.get(unit)]
        scale = 1e6 * sum(layer_ms[unit] for unit in known) / sum(self.float_ns[unit] for unit in known) if known else 1.0
        of = {unit: 1e6 * layer_ms[unit] / self.float_ns[unit] if unit in known else scale for unit in self.units}
        floats, bytes_ = ({unit: own[unit] * of[unit] for unit in self.units} for own in (self.float_ns, self.byte_ns))
        return _Problem(self.units, floats, bytes_, self.loss, {edge: cost * scale for edge, cost in self.edges.items()})

    def milliseconds(self, byte: set[str]) -> float:
        """Predicted time of the units with those of `byte` in int8."""
        own = sum(self.byte_ns[u] if u in byte else self.float_ns[u] for u in self.units)
        return (own + sum(cost for (a, b), cost in self.edges.items() if (a in byte) != (b in byte))) / 1e6

    def importance(self, unit: str) -> float:
        """How much time the unit's own precision decides on."""
        return abs(self.byte_ns[unit] - self.float_ns[unit])

    def solved(self, budget_ms: float) -> set[str]:
        """The units in int8: the least loss whose predicted time meets the budget, or the fastest choice if none does."""
        if self.milliseconds(set()) <= budget_ms:
            return set()
        scale = sum(self.float_ns.values()) / max(sum(self.loss.values()), 1e-30)
        low, high, best = -20.0, 20.0, self._cut(0.0)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            found = self._cut(scale * 2.0**middle)
            if self.milliseconds(found) <= budget_ms:
                low, best = middle, found
            else:
                high = middle
        return best

    def _cut(self, price: float) -> set[str]:
        """The exact best choice where a unit of loss costs `price` ns."""
        place = {unit: i + 2 for i, unit in enumerate(self.units)} | {"": 1}  # 0: int8, 1: float
        arcs: dict[tuple[int, int], float] = {}
        for unit in self.units:
            difference = self.byte_ns[unit] + price * self.loss.get(unit, 0.0) - self.float_ns[unit]
            arcs[(place[unit], 1) if difference > 0 else (0, place[unit])] = abs(difference)
        for (a, b), cost in self.edges.items():
            for arc in ((place[a], place[b]), (place[b], place[a])):
                arcs[arc] = arcs.get(arc, 0.0) + cost
        ends = np.array(list(arcs), np.int32).reshape(-1, 2)
        whole = np.minimum(np.rint(list(arcs.values())), _LARGEST / max(1, len(arcs))).astype(np.int32)
        graph: Any = csr_array(coo_array((whole, (ends[:, 0], ends[:, 1])), shape=(len(place) + 1, len(place) + 1)))
        left = (graph - maximum_flow(graph, 0, 1).flow).tocsr()
        left.eliminate_zeros()
        reached = set(breadth_first_order(left, 0, return_predecessors=False).tolist())
        return {unit for unit in self.units if place[unit] in reached}


class _Sizes:
    """Elements of tensors for one image; an Observer."""

    def __init__(self, tensors: list[str]) -> None:
        self.tensors = tuple(dict.fromkeys(tensors))
        self.elements: dict[str, int] = {}

    def see(self, name: str, values: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        """See Observer."""
        self.elements[name] = values.size // max(1, len(labels))


def _plan(chosen: set[str]) -> BitPlan:
    return BitPlan(dict.fromkeys(sorted(chosen), "int8"))


def _first(batches: Any) -> list[Batch]:
    images, labels = next(iter(batches))
    return [(images, labels)]


def _losses(network: Network, influence: Mapping[str, Influence], ranges: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Discriminant information each layer loses by its own rounding and that of its input."""
    losses = {}
    for name, layer in network.layers.items():
        low, high = ranges[layer.input]
        rounding = ((high - low) / 255) ** 2 / 12
        rows = np.square(layer.weight.reshape(len(layer.weight), -1).astype(np.float64)).sum(axis=1)
        losses[name] = float((influence[name].channels * rounding * rows).sum()) + _rounding_loss(layer.weight, influence[name], 8)
    return losses


def _rounding_loss(weight: NDArray[np.float32], influence: Influence, bits: int) -> float:
    """Discriminant information a layer loses by its weights on a grid of `bits`."""
    return float((grid_errors(weight, [bits])[:, 0] * influence.channels).sum() * influence.energy)


def _units(network: Network) -> dict[int, str]:
    """Name of every node whose precision is a choice."""
    found = {id(layer.node): name for name, layer in network.layers.items()}
    for node in network.nodes:
        if node.op_type in ARITHMETIC and len(network.activations(node)) == len([i for i in node.input if i]):
            found[id(node)] = node.output[0]
    return found


def _passes(network: Network, node: onnx.NodeProto) -> bool:
    """Whether a node works in either precision."""
    return node.op_type in MOVES or network.limits(node) is not None


def _maker(network: Network, tensor: str, unit_of: Mapping[int, str]) -> str:
    """The unit whose precision the tensor has; "" for what is always float."""
    while (node := network.maker.get(tensor)) is not None and id(node) not in unit_of and _passes(network, node):
        tensor = network.activations(node)[0]
    return "" if node is None else unit_of.get(id(node), "")


def _owners(network: Network, unit_of: Mapping[int, str]) -> dict[str, str]:
    """What the runtime may call a kernel -> unit: its node's name, or that of the tensor it makes, activation included."""
    owners: dict[str, str] = {}
    for node in network.nodes:
        if unit := unit_of.get(id(node), ""):
            clip = network.clipped(node.output[0])
            names = [node.name, node.output[0], *((clip.name, clip.output[0]) if clip else ())]
            owners |= {name: unit for name in names if name}
    return owners


def _session(proto: onnx.ModelProto, threads: int, profile: str = "") -> tuple[Any, dict[str, NDArray[np.float32]]]:
    profiling = {"enable_profiling": True, "profile_file_prefix": profile} if profile else {}
    session = session_of(proto, intra_op_num_threads=threads, inter_op_num_threads=1, **profiling)
    taken = session.get_inputs()[0]
    shape = [d if isinstance(d, int) else 1 for d in taken.shape]
    return session, {taken.name: np.random.default_rng(0).random(shape, dtype=np.float32)}


def _profiled(proto: onnx.ModelProto, owners: Mapping[str, str], threads: int) -> dict[str, float]:
    """Median ns of every unit's kernels in one network."""
    with tempfile.TemporaryDirectory() as folder:
        session, feed = _session(proto, threads, str(Path(folder) / "run"))
        for _ in range(_RUNS):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = re.sub(r"(_token_\d+|_nchwc)+$", "", event["name"].removesuffix("_kernel_time"))
            if unit := owners.get(name):
                times.setdefault(unit, []).append(1e3 * event["dur"])
    return {unit: statistics.median(found) for unit, found in times.items()}


def time_ratio(one: onnx.ModelProto, other: onnx.ModelProto, threads: int = 1) -> float:
    """How much longer `one` takes than `other`: median over pairs of neighbouring runs, so that a busy machine disturbs both alike."""
    ratios = []
    for _ in range(_SESSIONS):
        sessions = [_session(proto, threads) for proto in (one, other)]
        for session, feed in sessions * 5:
            session.run(None, feed)
        for number in range(_PAIRS):
            taken = [0, 0]
            for which in ((0, 1), (1, 0))[number % 2]:
                session, feed = sessions[which]
                started = time.perf_counter_ns()
                session.run(None, feed)
                taken[which] = time.perf_counter_ns() - started
            ratios.append(taken[0] / taken[1])
    return statistics.median(ratios)
