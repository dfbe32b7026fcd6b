"""One run of the user's own network finds which channels can go and what goes with each.

The network runs in eval mode on a real example under a TorchDispatchMode; integer labels ride along with the tensors (labels.py)
and every operation says what it does to them (rules.py). Nothing is exported or symbolically traced, so any network that runs
can be traced. The same run records the operations with their sizes for the cost models. The model is left as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from edgeprune.errors import TraceError
from edgeprune.graph.build import build
from edgeprune.graph.channels import ChannelGraph, Op, WrittenSizes
from edgeprune.graph.exported import Exported, Unexportable, exported, is_exported
from edgeprune.graph.kinds import KINDS
from edgeprune.graph.labels import Labels, core, counted, varies
from edgeprune.graph.rehearse import Misfit, misfit, stuck
from edgeprune.graph.rules import RULES, Call, Labelled, Weight, give_up
from edgeprune.graph.running import (
    Observer,
    contiguous,
    described,
    evaluating,
    few_collections,
    first_line,
    fresh,
    operation_name,
    single_sample,
    tensors_in,
)
from edgeprune.graph.sizes import read
from edgeprune.graph.slim import remember
from edgeprune.graph.symbolic import Unwritable, located

# Beside convs and linears: the weights that make channels, as (argument, axis).
_PRODUCING = {"embedding": ((0, 1),), "mkldnn_rnn_layer": ((1, 0), (2, 0))}

_LONGEST_AXIS = 2**20


@contextmanager
def _aside() -> Iterator[None]:
    """Work that the rest of the program does not notice: its random numbers go on as if nothing had been drawn."""
    with few_collections(), torch.random.fork_rng(devices=[]):
        yield


@_aside()
def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """The channels of a network that can be removed, and the operations it runs.

    `example_inputs`: a tensor, or a tuple of the forward's positional arguments; only the first sample of a batch is used. The
    model (weights, buffers, training flags) is left as it was. Raises TraceError when the forward itself fails.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("a TorchScript network cannot be pruned: its code is compiled. Give the nn.Module that it was made from.")
    inputs = single_sample(example_inputs)
    tracer = _run(model, inputs, Labels())
    if not is_exported(model) and (found := _of_own_code(model, build(tracer), inputs)) is not None:
        return found
    try:
        return _of_exported(exported(model, inputs), model, tracer, inputs)
    except Unexportable as error:
        reason = f"the network's code holds their number as a fixed number and cannot be exported ({error})"
    tracer = _run(model, inputs, Labels(may_cut=False))
    graph = replace(build(tracer), written=None)
    while (wrong := misfit(model, graph, fresh(inputs))) is not None and tracer.hold(wrong, graph, reason):
        graph = replace(build(tracer), written=None)
    return graph


def _of_own_code(model: nn.Module, graph: ChannelGraph, inputs: tuple[Any, ...]) -> ChannelGraph | None:
    """The graph where the user's own code takes fewer channels, as it is or with other numbers written into it; else None."""
    places, plain = graph.written, replace(graph, written=None)
    # Where the code cuts channels, sizes do not show whether it cuts at a fixed number.
    if not (places and any(axis.silent for axis in places.axes)) and misfit(model, plain, fresh(inputs)) is None:
        return plain
    if places is None:
        return None
    try:
        opened, nodes = located(model, fresh(inputs), {axis.node for axis in places.axes})
        axes = tuple(axis._replace(node=nodes[axis.node]) for axis in places.axes)
        graph = replace(graph, written=WrittenSizes(described(inputs), opened, axes))
        return graph if misfit(model, graph, fresh(inputs)) is None else None
    except Unwritable:
        return None


def _run(model: nn.Module, inputs: tuple[Any, ...], book: Labels) -> _Tracer:
    """The user's own network with labels."""
    tracer = _Tracer(model, book)
    inputs = fresh(inputs)
    with evaluating(model), contiguous(model), torch.no_grad():
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
    return tracer


def _of_exported(network: Exported, model: nn.Module, tracer: _Tracer, inputs: tuple[Any, ...]) -> ChannelGraph:
    """The graph with the numbers that the exported network holds; raises Unexportable where an operation takes no other number."""
    second = _Tracer(model, tracer.book, tracer.axes)
    mixed = list(tracer.book.mixed)
    reading = read(network, fresh(inputs), second)
    tracer.book.mixed[:] = mixed  # the dense twin runs the user's own code
    tracer.exported, removable = (described(inputs), reading.axes), -1
    while True:
        graph = replace(build(tracer), written=None)
        problem = stuck(network, graph, fresh(inputs))
        if problem is None:
            remember(graph, network, model)
            return graph
        if removable == (removable := sum(g.channels for g in graph.groups)):
            tracer.exported = None
            raise Unexportable(f"{problem.target} takes no other number of channels")
        for labels in reading.reads.get(problem.node, []):
            for part in labels.axes if isinstance(labels, Weight) else (labels,):
                tracer.book.freeze(part, f"their number is fixed in {problem.target}")


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


class _Tracer(Observer):
    """Runs every operation as it is, then asks its rule what happened to the labels."""

    def __init__(self, model: nn.Module, book: Labels, axes: dict[tuple[str, int], Tensor] | None = None) -> None:
        """With the book and axes of a first run of the same tensors: what either run ties or freezes holds for both."""
        super().__init__()
        self.book = book
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.tensors[name] = tensor
        self.trainable = frozenset(name for name, _ in model.named_parameters())
        self.axes: dict[tuple[str, int], Tensor] = {} if axes is None else axes
        self.exported: tuple[Any, list[tuple[str, int, Tensor]]] | None = None
        self.producers: dict[tuple[str, int], None] = {}
        self.seen: MutableMapping[Tensor, _Seen] = WeakTensorKeyDictionary()
        self.names = {id(t): name for name, t in self.tensors.items()}
        self.sizes: list[tuple[tuple[int, ...], Tensor, int | Tensor]] = []
        self.varying: list[tuple[int, Tensor] | None] = []
        self.ops: list[Op] = []
        self.calls = 0
        self.seen_names: Counter[str] = Counter()
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

    def labels_of(self, tensor: Tensor) -> Labelled:
        """The labels of a tensor of this run."""
        return self._look(tensor).labels

    def hold(self, misfit: Misfit, graph: ChannelGraph, reason: str) -> bool:
        """The channels that an operation, or the nearest one before it that has any, reads or makes stay; False where none is left."""
        for op in reversed([op for op in self.ops if op.call <= misfit.call]):
            numbers = op.inputs if misfit.reads and op.call == misfit.call else (op.output,)
            if free := [n for n in numbers if graph.activations[n].per_channel]:
                for number in free:
                    self.book.freeze(self.sizes[number][1], reason)
                return True
        return False

    def _remember(self, tensor: Tensor, labels: Tensor) -> int:
        number = len(self.sizes)
        flat, repeat = core(labels)
        dims = [d for d in range(labels.ndim) if varies(labels, d)]
        large = len(flat) > _LONGEST_AXIS  # kept for as long as the trace: the labels of a whole map would weigh twice what it does
        self.varying.append((dims[0], flat) if len(dims) == 1 and not large else None)
        found, counts = counted(flat) if large else (flat, None)
        self.sizes.append((tuple(tensor.shape), found, repeat if counts is None else counts * repeat))
        self.seen[tensor] = _Seen(labels, number)
        return number

    def _look(self, tensor: Tensor) -> _Seen:
        seen: _Seen | None = self.seen.get(tensor)
        if seen is not None and isinstance(seen.labels, Weight) and seen.written:  # filled with a number, then written piece by piece
            self._remember(tensor, self._pieces(tuple(tensor.shape), seen.labels, seen.written))
            return self.seen[tensor]
        if seen is not None:
            return seen
        name = self.names.get(id(tensor))
        if name is None:
            self._remember(tensor, self.book.frozen(tuple(tensor.shape), "constant made in the forward pass"))
        else:
            self.seen[tensor] = _Seen(self._parameter(name), parameter=name)
        return self.seen[tensor]

    def _pieces(self, shape: tuple[int, ...], fill: Weight, written: list[int]) -> Tensor:
        """The labels of what was written into a filled tensor: channels where all pieces have theirs along the same axis of it."""
        found = [self.varying[number] for number in written]
        axes = {d for piece in found if piece for d, own in enumerate(fill.axes) if len(own) > 1 and bool(torch.isin(piece[1], own).all())}
        if len(axes) == 1:
            dim = axes.pop()
            return fill.axes[dim].view(*(-1 if d == dim else 1 for d in range(len(shape)))).expand(shape)
        reason = "written piece by piece"
        for axis in fill.axes:
            self.book.freeze(axis, reason)
        return self.book.frozen(shape, reason)

    def _labelled(self, args: Iterable[Any], read: list[_Seen]) -> tuple[Any, ...]:
        """The arguments with labels in place of tensors; what is known about each of these is appended to `read`."""
        labels: list[Any] = []
        for item in args:
            if isinstance(item, Tensor):
                read.append(self._look(item))
                labels.append(read[-1].labels)
            else:
                labels.append(list(self._labelled(item, read)) if isinstance(item, (list, tuple)) else item)
        return tuple(labels)

    def _parameter(self, name: str) -> Labelled:
        shape = tuple(self.tensors[name].shape)
        axes = tuple(self.axes[name, d] if (name, d) in self.axes else self.book.fresh(n) for d, n in enumerate(shape))
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
        read: list[_Seen] = []
        labels = self._labelled(args, read)
        out = func(*args, **kwargs)
        name = operation_name(func)
        call = Call(name, func, args, kwargs, labels, out, self.book, self.seen_names[name])
        self.seen_names[name] += 1
        try:
            result = RULES[name](call) if name in RULES else give_up(call, f"no rule for the operation {name}")
        except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
            result = give_up(call, f"the operation {name} is used in a way no rule covers ({first_line(error)[:80]})")
        self._record(call, result, read)
        return out

    def _record(self, call: Call, result: Any, read: list[_Seen]) -> None:
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        inputs = tuple(seen.number for seen in read if seen.number >= 0)
        first = call.args[0] if call.args else None
        if isinstance(first, Tensor) and not inputs:
            self._computed_parameters(call, results)
            return
        inputs += tuple(dict.fromkeys(n for seen in read for n in seen.written if n not in inputs))
        old = read[0] if isinstance(first, Tensor) else None
        made = list(zip(tensors_in(call.out), results, strict=False))
        # Norms return empty statistics beside their result.
        numbers = [self._remember(t, r) for t, r in made if isinstance(r, Tensor) and t.shape != (0,)]
        self.seen.update({t: _Seen(r) for t, r in made if isinstance(r, Weight)})
        if not numbers:
            return
        if old is not None and (alias := call.func._schema.arguments[0].alias_info):
            self._share_memory(call, old, alias.is_write)
        kind = KINDS.get(call.name, "other")
        weight, details = self._weight_details(call, kind) if kind in ("conv", "linear", "norm") else (None, {})
        for argument, axis in _PRODUCING.get(call.name, ()):
            if (parameter := self.seen[call.args[argument]].parameter) is not None:
                self.producers.setdefault((parameter, axis))
        tensors = tuple(dict.fromkeys(seen.parameter for seen in read if seen.parameter is not None))
        fused = self._fuses_into(kind, inputs)
        self.ops.append(Op(kind, call.name, weight, inputs, numbers[0], self.calls - 1, fused=fused, tensors=tensors, **details))

    def _computed_parameters(self, call: Call, results: list[Any]) -> None:
        """Weights that the network computes from its parameters (transposed, normalised) count as the parameter of their shape."""
        first = self.seen[call.args[0]]
        shares = bool(call.func._schema.arguments[0].alias_info)
        for made, labels in zip(tensors_in(call.out), results, strict=False):
            same = (self.seen[t].parameter for t in tensors_in(call.args) if t.shape == made.shape)
            parameter = next(same, first.parameter)
            self.seen[made] = _Seen(labels, parameter=parameter, view=shares, written=first.written if shares else [])

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
        if kind == "norm":
            return weight, {"eps": call.args[-1]}
        if weight is None:
            return None, {}
        transposed = kind == "conv" and call.args[6]
        self.producers.setdefault((weight, 1 if transposed else 0))
        made = call.labels[-1].axes[-1] if kind == "linear" and isinstance(call.labels[-1], Weight) else None
        if made is not None and any(made is self.axes.get((weight, d)) for d in range(1, len(self.tensors[weight].shape))):
            self.producers.pop((weight, 0))  # the code multiplies with it as it stands, not transposed
            self.producers.setdefault((weight, len(self.tensors[weight].shape) - 1))
        if kind == "linear":
            bias = self._named(call.args[0]) if call.name == "addmm" else None
            return weight, {"positions": int(np.prod(call.args[-2].shape[:-1])), "bias": bias}
        spatial = call.args[0].shape if transposed else call.shape
        dims = tensor.ndim - 2
        positions = int(np.prod(spatial[len(spatial) - dims :])) * (spatial[0] if len(spatial) > dims + 1 else 1)
        return weight, {
            "kernel": tuple(tensor.shape[2:]),
            "stride": tuple(call.args[3]) * (dims if len(call.args[3]) == 1 else 1),
            "groups": call.args[8],
            "positions": positions,
            "bias": self._named(call.args[2]),
        }

    def _named(self, bias: Any) -> str | None:
        """The parameter that a bias is; "" where it is none, as what the network computes."""
        return (self.seen[bias].parameter or "") if isinstance(bias, Tensor) else None

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
