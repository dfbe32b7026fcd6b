"""A rehearsal of pruning: the network runs once without the last channel of every group.

Numbers of channels that are written in the network's code, as in x.view(-1, 400) or x.split(26, 1), look like any other size while
the dense network runs. Without one channel of each group they show: an operation fails, or returns another size than its labels say.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from edgeprune.errors import SlimError
from edgeprune.graph.channels import ChannelGraph
from edgeprune.graph.duplicate import duplicate
from edgeprune.graph.exported import Exported
from edgeprune.graph.running import Observer, evaluating, tensors_in
from edgeprune.graph.sizes import Stuck
from edgeprune.graph.slim import borrowed, named_tensors, removed_positions, resize, slim_exported, with_numbers
from edgeprune.graph.symbolic import Located
from edgeprune.plan import Plan

# Rough figures of one core of a desktop: they only decide which of two ways to the same answer is tried first.
_MACS_PER_SECOND = 3e10
_PARAMETERS_PER_SECOND = 2.5e8
_SECONDS_PER_HOLLOW_OPERATION = 4e-4
_SECONDS_TO_IMPORT_COMPILER = 1.2
_LARGEST_COPY_BYTES = 2.5e8


class Misfit(NamedTuple):
    """An operation that does not take smaller sizes: by what it reads, or (reads is false) by what the code does with its result."""

    call: int
    reads: bool


def misfit(model: nn.Module, graph: ChannelGraph, inputs: tuple[Any, ...]) -> Misfit | None:
    """The first operation that does not fit when channels are gone; None when all fit, or when the network cannot be copied.

    Raises symbolic.Unwritable where the numbers of `graph.written` cannot be changed.
    """
    plan = _fewer(graph)
    widths = {name: len(channels) for name, channels in plan.keep.items()}
    sizes = {}
    for op in graph.ops:
        made = graph.activations[op.output]
        if made.per_channel and made.even:  # sizes that do not depend on channels may depend on the data
            sizes[op.call] = round(made.fixed + sum(n * widths[graph.groups[g].name] for g, n in made.per_channel))
    if not graph.groups:
        return None
    if _costly(graph) and _fits_without_values(model, graph, plan, inputs, sizes):
        return None
    watch = _Watch(sizes)
    try:
        small = borrowed(model, graph, plan)
        _run(small, inputs, watch)
    except _DoesNotRun:
        return Misfit(watch.calls - 1, watch.busy) if watch.calls else None
    except SlimError:
        return None
    return None


def _costly(graph: ChannelGraph) -> bool:
    """Whether copying the weights and computing with them takes longer than running the network without values, or too much memory.

    What torch does on the meta device it does in Python, and the first time it imports its compiler for that.
    """
    with_values = graph.macs / _MACS_PER_SECOND + graph.params / _PARAMETERS_PER_SECOND
    without = len(graph.ops) * _SECONDS_PER_HOLLOW_OPERATION
    without += 0 if "torch._dynamo" in sys.modules else _SECONDS_TO_IMPORT_COMPILER
    return with_values > without or 4 * graph.params > _LARGEST_COPY_BYTES


def _fits_without_values(model: nn.Module, graph: ChannelGraph, plan: Plan, inputs: tuple[Any, ...], sizes: Mapping[int, int]) -> bool:
    """Whether the slim network runs on torch's meta device, where tensors have sizes but no values, and all of them are as expected.

    That takes no memory and no arithmetic. False settles nothing: the code may look at values, or an operation may lack a meta version.
    """
    watch = _Watch(sizes)
    try:
        hollow = with_numbers(_hollow(model, removed_positions(graph, plan)), graph, plan)
        _run(hollow, tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, inputs), watch)
    except _DoesNotRun:
        return False
    return watch.checked == len(sizes)


def _hollow(model: nn.Module, gone: Mapping[tuple[str, int], NDArray[np.bool_]]) -> nn.Module:
    """What `slim` makes of the network, on the meta device."""
    instead: dict[int, Any] = {}
    for name, tensor in named_tensors(model):
        shape = [int((~gone[name, d]).sum()) if (name, d) in gone else n for d, n in enumerate(tensor.shape)]
        made = torch.empty(shape, dtype=tensor.dtype, device="meta")
        instead[id(tensor)] = nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
    try:
        hollow = duplicate(model, instead)
    except Exception as error:  # a user's module may raise anything while it is copied
        raise _DoesNotRun from error
    resize(hollow, {})
    return hollow


def stuck(network: Exported, graph: ChannelGraph, inputs: tuple[Any, ...]) -> Stuck | None:
    """The operation of an exported network that does not take fewer channels, if there is one."""
    try:
        small = slim_exported(network, graph, _fewer(graph), borrow=True)
    except Stuck as problem:
        return problem
    run = Located(small)
    try:
        with torch.no_grad():
            run.run(*inputs)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return Stuck(run.at.name, str(run.at.target))
    return None


def _fewer(graph: ChannelGraph) -> Plan:
    """Every group without its last one to three channels, drawn at random: what agrees by chance with a fixed number does so rarely.

    The last ones, so that most thin weights are views of the dense ones. Two channels stay where there are three: sizes of 1 are
    treated in ways of their own.
    """
    draw = np.random.default_rng(0)
    keep = {}
    for group in graph.groups:
        gone = int(draw.integers(1, max(1, min(3, group.channels - 2)) + 1))
        keep[group.name] = tuple(range(group.channels - gone))
    return Plan(keep)


class _DoesNotRun(Exception):
    """The rehearsal stopped."""


def _run(small: nn.Module, inputs: tuple[Any, ...], watch: _Watch) -> None:
    try:
        with torch.no_grad(), evaluating(small), watch:
            small(*inputs)
    except Exception as error:  # a user's forward may raise anything
        raise _DoesNotRun from error


class _Watch(Observer):
    """Compares the size of every operation's first output with what the labels say."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        super().__init__()
        self.calls = 0
        self.checked = 0
        self.busy = False
        self._sizes = sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operation; raises ValueError for another size than expected."""
        number, self.calls, self.busy = self.calls, self.calls + 1, True
        out = func(*args, **(kwargs or {}))
        first = next(tensors_in(out), None)
        if first is not None and number in self._sizes:
            self.checked += 1
            if first.numel() != self._sizes[number]:
                raise ValueError(f"operation {number} returns {first.numel()} elements, expected {self._sizes[number]}")
        self.busy = False
        return out
