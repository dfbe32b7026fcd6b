"""What an inference runtime executes for a traced network, and how large each kernel is under any plan. No torch here.

A runtime does not run the traced operations one by one: batch norms are folded into convolutions, activations run inside the
kernel before them, views cost nothing and unused results are never computed. `kernels` decides all that once per graph;
`Kernels.at` then evaluates whole batches of plans with a few matrix products, because sizes are linear in the group widths (MACs
and weights are products of such sizes) and allocators ask in loops.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.graph.branches import NORM_TENSORS, left
from edgeprune.graph.channels import ChannelGraph, Op
from edgeprune.graph.lengths import Floats, Sizes, axis_lengths, checked, elements

FLOAT_BYTES, POINTER_BYTES = 4, 8
# An ONNX file beyond its weights: header, opset and graph tables, and the node, names and attributes of each kernel.
FILE_BYTES, KERNEL_FILE_BYTES = 512, 256

# Activations that cost an exponential; the others are as cheap as an addition.
_EXPONENTIAL = frozenset({"silu", "sigmoid", "hardswish", "hardsigmoid", "gelu", "elu", "celu", "selu", "mish", "softplus", "tanh"})
# Operations without options or weights: two with the same inputs are the same, and runtimes compute them once.
_PLAIN = frozenset({"relu", "sigmoid", "silu", "hardswish", "hardsigmoid", "tanh", "add", "mul", "sub"})
# Activations that ONNX Runtime and LiteRT run as kernels of their own, even right after a convolution.
_UNFUSED = frozenset({"silu", "hardswish", "gelu", "elu", "celu", "selu", "mish", "softplus"})
# Those of them that are computed in two steps, such as x * sigmoid(x): the input is needed until the last one.
_COMPOSED = frozenset({"silu", "gelu", "mish"})
# Convolutions that gather patches of their input, or pointers into it.
_GATHERING = ("conv3x3", "conv_other", "grouped")


@dataclass(frozen=True, eq=False)
class KernelsAt:
    """The kernels under a batch of plans; every array is float64 (plans, kernels). Elements are counts, batch 1."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    macs: Floats
    input_elements: Floats
    output_elements: Floats
    weight_elements: Floats
    patch_elements: Floats  # inputs times the taps that read each: what a convolution larger than 1x1 gathers
    channels: Floats  # of the output
    groups: Floats  # of a grouped convolution
    calls: Floats = field(default_factory=lambda: np.ones((1, 1)))  # 0 where the branch that the kernel is in has vanished


@dataclass(frozen=True, eq=False)
class Kernels:
    """The kernels a runtime executes for `graph`, in order.

    kinds: conv1x1, conv3x3 (stride 1), conv_other, depthwise, depthwise_large (more than 3x3), grouped, linear; activation (those that
    take an exponential), elementwise, scale (with an operand that is broadcast), pool, global_pool, cat, resize, pad, norm, other.
    `widths` in every method is (plans, groups) or (groups,): the channels each group keeps, in the order of graph.groups; results
    have one entry per plan.
    """

    graph: ChannelGraph
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    operations: tuple[tuple[int, ...], ...]  # per kernel: the numbers of the ops it computes, the main one first
    reads: tuple[tuple[int, ...], ...]  # per kernel: activations that come from outside
    writes: tuple[int, ...]  # per kernel: the activation it leaves

    def at(self, widths: NDArray[Any]) -> KernelsAt:
        """MACs and elements of every kernel under every plan."""
        w = checked(widths, len(self.graph.groups))
        held, calls = self._held_at(w), self._calls_at(w)
        sizes = self._sizes_at(w) * calls
        read, written = (held @ self._reading) * calls, held[:, list(self.writes)]
        return KernelsAt(
            names=self.names,
            kinds=self.kinds,
            macs=sizes * self._positions,
            input_elements=read,
            output_elements=written,
            weight_elements=sizes * self._has_weight + self._biases.at(w) * calls,
            patch_elements=read * self._taps,
            channels=written / self._output_area,
            groups=self._groups_at(w, read),
            calls=calls,
        )

    def activation_elements(self, widths: NDArray[Any]) -> Floats:
        """Elements of every activation of the graph, (plans, activations)."""
        return self._held_at(checked(widths, len(self.graph.groups)))

    def macs(self, widths: NDArray[Any]) -> Floats:
        """Multiply-accumulates of conv and linear, (plans,)."""
        w = checked(widths, len(self.graph.groups))
        total: Floats = (self._sizes_at(w) * self._calls_at(w)) @ self._positions
        return total

    def params(self, widths: NDArray[Any]) -> Floats:
        """Trainable parameters as the user's framework counts them (before folding), (plans,)."""
        return self.graph.params_at(widths)

    def size_bytes(self, widths: NDArray[Any]) -> Floats:
        """The float32 artifact: weights after folding, each shared weight once, and a little for the container, (plans,)."""
        return self.weight_bytes(widths) + FILE_BYTES + KERNEL_FILE_BYTES * self.calls(widths)

    def calls(self, widths: NDArray[Any]) -> Floats:
        """How many kernels the runtime executes, (plans,)."""
        w = checked(widths, len(self.graph.groups))
        return np.asarray(np.broadcast_to(self._calls_at(w), (len(w), len(self.names))).sum(axis=1), dtype=np.float64)

    def weight_bytes(self, widths: NDArray[Any]) -> Floats:
        """Weights after folding, float32, each shared weight once, (plans,)."""
        w = checked(widths, len(self.graph.groups))
        sizes = self._sizes_at(w) * self._has_weight + self._biases.at(w)
        stays = left(self.graph, w, len(self.names), self._weightless)
        total: Floats = FLOAT_BYTES * ((sizes * stays) @ self._first_use)
        return total

    def live_bytes(self, widths: NDArray[Any], copied: Collection[str] = ()) -> Floats:
        """The largest set of activations alive at once, float32, (plans,).

        Elementwise kernels overwrite an input that nobody reads later, as runtimes do. What kernels of the kinds `copied` read and write
        exists twice while they run: in another layout, or padded.
        """
        held = self._held_at(checked(widths, len(self.graph.groups)))
        read, written = held @ self._reading, held[:, list(self.writes)]
        twice = np.array([kind in copied for kind in self.kinds], dtype=np.float64)
        used = held @ self._alive + twice * (read + written) + self.composed * written
        peak: Floats = FLOAT_BYTES * used.max(axis=1, initial=0.0)
        return peak

    def peak_memory_bytes(self, widths: NDArray[Any]) -> Floats:
        """Weights and live activations, the least that any runtime needs, (plans,); `CostModel.peak_memory_bytes` knows runtimes."""
        return self.weight_bytes(widths) + self.live_bytes(widths)

    @cached_property
    def pointer_bytes(self) -> float:
        """Pointers to the inputs of every output position, which some runtimes keep instead of patches; the same for all widths."""
        taps = [math.prod(op.kernel) * op.positions for op, kind in zip(self._main, self.kinds, strict=True) if kind in _GATHERING]
        return POINTER_BYTES * float(sum(taps))

    def _held_at(self, w: Floats) -> Floats:
        """Elements of every activation; none of those that are never made."""
        held = self._activations.at(w)
        return held * left(self.graph, w, held.shape[1], lambda name: [self.graph.ops[n].output for n in self.graph.branches[name].ops])

    def _calls_at(self, w: Floats) -> Floats:
        """1 for every kernel that runs, 0 for one whose operations are all in a branch that vanished; one row where all run."""
        return left(self.graph, w, len(self.names), self._inside)

    def _inside(self, name: str) -> list[int]:
        stopped = self.graph.branches[name].ops
        return [kernel for kernel, numbers in enumerate(self.operations) if stopped.issuperset(numbers)]

    def _weightless(self, name: str) -> list[int]:
        """Those of the kernels inside a branch of which nothing is left: the bias of its last one becomes the constant."""
        ends = {end.weight for end in self.graph.branches[name].ends}
        return [kernel for kernel in self._inside(name) if self._main[kernel].weight not in ends]

    def _sizes_at(self, w: Floats) -> Floats:
        """Elements of each kernel's weight, 1 where it has none."""
        return elements(self._weights, w) if self._weights else np.ones((len(w), len(self.names)))

    def _groups_at(self, w: Floats, read: Floats) -> Floats:
        """Groups that stay: input channels over those that each filter reads, 0 for what is no grouped conv."""
        grouped = np.array([kind == "grouped" for kind in self.kinds])
        if not grouped.any():
            return np.zeros_like(read)
        filters = np.where(grouped, self._weights[1].at(w), 1.0)
        return np.asarray(grouped * read / self._input_area / np.maximum(filters, 1.0), dtype=np.float64)

    @cached_property
    def _main(self) -> tuple[Op, ...]:
        return tuple(self.graph.ops[numbers[0]] for numbers in self.operations)

    @cached_property
    def _positions(self) -> Floats:
        return np.array([op.positions if op.kind in ("conv", "linear") else 0.0 for op in self._main], dtype=np.float64)

    @cached_property
    def _first_from(self) -> int:
        """The number of axes from which on the channel is axis 1: 4, images; 3 where the network's convs run over signals."""
        return 3 if any(op.kind == "conv" and len(op.kernel) == 1 for op in self.graph.ops) else 4

    def _area(self, number: int) -> int:
        """Positions per channel of an activation; the channel is the last axis of what has fewer axes than images."""
        shape = self.graph.activations[number].shape
        return max(math.prod(shape[2:]) if len(shape) >= self._first_from else math.prod(shape[:-1]), 1)

    @cached_property
    def _input_area(self) -> Floats:
        """Positions per channel of the first input."""
        return np.array([self._area(reads[0]) if reads else 1 for reads in self.reads], dtype=np.float64)

    @cached_property
    def _output_area(self) -> Floats:
        return np.array([self._area(write) for write in self.writes], dtype=np.float64)

    @cached_property
    def _taps(self) -> Floats:
        """How often a convolution's patches hold each input element; 0 for 1x1 (no patches) and depthwise (its MACs count them)."""
        gathers = [kind in _GATHERING for kind in self.kinds]
        sizes = [math.prod(op.kernel) * op.positions for op in self._main]
        return np.array([g * s for g, s in zip(gathers, sizes, strict=True)], dtype=np.float64) / self._input_area

    @cached_property
    def composed(self) -> Floats:
        """1 for activations that are computed in two steps, with a result between them."""
        return np.array([op.name in _COMPOSED for op in self._main], dtype=np.float64)

    @cached_property
    def _has_weight(self) -> Floats:
        return np.array([op.kind in ("conv", "linear") and op.weight is not None for op in self._main], dtype=np.float64)

    @cached_property
    def _first_use(self) -> Floats:
        weights = [op.weight for op in self._main]
        return np.array([name is None or weights.index(name) == n for n, name in enumerate(weights)], dtype=np.float64)

    @cached_property
    def _weights(self) -> tuple[Sizes, ...]:
        return axis_lengths(self.graph, [op.weight if op.kind in ("conv", "linear") else None for op in self._main])

    @cached_property
    def _biases(self) -> Sizes:
        """The vectors beside the weights: a conv's bias (its own or the folded norm's), all four of a norm that stands alone."""
        lengths = [self._vectors(numbers) for numbers in self.operations]
        per_kernel = [axis_lengths(self.graph, names)[0] if names else None for names in lengths]
        fixed = np.array([s.fixed.sum() if s else 0.0 for s in per_kernel])
        none = np.zeros(len(self.graph.groups))
        slope = np.stack([s.slope.sum(axis=1) if s else none for s in per_kernel], axis=1) if per_kernel else np.zeros((len(none), 0))
        return Sizes(fixed, slope)

    def _vectors(self, numbers: tuple[int, ...]) -> list[str]:
        op = self.graph.ops[numbers[0]]
        if op.weight is None:
            return []
        if op.kind == "norm":
            return [name for suffix in NORM_TENSORS if (name := op.stem + suffix) in self.graph.shapes]
        norms = [fused.weight for n in numbers[1:] if (fused := self.graph.ops[n]).kind == "norm" and fused.weight]
        own = [op.stem + "bias"] if op.stem + "bias" in self.graph.shapes else []
        return (own or norms)[:1]

    @cached_property
    def _activations(self) -> Sizes:
        activations = self.graph.activations
        slope = np.zeros((len(self.graph.groups), len(activations)))
        for number, activation in enumerate(activations):
            for group, per_channel in activation.per_channel:
                slope[group, number] += per_channel
        return Sizes(np.array([a.fixed for a in activations], dtype=np.float64), slope)

    @cached_property
    def _reading(self) -> Floats:
        reading = np.zeros((len(self.graph.activations), len(self.names)))
        for kernel, numbers in enumerate(self.reads):
            np.add.at(reading[:, kernel], list(numbers), 1.0)
        return reading

    @cached_property
    def _alive(self) -> Floats:
        """(activations, kernels): 1 where the buffer that an activation owns is in use while the kernel runs."""
        last = len(self.names)
        owner = buffers(self)
        born, dies = dict.fromkeys(self.graph.input_activations, 0), dict.fromkeys(self.graph.output_activations, last)
        for kernel, (reads, write) in enumerate(zip(self.reads, self.writes, strict=True)):
            born.setdefault(write, kernel)
            for number in (*reads, write):
                dies[number] = max(dies.get(number, 0), kernel)
        alive = np.zeros((len(self.graph.activations), last))
        for number, start in born.items():
            alive[owner.get(number, number), start : dies.get(number, start) + 1] = 1.0
        return alive


def kernels(graph: ChannelGraph) -> Kernels:
    """The kernels a runtime executes for the graph: norms folded, activations fused, views and unused results gone."""
    source = _sources(graph)
    members: dict[int, list[int]] = {}
    for number, op in enumerate(graph.ops):
        if op.output not in source:
            members.setdefault(_root(graph.ops, number), []).append(number)
    needed = {source.get(a, a) for a in graph.output_activations}
    order: list[int] = []
    reads: dict[int, tuple[int, ...]] = {}
    for main in sorted(members, key=lambda number: members[number][-1], reverse=True):
        inside = {graph.ops[n].output for n in members[main]}
        if inside & needed:
            inputs = [source.get(a, a) for n in members[main] for a in graph.ops[n].inputs]
            reads[main] = tuple(a for a in inputs if a not in inside)
            needed.update(reads[main])
            order.insert(0, main)
    return Kernels(
        graph=graph,
        names=tuple(_name(graph.ops[n]) for n in order),
        kinds=tuple(_kind(graph, graph.ops[n]) for n in order),
        operations=tuple((n, *(other for other in members[n] if other != n)) for n in order),
        reads=tuple(reads[n] for n in order),
        writes=tuple(graph.ops[members[n][-1]].output for n in order),
    )


def _name(op: Op) -> str:
    """The module that holds the weight, as users know it; the operation where there is none."""
    return op.weight.removesuffix(".weight") if op.weight else op.name


def _kind(graph: ChannelGraph, op: Op) -> str:
    if op.kind == "conv" and op.weight is not None:
        if op.groups > 1:
            depthwise = "depthwise_large" if math.prod(op.kernel) > 9 else "depthwise"
            return depthwise if graph.shapes[op.weight][1] == 1 else "grouped"
        if all(k == 1 for k in op.kernel):
            return "conv1x1"
        return "conv3x3" if op.kernel == (3, 3) and all(s == 1 for s in op.stride) else "conv_other"
    if op.name in _EXPONENTIAL:
        return "activation"
    if op.kind in ("activation", "add", "mul"):
        broadcast = op.kind != "activation" and any(_dense(graph, a) < _dense(graph, op.output) for a in op.inputs)
        return "scale" if broadcast else "elementwise"
    if op.kind == "pool":
        return "global_pool" if math.prod(graph.activations[op.output].shape[2:]) == 1 else "pool"
    if op.name == "constant_pad_nd":
        return "pad"
    return op.kind if op.kind in ("linear", "cat", "resize", "norm") else "other"


def _sources(graph: ChannelGraph) -> dict[int, int]:
    """Activation -> the one whose memory holds it: what a view shows (a move that keeps every element; slices and pads copy), and
    what an operation already gave that is computed a second time.
    """
    source: dict[int, int] = {}
    known: dict[tuple[str, tuple[int, ...]], int] = {}
    for op in graph.ops:
        inputs = tuple(source.get(a, a) for a in op.inputs)
        if op.kind == "move" and len(inputs) == 1 and op.fused < 0 and _dense(graph, op.inputs[0]) == _dense(graph, op.output):
            source[op.output] = inputs[0]
        elif op.name in _PLAIN and len(inputs) == (1 if op.kind == "activation" else 2):
            first = known.setdefault((op.name, inputs), op.output)
            if first != op.output:
                source[op.output] = first
    return source


def _dense(graph: ChannelGraph, number: int) -> int:
    return int(np.prod(graph.activations[number].shape))


def _root(ops: Sequence[Op], number: int) -> int:
    """The op whose kernel computes this one. What follows an activation that stands alone fuses into nothing either."""
    while ops[number].fused >= 0 and ops[number].name not in _UNFUSED:
        number = ops[number].fused
    return number


def buffers(made: Kernels) -> dict[int, int]:
    """Activation -> the one whose buffer it overwrites, for elementwise kernels whose input dies there."""
    last_read = {a: kernel for kernel, reads in enumerate(made.reads) for a in reads}
    pinned = {*made.graph.output_activations, *made.graph.input_activations}
    owner: dict[int, int] = {}
    for kernel, (kind, reads, write) in enumerate(zip(made.kinds, made.reads, made.writes, strict=True)):
        if kind in ("activation", "elementwise", "scale", "norm"):
            free = (a for a in reads if a not in pinned and last_read[a] == kernel and same_size(made.graph, a, write))
            if (reused := next(free, None)) is not None:
                owner[write] = owner.get(reused, reused)
    return owner


def same_size(graph: ChannelGraph, one: int, other: int) -> bool:
    """Whether two activations have as many elements under every plan."""
    a, b = graph.activations[one], graph.activations[other]
    return a.fixed == b.fixed and sorted(a.per_channel) == sorted(b.per_channel)
