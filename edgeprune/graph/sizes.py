"""Sizes that an exported network holds as numbers: which channels each of them counts, and the numbers for fewer channels.

Reading runs the graph with labels, beside the run of the user's own network and in the same book: a number counts the positions of an
axis, so it becomes the number of positions that stay. Rewriting needs no run: the graph says which channels every axis holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from edgeprune.graph.exported import Exported, aten, operation
from edgeprune.graph.labels import varies
from edgeprune.graph.rules import Labelled, Weight, axis_labels
from edgeprune.graph.running import tensors_in

Stays = NDArray[np.bool_]

# Where the sizes of the result stand among the arguments.
_RESULT = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to", "new_zeros", "new_ones", "new_full"), 1),
    **dict.fromkeys(("zeros", "ones", "full"), 0),
}
_NORMS = ("layer_norm", "rms_norm")  # the sizes of the last axes stand second
_CUTS = ("split", "split_with_sizes", "chunk", "slice", "narrow")  # the argument is a place on an axis of what is read
_PADS = ("pad", "constant_pad_nd")  # amounts from the last axis on, before and after
_GROUPS = {"conv1d": 6, "conv2d": 6, "conv3d": 6, "conv_transpose1d": 6, "conv_transpose2d": 6, "conv_transpose3d": 6, "convolution": 8}


class Tracing(Protocol):
    """A dispatch mode that knows the labels of every tensor of its run."""

    def enter(self, tensor: Tensor) -> None:
        """A network input."""

    def labels_of(self, tensor: Tensor) -> Labelled:
        """Of a tensor of this run."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *exc: Any) -> Any: ...


class Stuck(Exception):
    """An operation of the graph that does not take fewer channels."""

    def __init__(self, node: str, target: str) -> None:
        super().__init__(target)
        self.node = node
        self.target = target


@dataclass
class Reading:
    """What a run of the graph showed: the labels along every axis whose size is a number, and what each operation reads."""

    axes: list[tuple[str, int, Tensor]] = field(default_factory=list)
    reads: dict[str, list[Labelled]] = field(default_factory=dict)


def read(network: Exported, inputs: tuple[Any, ...], tracing: Tracing) -> Reading:
    """The labels along every axis whose size, or a place on it, is an argument of an operation of the graph."""
    reader = _Reader(network, tracing)
    for tensor in tensors_in(inputs):
        tracing.enter(tensor)
    with torch.no_grad(), tracing:
        reader.run(*inputs)
    return Reading([found for name, sizes in reader.sized for found in _axes(name, sizes)], reader.reads)


class _Reader(fx.Interpreter):
    """Runs the graph under a tracing mode and looks up the labels at every operation. No tensor is touched besides: it would be traced."""

    def __init__(self, network: Exported, tracing: Tracing) -> None:
        super().__init__(network)
        self.sized: list[tuple[str, tuple[Labelled, int | None]]] = []
        self.reads: dict[str, list[Labelled]] = {}
        self._tracing = tracing

    def run_node(self, n: fx.Node) -> Any:
        """The node's result, as ever."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        name = operation(n)
        if name:
            self.reads[n.name] = [self._tracing.labels_of(t) for t in tensors_in(args)]
        result = super().run_node(n)
        if name in _RESULT:
            self.sized.append((n.name, (self._tracing.labels_of(result), None)))
        elif name in _NORMS and isinstance(normed := self._tracing.labels_of(result), Tensor):
            self.sized.append((n.name, (normed[(0,) * (normed.ndim - len(args[1]))], None)))
        elif name in _PADS:
            for axis in range(1, 1 + len(args[1]) // 2):
                self.sized.append((n.name, (self._tracing.labels_of(result), -axis)))
        elif name in _CUTS:
            dim = cut_axis(n, name) % args[0].ndim
            self.sized.append((n.name, (self.reads[n.name][0], dim)))
        elif name in _GROUPS and len(n.args) > _GROUPS[name]:
            dim = args[0].ndim - args[1].ndim + 1
            if n.args[_GROUPS[name]] == args[0].shape[dim] > 1:
                self.sized.append((n.name, (self.reads[n.name][0], dim)))
        return result


def cut_axis(node: fx.Node, name: str) -> int:
    """The axis that an operation cuts."""
    position = 2 if name in ("split", "split_with_sizes", "chunk") else 1
    found = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    assert isinstance(found, int)
    return found


def _axes(name: str, sizes: tuple[Labelled, int | None]) -> list[tuple[str, int, Tensor]]:
    labels, only = sizes
    ndim = len(labels.shape)
    if isinstance(labels, Weight):
        long = [d for d, along in enumerate(labels.axes) if len(along) > 1]
    else:
        long = [d for d in range(ndim) if varies(labels, d)]
    asked = long if only is None else [only]
    return [(name, d, axis_labels(labels, d % ndim)) for d in asked if d % ndim in long]


def rewrite(network: Exported, kept: Mapping[tuple[str, int], Stays]) -> None:
    """Put the numbers of a slim network into its graph, in place. `kept[node, axis]`: which positions stay, (n,).

    Raises Stuck for an operation that cannot say its new size.
    """
    axes: dict[str, dict[int, Stays]] = {}
    for (name, axis), stays in kept.items():
        if not stays.all():
            axes.setdefault(name, {})[axis] = stays
    for node in list(network.graph.nodes):
        if node.name in axes:
            _rewrite_node(node, operation(node), axes[node.name])
    network.recompile()


def _rewrite_node(node: fx.Node, name: str, axes: Mapping[int, Stays]) -> None:
    if name in _RESULT:
        sizes = _resized(node, list(node.args[_RESULT[name]]), axes)  # type: ignore[arg-type]  # a list of sizes
        node.update_arg(_RESULT[name], sizes)
        return
    if name in _NORMS:
        lengths: list[Any] = list(node.args[1])  # type: ignore[arg-type]  # a list of sizes
        node.update_arg(1, [int(axes[i].sum()) if i in axes else n for i, n in enumerate(lengths)])
        return
    if name in _PADS:
        _rewrite_pad(node, axes)
        return
    ((axis, stays),) = axes.items()
    if name in _GROUPS:
        node.update_arg(_GROUPS[name], int(stays.sum()))
    elif name in ("slice", "narrow"):
        _rewrite_cut(node, name, axis, stays)
    else:
        before = np.cumsum([0, *_parts(node, name, len(stays))])
        counts = [int(stays[a:b].sum()) for a, b in pairwise(before)]
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], counts, axis), {}


def _resized(node: fx.Node, sizes: list[Any], axes: Mapping[int, Stays]) -> list[Any]:
    """Numbers become what stays; a size that is computed from the batch is left to torch (-1), once per operation."""
    for axis, stays in axes.items():
        if isinstance(sizes[axis], int):
            sizes[axis] = -1 if sizes[axis] == -1 else int(stays.sum())
        elif operation(node) in ("view", "reshape", "_unsafe_view") and -1 not in sizes:
            sizes[axis] = -1
        else:
            raise Stuck(node.name, str(node.target))
    return sizes


def _rewrite_pad(node: fx.Node, axes: Mapping[int, Stays]) -> None:
    """What is in front of an axis and behind it; the axis itself brings its size along."""
    amounts: list[Any] = list(node.args[1])  # type: ignore[arg-type]  # a list of sizes
    for axis, stays in axes.items():
        at = 2 * (-axis - 1)
        before, after = amounts[at : at + 2]
        amounts[at : at + 2] = int(stays[:before].sum()), int(stays[len(stays) - after :].sum())
    node.update_arg(1, amounts)


def _rewrite_cut(node: fx.Node, name: str, axis: int, stays: Stays) -> None:
    start, end = (node.args[i] if len(node.args) > i else None for i in (2, 3))
    if any(isinstance(place, fx.Node) for place in (start, end)):
        raise Stuck(node.name, str(node.target))
    total = len(stays)
    first, past, _ = slice(start, start + end if name == "narrow" else end).indices(total)  # type: ignore[operator]
    new_start, length = int(stays[:first].sum()), int(stays[first:past].sum())
    node.args = (node.args[0], axis, new_start, length if name == "narrow" else new_start + length)


def _parts(node: fx.Node, name: str, total: int) -> list[int]:
    """The sizes of the parts of a split of `total` positions."""
    asked: Any = node.args[1]
    if name == "split_with_sizes" or isinstance(asked, (list, tuple)):
        if not all(isinstance(size, int) for size in asked):
            raise Stuck(node.name, str(node.target))
        return list(asked)
    step = -(-total // asked) if name == "chunk" else asked
    return [min(step, total - at) for at in range(0, total, step)]
