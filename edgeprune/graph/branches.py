"""Residual branches that can go as a whole: groups of which a plan may keep no channel. No torch here.

A branch is what runs between a tensor and a sum. Without the channels inside it, all that is left of it is the constant that its last
layer's bias and batch norm give for zeros, and the sum's other operand goes on alone. Which groups these are follows from the traced
operations: everything that reads the group's channels must be a conv or linear that reads nothing else and whose result goes, through
a batch norm at most, into a sum with another operand of the same shape, and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeprune.graph.lengths import Floats

if TYPE_CHECKING:
    from edgeprune.graph.channels import ChannelGraph, Op

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
_VIEWS = ("view", "_unsafe_view", "reshape", "alias")


class End(NamedTuple):
    """The last layer of a branch, and what makes its constant: names of tensors, and the epsilon of the norm.

    `weight`: of the conv or linear; `bias`: its own; `norm`: what the names of the batch norm's tensors begin with; None without one.
    `axes`: how many axes of the map follow the channels' one (0 where this is the last one, as behind a linear).
    """

    weight: str
    bias: str | None
    norm: str | None
    eps: float
    axes: int

    @property
    def held(self) -> tuple[str, ...]:
        """The tensors that hold the constant."""
        norm = () if self.norm is None else tuple(self.norm + leaf for leaf in NORM_TENSORS)
        return (*norm, *([self.bias] if self.bias else []))

    @property
    def shifts(self) -> tuple[str, ...]:
        """Those of them that make it nothing where all are zero."""
        return tuple(name for name in self.held if not self.norm or name not in (self.norm + "weight", self.norm + "running_var"))


@dataclass(frozen=True)
class Branch:
    """What goes with the last channel of a group: numbers of operations that no longer run, names of tensors that nobody reads then."""

    ends: tuple[End, ...]
    ops: frozenset[int]
    tensors: frozenset[str]


class _Found(NamedTuple):
    """An end; the activation it leaves, and the number of the operation that adds it to something."""

    end: End
    result: int
    sum: int


def branches_of(graph: ChannelGraph) -> dict[str, Branch]:
    """The groups that can vanish, by name. Where both operands of a sum could, neither can: nothing would be left of it."""
    readers: dict[int, list[int]] = {}
    for number, op in enumerate(graph.ops):
        for read in dict.fromkeys(op.inputs):
            readers.setdefault(read, []).append(number)
    found = {group.name: ends for number, group in enumerate(graph.groups) if (ends := _ends(graph, number, readers))}
    sums = Counter(end.sum for ends in found.values() for end in ends)
    alone = {name: ends for name, ends in found.items() if all(sums[end.sum] == 1 for end in ends)}
    dense = _needed(graph, {})
    return {name: _branch(graph, ends, dense) for name, ends in alone.items()}


def left(graph: ChannelGraph, widths: Floats, count: int, gone: Callable[[str], Sequence[int]]) -> Floats:
    """1 for each of `count` things, 0 under plans without the branch they go with: widths (plans, groups) -> (plans, count).

    `gone` names those that go with a group. One row stands for all plans where no group is empty.
    """
    if widths.all():
        return np.ones((1, count))
    stays = np.ones((len(widths), count))
    for number in np.flatnonzero((widths == 0).any(axis=0)):
        if (name := graph.groups[number].name) in graph.branches:
            stays[np.ix_(widths[:, number] == 0, list(gone(name)))] = 0.0
    return stays


def _branch(graph: ChannelGraph, ends: Sequence[_Found], dense: Collection[int]) -> Branch:
    needed = _needed(graph, {end.sum: end.result for end in ends})
    stopped = frozenset(number for number in dense if number not in needed)
    read = {name for number in needed for name in graph.ops[number].tensors}
    held = {name for end in ends for name in end.end.held}
    tensors = {name for number in stopped for name in graph.ops[number].tensors}
    return Branch(tuple(end.end for end in ends), stopped, frozenset(tensors - read - held))


def _ends(graph: ChannelGraph, group: int, readers: Mapping[int, list[int]]) -> tuple[_Found, ...]:
    """Where the group's channels are read; nothing if any of these places needs them."""
    found = []
    for op in graph.ops:
        if not any(_holds(graph, a, group) for a in op.inputs) or _holds(graph, op.output, group):
            continue
        end = _end(graph, op, group, readers)
        if end is None:
            return ()
        found.append(end)
    once = Counter(end.end.weight for end in found)
    return tuple(found) if max(once.values(), default=1) == 1 else ()


def _end(graph: ChannelGraph, op: Op, group: int, readers: Mapping[int, list[int]]) -> _Found | None:
    if op.kind not in ("conv", "linear") or op.weight is None or op.bias == "" or len(op.inputs) != 1:
        return None
    if sum(other.weight == op.weight for other in graph.ops) > 1:  # its other run goes on
        return None
    read = graph.activations[op.inputs[0]]
    if read.fixed or any(other != group for other, _ in read.per_channel):
        return None
    norm: Op | None = None
    number = op.output
    for number, then in _chain(graph, op.output, readers):
        if then.kind == "norm" and norm is None and graph.keeps_statistics(then):
            norm = then
        elif then.name == "add":
            shapes = {graph.activations[a].shape for a in (*then.inputs, then.output)}
            if len(shapes) != 1 or len(set(then.inputs)) != 2:
                return None
            axes = len(graph.activations[op.output].shape) - 2 if op.kind == "conv" else 0
            end = End(op.weight, op.bias, norm.stem if norm else None, norm.eps if norm else 0.0, axes)
            return _Found(end, number, readers[number][0])
        elif op.kind != "linear" or then.name not in _VIEWS or _last(graph, then.output) != _last(graph, op.output):
            return None
    return None


def _chain(graph: ChannelGraph, number: int, readers: Mapping[int, list[int]]) -> Iterator[tuple[int, Op]]:
    """Each activation from this one on and the only operation that reads it, as long as there is no other."""
    while len(readers.get(number, ())) == 1 and number not in graph.output_activations:
        then = graph.ops[readers[number][0]]
        yield number, then
        number = then.output


def _needed(graph: ChannelGraph, without: Mapping[int, int]) -> frozenset[int]:
    """The operations that the network's outputs need; `without`: an operand that a sum is spared, by the sum's number."""
    wanted, needed = set(graph.output_activations), set()
    for number in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[number]
        if op.output in wanted:
            needed.add(number)
            wanted.update(a for a in op.inputs if a != without.get(number))
    return frozenset(needed)


def _holds(graph: ChannelGraph, activation: int, group: int) -> bool:
    return any(number == group for number, _ in graph.activations[activation].per_channel)


def _last(graph: ChannelGraph, activation: int) -> int:
    return graph.activations[activation].shape[-1]
