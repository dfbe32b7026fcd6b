"""One run of the user's own network finds which channels can go and what goes with each.

The network runs in eval mode on a real example under a TorchDispatchMode; integer labels ride along with the tensors (labels.py)
and every operation says what it does to them (rules.py). Nothing is exported or symbolically traced, so any network that runs
can be traced. The same run records the operations with their sizes for the cost models. The model is left as it was.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from edgeprune.errors import TraceError
from edgeprune.graph import moves  # noqa: F401  registers its rules
from edgeprune.graph.channels import Activation, ChannelGraph, ChannelGroup, Member, Op, Tap
from edgeprune.graph.labels import Labels, core, varies
from edgeprune.graph.rehearse import Misfit, misfit
from edgeprune.graph.rules import RULES, Call, Labelled, Weight, give_up
from edgeprune.graph.running import evaluating, first_line, single_sample, tensors_in

KINDS = {
    **dict.fromkeys("convolution _convolution mkldnn_convolution cudnn_convolution".split(), "conv"),
    **dict.fromkeys("addmm mm bmm baddbmm".split(), "linear"),
    **dict.fromkeys(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm native_layer_norm "
        "native_group_norm".split(),
        "norm",
    ),
    **dict.fromkeys(
        "relu relu6 hardtanh hardswish hardsigmoid sigmoid silu gelu elu celu selu leaky_relu _prelu_kernel mish softplus tanh clamp "
        "clamp_min clamp_max".split(),
        "activation",
    ),
    **dict.fromkeys("add sub rsub".split(), "add"),
    **dict.fromkeys("mul div".split(), "mul"),
    **dict.fromkeys(
        "max_pool2d_with_indices max_pool2d max_pool1d max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
        "adaptive_avg_pool1d _adaptive_avg_pool3d adaptive_max_pool2d mean sum amax".split(),
        "pool",
    ),
    **dict.fromkeys(["cat", "stack"], "cat"),
    **dict.fromkeys([n for n in RULES if n.startswith(("upsample", "_upsample"))], "resize"),
    **dict.fromkeys(
        "clone detach alias _to_copy lift_fresh permute transpose t unsqueeze squeeze expand flip repeat view _unsafe_view reshape "
        "_reshape_alias split split_with_sizes unbind slice select roll constant_pad_nd pixel_shuffle channel_shuffle "
        "native_channel_shuffle".split(),
        "move",
    ),
}


def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """The channels of a network that can be removed, and the operations it runs.

    `example_inputs`: a tensor, or a tuple of the forward's positional arguments; only the first sample of a batch is used. The
    model (weights, buffers, training flags) is left as it was. Raises TraceError when the forward itself fails.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("a TorchScript network cannot be pruned: its code is compiled. Give the nn.Module that it was made from.")
    inputs = single_sample(example_inputs)
    tracer = _Tracer(model)
    with evaluating(model), torch.no_grad():
        for leaf in tensors_in(inputs):
            tracer.enter(leaf)
        try:
            with tracer:
                outputs = model(*inputs)
        except Exception as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in(inputs))
            raise TraceError(
                f"the network does not run on an example of shape {shapes}: {type(error).__name__}: {first_line(error)[:300]}. "
                "Give the shape it was trained for (--input-shape, or other example inputs)."
            ) from error
    for leaf in tensors_in(outputs):
        tracer.leave(leaf)
    graph = _build(tracer)
    while (found := misfit(model, graph, single_sample(example_inputs))) is not None and tracer.hold(found, graph):
        graph = _build(tracer)
    return graph


@dataclass(frozen=True)
class _Seen:
    """What is known about one tensor of the run: its labels, its number among the activations, the parameter it is (a view of).

    `written` is shared by all views of one memory: the activations that were written into it through a view.
    """

    labels: Labelled
    number: int = -1
    parameter: str | None = None
    view: bool = False
    written: list[int] = field(default_factory=list)


class _Tracer(TorchDispatchMode):
    """Runs every operation as it is, then asks its rule what happened to the labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.book = Labels()
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.tensors[name] = tensor
        self.trainable = frozenset(name for name, _ in model.named_parameters())
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.producers: dict[tuple[str, int], None] = {}
        self.seen: MutableMapping[Tensor, _Seen] = WeakTensorKeyDictionary()
        self.names: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()
        self.names.update({t: name for name, t in self.tensors.items()})
        self.sizes: list[tuple[tuple[int, ...], Tensor, int]] = []
        self.varying: list[tuple[int, Tensor] | None] = []
        self.ops: list[Op] = []
        self.calls = 0
        self.inputs: list[int] = []
        self.outputs: list[int] = []

    def enter(self, tensor: Tensor) -> None:
        """A network input: its size is given from outside."""
        self.inputs.append(self._remember(tensor, self.book.frozen(tuple(tensor.shape), "input of the network")))

    def leave(self, tensor: Tensor) -> None:
        """A network output: its size is promised."""
        seen = self._look(tensor)
        if seen.number >= 0:
            self.outputs.append(seen.number)
        for part in seen.labels.axes if isinstance(seen.labels, Weight) else (seen.labels,):
            self.book.freeze(part, "output of the network")

    def hold(self, misfit: Misfit, graph: ChannelGraph) -> bool:
        """The channels that an operation, or the nearest one before it that has any, reads or makes stay; False where none is left."""
        for op in reversed([op for op in self.ops if op.call <= misfit.call]):
            numbers = op.inputs if misfit.reads and op.call == misfit.call else (op.output,)
            if free := [n for n in numbers if graph.activations[n].per_channel]:
                for number in free:
                    self.book.freeze(self.sizes[number][1], "the network's code holds their number as a fixed number")
                return True
        return False

    def _remember(self, tensor: Tensor, labels: Tensor) -> int:
        number = len(self.sizes)
        flat, repeat = core(labels)
        self.sizes.append((tuple(tensor.shape), flat, repeat))
        dims = [d for d in range(labels.ndim) if varies(labels, d)]
        self.varying.append((dims[0], flat) if len(dims) == 1 else None)
        self.seen[tensor] = _Seen(labels, number)
        return number

    def _look(self, tensor: Tensor) -> _Seen:
        if tensor not in self.seen:
            if tensor in self.names:
                self.seen[tensor] = _Seen(self._parameter(self.names[tensor]), parameter=self.names[tensor])
            else:
                self._remember(tensor, self.book.frozen(tuple(tensor.shape), "constant made in the forward pass"))
        return self.seen[tensor]

    def _parameter(self, name: str) -> Labelled:
        shape = tuple(self.tensors[name].shape)
        axes = tuple(self.book.fresh(n) for n in shape)
        self.axes.update({(name, d): labels for d, labels in enumerate(axes) if len(labels) > 1})
        long = [d for d, n in enumerate(shape) if n > 1]
        if len(long) > 1:
            return Weight(axes)
        if long:
            return axes[long[0]].view(*(-1 if d == long[0] else 1 for d in range(len(shape))))
        return torch.zeros(shape, dtype=torch.long)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operation, carry the labels across, record it."""
        kwargs = kwargs or {}
        self.calls += 1
        labels = tree_map(lambda a: self._look(a).labels if isinstance(a, Tensor) else a, args)
        out = func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        if not name.endswith("__"):
            name = name.rstrip("_")
        call = Call(name, func, args, kwargs, labels, out, self.book)
        try:
            result = RULES[name](call) if name in RULES else give_up(call, f"no rule for the operation {name}")
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            result = give_up(call, f"the operation {name} is used in a way no rule covers ({first_line(error)[:80]})")
        self._record(call, result)
        return out

    def _record(self, call: Call, result: Any) -> None:
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        read = [self.seen[t] for t in tensors_in(call.args)]
        inputs = tuple(seen.number for seen in read if seen.number >= 0)
        first = call.args[0] if call.args else None
        if isinstance(first, Tensor) and not inputs:
            self._computed_parameters(call, results)
            return
        inputs += tuple(dict.fromkeys(n for seen in read for n in seen.written if n not in inputs))
        old = self.seen[first] if isinstance(first, Tensor) else None
        numbers = [self._remember(t, r) for t, r in zip(tensors_in(call.out), results, strict=False) if isinstance(r, Tensor)]
        if not numbers:
            return
        if old is not None and (alias := call.func._schema.arguments[0].alias_info):
            self._share_memory(call, old, alias.is_write)
        kind = KINDS.get(call.name, "other")
        weight, details = self._weight_details(call, kind) if kind in ("conv", "linear", "norm") else (None, {})
        self.ops.append(Op(kind, call.name, weight, inputs, numbers[0], self.calls - 1, fused=self._fuses_into(kind, inputs), **details))

    def _computed_parameters(self, call: Call, results: list[Any]) -> None:
        """Weights that the network computes from its parameters (transposed, normalised) count as the parameter of their shape."""
        for made, labels in zip(tensors_in(call.out), results, strict=False):
            same = (self.seen[t].parameter for t in tensors_in(call.args) if t.shape == made.shape)
            self.seen[made] = _Seen(labels, parameter=next(same, self.seen[call.args[0]].parameter))

    def _share_memory(self, call: Call, old: _Seen, writes: bool) -> None:
        """After an operation whose result is its first argument's memory: who reads one view later reads what was written there."""
        for made in tensors_in(call.out):
            seen = self.seen[made]
            self.seen[made] = replace(seen, view=old.view or not writes, written=old.written)
            if writes and old.view:
                old.written.append(seen.number)
            elif writes:
                old.written.clear()

    def _weight_details(self, call: Call, kind: str) -> tuple[str | None, dict[str, Any]]:
        tensor = call.args[{"conv": 1, "linear": len(call.args) - 1, "norm": 1}[kind]]
        weight = self.seen[tensor].parameter if isinstance(tensor, Tensor) else None
        if kind == "norm" or weight is None:
            return weight, {}
        transposed = kind == "conv" and call.args[6]
        self.producers.setdefault((weight, 1 if transposed else 0))
        if kind == "linear":
            return weight, {"positions": int(np.prod(call.args[-2].shape[:-1]))}
        spatial = call.args[0].shape if transposed else call.shape
        dims = tensor.ndim - 2
        positions = int(np.prod(spatial[len(spatial) - dims :])) * (spatial[0] if len(spatial) > dims + 1 else 1)
        return weight, {
            "kernel": tuple(tensor.shape[2:]),
            "stride": tuple(call.args[3]) * (dims if len(call.args[3]) == 1 else 1),
            "groups": call.args[8],
            "positions": positions,
        }

    def _fuses_into(self, kind: str, inputs: tuple[int, ...]) -> int:
        """The conv or linear whose kernel an inference runtime lets compute this norm or activation too."""
        if kind not in ("norm", "activation") or not inputs:
            return -1
        for i in range(len(self.ops) - 1, max(-1, len(self.ops) - 4), -1):
            op = self.ops[i]
            if op.output == inputs[0]:
                target = i if op.kind in ("conv", "linear") else op.fused
                after_activation = kind == "norm" and op.kind == "activation"
                return -1 if after_activation else target
        return -1


@dataclass(frozen=True)
class _Rows:
    """Every labelled position of every parameter axis: axis number, position, class; sorted by class."""

    axis: NDArray[np.int64]
    position: NDArray[np.int64]
    channel: NDArray[np.int64]


def _build(tracer: _Tracer) -> ChannelGraph:
    """Classes of labels → groups; label counts of every tensor → sizes as linear functions of the groups' widths."""
    classes, reasons = tracer.book.resolve()
    keys = list(tracer.axes)
    order = {key: i for i, key in enumerate(keys)}
    producers = np.array([order[key] for key in tracer.producers if key in order], dtype=np.int64)
    roots = [classes[tracer.axes[key].numpy()] for key in keys]
    blocked = np.zeros(int(classes.max()) + 1, dtype=bool)
    blocked[list(reasons)] = True
    rows = _rows(roots, blocked)
    groups = _groups(rows, keys, producers)
    group_of = np.full(len(blocked), -1, dtype=np.int64)
    channel_of = np.zeros(len(blocked), dtype=np.int64)
    for number, (group, members) in enumerate(groups):
        group_of[members] = number
        channel_of[members] = np.arange(group.channels)
    frozen = {}
    for key in tracer.producers:
        stays = [int(c) for c in np.unique(roots[order[key]])] if key in order else []
        why = next((reasons[c] for c in stays if c in reasons), None)
        if why or any(group_of[c] < 0 for c in stays):
            frozen[f"{key[0]}[{key[1]}]"] = why or "its channels are tied to one another: all would have to go at once"
    wide = np.array([group.channels for group, _ in groups], dtype=np.int64)
    activations = tuple(_activation(shape, classes[flat.numpy()], repeat, group_of, wide) for shape, flat, repeat in tracer.sizes)
    return ChannelGraph(
        groups=tuple(g for g, _ in groups),
        frozen=frozen,
        ops=tuple(tracer.ops),
        activations=activations,
        shapes={n: tuple(t.shape) for n, t in tracer.tensors.items()},
        trainable=tracer.trainable,
        taps=_taps(tracer, classes, group_of, channel_of, groups),
        input_activations=tuple(tracer.inputs),
        output_activations=tuple(tracer.outputs),
    )


def _rows(roots: list[NDArray[np.int64]], blocked: NDArray[np.bool_]) -> _Rows:
    axis = np.repeat(np.arange(len(roots)), [len(r) for r in roots]) if roots else np.zeros(0, dtype=np.int64)
    position = np.concatenate([np.arange(len(r)) for r in roots]) if roots else np.zeros(0, dtype=np.int64)
    channel = np.concatenate(roots) if roots else np.zeros(0, dtype=np.int64)
    free = ~blocked[channel]
    axis, position, channel = axis[free], position[free], channel[free]
    by_class = np.lexsort((position, axis, channel))
    return _Rows(axis[by_class], position[by_class], channel[by_class])


def _groups(rows: _Rows, keys: list[tuple[str, int]], producers: NDArray[np.int64]) -> list[tuple[ChannelGroup, NDArray[np.int64]]]:
    """Classes that touch the same axes equally often form a group; returns each with its classes in channel order.

    A class on its own is no group, because one channel must stay.
    """
    if not len(rows.channel):
        return []
    starts = np.flatnonzero(np.r_[True, rows.channel[1:] != rows.channel[:-1]])
    lengths = np.diff(np.r_[starts, len(rows.channel)])
    salt = np.random.default_rng(0).integers(1, 2**62, size=len(keys), dtype=np.uint64)
    signature = np.add.reduceat(salt[rows.axis], starts)
    produced = np.maximum.reduceat(np.isin(rows.axis, producers), starts)
    groups: list[tuple[ChannelGroup, NDArray[np.int64]]] = []
    taken: dict[str, int] = {}
    rank = np.full(len(keys), len(keys) + 1)
    rank[producers] = np.arange(len(producers))
    for value in dict.fromkeys(signature[produced].tolist()):
        mine = np.flatnonzero(signature == np.uint64(value))
        n, k = len(mine), int(lengths[mine[0]])
        if n == 1:
            continue
        table = starts[mine][:, None] + np.arange(k)
        axes = rows.axis[table[0]]
        positions = rows.position[table]
        columns: dict[int, NDArray[np.int64]] = {int(a): positions[:, axes == a] for a in dict.fromkeys(axes.tolist())}
        ordered = sorted(columns, key=lambda a: (rank[a], a))
        by_channel = np.argsort(columns[ordered[0]][:, 0], kind="stable")
        members = tuple(Member(*keys[a], columns[a][by_channel]) for a in ordered)
        producing = int((rank[ordered] < len(keys)).sum())
        name = members[0].parameter.rpartition(".")[0] or members[0].parameter
        taken[name] = taken.get(name, 0) + 1
        name = name if taken[name] == 1 else f"{name}#{taken[name]}"
        groups.append((ChannelGroup(name, n, members, producing), rows.channel[starts[mine]][by_channel]))
    return sorted(groups, key=lambda g: rank[keys.index((g[0].members[0].parameter, g[0].members[0].axis))])


def _activation(
    shape: tuple[int, ...], channels: NDArray[np.int64], repeat: int, group_of: NDArray[np.int64], widths: NDArray[np.int64]
) -> Activation:
    group, count = np.unique(group_of[channels], return_counts=True)
    sizes = dict(zip(group.tolist(), (count * float(repeat)).tolist(), strict=True))
    fixed = sizes.pop(-1, 0.0)
    return Activation(shape, fixed, tuple((g, n / int(widths[g])) for g, n in sorted(sizes.items())))


def _taps(
    tracer: _Tracer,
    classes: NDArray[np.int64],
    group_of: NDArray[np.int64],
    channel_of: NDArray[np.int64],
    groups: list[tuple[ChannelGroup, NDArray[np.int64]]],
) -> dict[str, tuple[Tap, ...]]:
    """Where a group's channels can be looked at: every tensor that a conv, linear or pooling reads and that holds all of them."""
    made_by = {op.output: op.call for op in tracer.ops}
    found: dict[str, dict[int, Tap]] = {g.name: {} for g, _ in groups}
    for op in tracer.ops:
        if op.kind not in ("conv", "linear", "pool") or not op.inputs:
            continue
        number = op.inputs[0]
        varying = tracer.varying[number]
        if varying is None or number not in made_by:
            continue
        dim, labels = varying
        members = classes[labels.numpy()]
        for g in np.unique(group_of[members]).tolist():
            if g < 0 or number in found[groups[g][0].name]:
                continue
            group = groups[g][0]
            where = np.flatnonzero(group_of[members] == g)
            order = where[np.argsort(channel_of[members[where]], kind="stable")]
            if len(order) % group.channels == 0:
                found[group.name][number] = Tap(made_by[number], dim, order.reshape(group.channels, -1))
    shapes = tracer.sizes

    def spread(number: int) -> int:
        return int(np.prod(shapes[number][0])) // max(1, shapes[number][0][tracer.varying[number][0]])  # type: ignore[index]

    taps = {}
    for name, by_number in found.items():
        most = max((spread(n) for n in by_number), default=0)
        taps[name] = tuple(t for n, t in by_number.items() if spread(n) > 1 or most <= 1)
    return taps
