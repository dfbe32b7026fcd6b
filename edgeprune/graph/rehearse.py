"""A rehearsal of pruning: the network runs once without the last channel of every group.

Numbers of channels that are written in the network's code, as in x.view(-1, 400) or x.split(26, 1), look like any other size while
the dense network runs. Without one channel of each group they show: an operation fails, or returns another size than its labels say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgeprune.errors import SlimError
from edgeprune.graph.channels import ChannelGraph
from edgeprune.graph.exported import Exported
from edgeprune.graph.running import evaluating, tensors_in
from edgeprune.graph.sizes import Stuck
from edgeprune.graph.slim import slim, slim_exported
from edgeprune.plan import Plan


class Misfit(NamedTuple):
    """An operation that does not take smaller sizes: by what it reads, or (reads is false) by what the code does with its result."""

    call: int
    reads: bool


def misfit(model: nn.Module, graph: ChannelGraph, inputs: tuple[Any, ...]) -> Misfit | None:
    """The first operation that does not fit when channels are gone; None when all fit, or when the network cannot be copied."""
    widths = {name: len(channels) for name, channels in _fewer(graph).keep.items()}
    sizes = {}
    for op in graph.ops:
        made = graph.activations[op.output]
        if made.per_channel:  # sizes that do not depend on channels may depend on the data
            sizes[op.call] = round(made.fixed + sum(n * widths[graph.groups[g].name] for g, n in made.per_channel))
    if not graph.groups:
        return None
    watch = _Watch(sizes)
    try:
        small = slim(model, graph, _fewer(graph))
        _run(small, inputs, watch)
    except _DoesNotRun:
        return Misfit(watch.calls - 1, watch.busy) if watch.calls else None
    except SlimError:
        return None
    return None


def stuck(network: Exported, graph: ChannelGraph, inputs: tuple[Any, ...]) -> Stuck | None:
    """The operation of an exported network that does not take fewer channels, if there is one."""
    try:
        small = slim_exported(network, graph, _fewer(graph))
    except Stuck as problem:
        return problem
    run = _Run(small)
    try:
        with torch.no_grad():
            run.run(*inputs)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return Stuck(run.at.name, str(run.at.target))
    return None


class _Run(fx.Interpreter):
    """Runs a graph and knows where it is."""

    def run_node(self, n: fx.Node) -> Any:
        """The node's result, as ever."""
        self.at = n
        return super().run_node(n)


def _fewer(graph: ChannelGraph) -> Plan:
    """Every group without one to three of its channels, drawn at random: what agrees by chance with a fixed number does so rarely.

    Two channels stay where there are three: sizes of 1 are treated in ways of their own.
    """
    draw = np.random.default_rng(0)
    keep = {}
    for group in graph.groups:
        gone = draw.choice(group.channels, int(draw.integers(1, max(1, min(3, group.channels - 2)) + 1)), replace=False)
        keep[group.name] = tuple(np.delete(np.arange(group.channels), gone).tolist())
    return Plan(keep)


class _DoesNotRun(Exception):
    """The rehearsal stopped."""


def _run(small: nn.Module, inputs: tuple[Any, ...], watch: _Watch) -> None:
    try:
        with torch.no_grad(), evaluating(small), watch:
            small(*inputs)
    except Exception as error:  # a user's forward may raise anything
        raise _DoesNotRun from error


class _Watch(TorchDispatchMode):
    """Compares the size of every operation's first output with what the labels say."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.calls = 0
        self.busy = False
        self._sizes = sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operation; raises ValueError for another size than expected."""
        number, self.calls, self.busy = self.calls, self.calls + 1, True
        out = func(*args, **(kwargs or {}))
        first = next(tensors_in(out), None)
        if first is not None and number in self._sizes and first.numel() != self._sizes[number]:
            raise ValueError(f"operation {number} returns {first.numel()} elements, expected {self._sizes[number]}")
        self.busy = False
        return out
