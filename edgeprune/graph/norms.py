"""What norms and reductions do to channel labels. Rules are registered as in rules.py.

Statistics over channels are taken over those that are left: Call.mix says where, so that the dense twin does the same (mixing.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edgeprune.graph.labels import Labels, varies
from edgeprune.graph.rules import Call, Weight, along, axis_labels, give_up, meet, rule


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm")
def batch_norm(call: Call) -> Any:
    """Ties scale, shift and statistics to the channels."""
    x = call.labels[0]
    if isinstance(x, Weight):
        return _standardised(call, x)
    channels = along(x, 1, call.book) if any(varies(x, d) for d in range(x.ndim) if d != 1) else x.movedim(1, -1)[(0,) * (x.ndim - 1)]
    for parameter in call.labels[1:5]:
        if isinstance(parameter, Tensor):
            meet(channels, parameter.reshape(-1), call.book)
    return x, *(call.book.frozen(tuple(o.shape), "statistics") for o in call.out[1:])


def _standardised(call: Call, weight: Weight) -> Any:
    """A conv weight (1, out, in * k * k) whose rows are brought to mean 0 and variance 1: over the inputs that are left."""
    for parameter in call.labels[1:5]:
        if isinstance(parameter, Tensor):
            meet(weight.axes[1], parameter.reshape(-1), call.book)
    for d in (0, *range(3, len(weight.axes))):
        call.book.freeze(weight.axes[d], "parameter in batch_norm")
    call.mix((0, 2, weight.axes[2]), output_axes=(2,))
    return weight, *(_statistics(o, call.book) for o in call.out[1:])


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> Any:
    """A direction whose slices along `dim` are scaled to a length: taken over the inputs that are left."""
    direction, length, dim = call.labels[0], call.labels[1], call.argument(2, "dim", 0)
    if not isinstance(direction, Weight) or not isinstance(length, Tensor) or dim not in (0, 1):
        return give_up(call, "weight norm over everything")
    call.book.tie(direction.axes[dim], axis_labels(length, dim))
    rows = direction.axes[dim]
    call.mix((0, 1 - dim, direction.axes[1 - dim]), (0, dim, rows), (1, dim, rows), output_axes=(1 - dim, dim))
    return direction, length


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(call: Call) -> Any:
    """Its statistics are taken over the channels that are left."""
    x, ndim = call.labels[0], len(call.shape)
    first = ndim - len(call.args[1])
    dims = [d for d in range(first, ndim) if varies(x, d)] if isinstance(x, Tensor) else []
    if isinstance(x, Weight) or len(dims) > 1:
        return give_up(call, "a norm over several axes with channels")
    affine = [(i, p) for i, p in enumerate(call.labels[2:4], 2) if isinstance(p, (Tensor, Weight))]
    if not dims:
        for _, parameter in affine:
            for d in range(ndim - first):
                call.book.freeze(axis_labels(parameter, d), "reads a tensor of fixed size")
    else:
        dim = dims[0]
        channels = along(x, dim, call.book)
        for _, parameter in affine:
            meet(channels, axis_labels(parameter, dim - first), call.book)
        call.mix((0, dim, channels), *((i, dim - first, channels) for i, _ in affine), output_axes=(dim,))
    return x, *(_statistics(o, call.book) for o in call.out[1:])


@rule("native_group_norm")
def group_norm(call: Call) -> Any:
    """As many channels of every norm group stay, and its statistics are taken over them. One channel per group: an instance norm."""
    x, groups = call.labels[0], call.args[6]
    channels = along(x, 1, call.book)
    if 1 < groups < len(channels):
        rows = channels.view(groups, -1)
        call.book.tie(rows, rows[:1])
    affine = [(i, p) for i, p in enumerate(call.labels[1:3], 1) if isinstance(p, Tensor)]
    for _, parameter in affine:
        meet(channels, parameter.reshape(-1), call.book)
    call.mix((0, 1, channels), *((i, 0, channels) for i, _ in affine), output_axes=(1,))
    return x, *(_statistics(o, call.book) for o in call.out[1:])


def _statistics(out: Tensor, book: Labels) -> Tensor:
    return book.frozen(tuple(out.shape), "statistics")


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "logsumexp", "max", "min", "prod", "var_mean", "norm")
def reduce(call: Call) -> Any:
    """Reducing over space keeps the channels; reducing over channels mixes them."""
    labels = call.labels[0]
    dims = call.argument(2 if call.name in ("linalg_vector_norm", "norm") else 1, "dim")
    ndim = len(labels.shape)
    if isinstance(dims, Tensor):
        return give_up(call, f"{call.name} of two tensors")
    dims = sorted({d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim))}, reverse=True)
    if isinstance(labels, Weight):
        return _reduced_parameter(call, labels, dims)
    mixed = [d for d in dims if varies(labels, d)]
    if mixed:
        if sum(varies(labels, d) for d in range(labels.ndim)) > 1 or isinstance(call.out, tuple) or call.name in ("prod", "logsumexp"):
            return give_up(call, f"{call.name} over the channels")
        call.mix((0, mixed[0], along(labels, mixed[0], call.book)))
        return call.book.frozen(call.shape, "computed over the channels")
    keeps = len(call.shape) == labels.ndim
    for d in dims:
        labels = labels.narrow(d, 0, 1) if keeps else labels.select(d, 0)
    return (labels, labels) if isinstance(call.out, tuple) else labels


def _reduced_parameter(call: Call, weight: Weight, dims: list[int]) -> Any:
    """Statistics of a parameter, as in a standardised weight: over the positions that are left."""
    reads = [(0, d, weight.axes[d]) for d in dims if d < 2]
    kept = [d for d in range(len(weight.axes)) if d not in dims]
    long = [d for d in kept if len(weight.axes[d]) > 1]
    if len(long) != 1 or isinstance(call.out, tuple):
        return give_up(call, f"{call.name} of a parameter")
    call.mix(*reads)
    keeps = len(call.shape) == len(weight.axes)
    shape = [-1 if d == long[0] else 1 for d in (range(len(weight.axes)) if keeps else kept)]
    return weight.axes[long[0]].view(shape)
