"""What each operation does to channel labels: one function per kind of operation, found by the operation's name.

A rule gets the call with labels in place of tensors and returns the labels of what comes out. Data movement runs the same
operation on the labels; arithmetic ties the labels that meet; conv and linear tie what they read and emit their own output axis.
An operation without a rule freezes what goes in: its channels stay, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune.graph.labels import NEUTRAL, Labels, Mixed, Place, compact, varies


@dataclass(frozen=True)
class Weight:
    """A parameter with several long axes: `axes[d]` labels its dimension d as it stands (after transposes)."""

    axes: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense shape."""
        return tuple(len(a) for a in self.axes)


class Fill(Weight):
    """The same value everywhere: any position can go, so each axis may follow what it meets."""


Labelled = Tensor | Weight


@dataclass(frozen=True)
class Call:
    """One operation: `labels` mirrors `args` with labels instead of tensors; `out` is what it returned."""

    name: str
    func: Any  # an OpOverload: callable, with a schema
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: tuple[Any, ...]
    out: Any
    book: Labels
    ordinal: int = 0  # how many operations of this name ran before

    def mix(self, *reads: tuple[int, int, Tensor], output_axes: tuple[int, ...] = ()) -> None:
        """It computes over the set of channels: (argument, axis, labels along it) of all it reads; the result may keep the first ones."""
        self.book.mixed.append(Mixed(self.name, self.ordinal, reads, output_axes))

    def place(self, axis: int, labels: Tensor, bounds: tuple[int, ...], *, silent: bool = True) -> None:
        """It cuts, pads, splits or fills an axis with channels: labels.Place."""
        self.book.places.append(Place(self.name, self.ordinal, axis, labels, bounds, silent))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) output."""
        first = self.out[0] if isinstance(self.out, (tuple, list)) else self.out
        return tuple(first.shape)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[position] if len(self.args) > position else default


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under operation names (in-place variants share them)."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def axis_labels(labels: Labelled, dim: int) -> Tensor:
    """The labels along one axis of a parameter, (n,); an axis with a single position has the neutral one."""
    if isinstance(labels, Weight):
        return labels.axes[dim]
    if labels.shape[dim] == 1:
        return torch.zeros(1, dtype=torch.long)
    for d in range(labels.ndim - 1, -1, -1):
        if d != dim:
            labels = labels.select(d, 0)
    return labels


def along(labels: Tensor, dim: int, book: Labels) -> Tensor:
    """The labels along `dim`, (n,), after everything at the same position of `dim` is tied together."""
    moved = labels.movedim(dim, -1)
    first = moved[(0,) * (moved.ndim - 1)]
    if any(varies(moved, d) for d in range(moved.ndim - 1)):
        book.tie(moved, first.expand(moved.shape))
    return first


def meet(channels: Tensor, parameter: Tensor, book: Labels) -> None:
    """A parameter's axis reads or scales these channels. Where the channels have no labels the parameter's must stay."""
    book.tie(channels, parameter)
    unlabelled = (channels == NEUTRAL) & (parameter != NEUTRAL)
    if bool(unlabelled.any()):
        book.freeze(torch.broadcast_to(parameter, unlabelled.shape)[unlabelled], "reads a tensor of fixed size")


def give_up(call: Call, reason: str) -> Any:
    """Freeze every channel that goes in; what comes out has a fixed size."""
    for item in _flat(call.labels):
        for labels in item.axes if isinstance(item, Weight) else (item,):
            call.book.freeze(labels, reason)
    if isinstance(call.out, Tensor):
        return call.book.frozen(tuple(call.out.shape), reason)
    outs = call.out if isinstance(call.out, (tuple, list)) else ()
    return tuple(call.book.frozen(tuple(o.shape), reason) if isinstance(o, Tensor) else None for o in outs)


def _flat(items: Any) -> list[Labelled]:
    if isinstance(items, (Tensor, Weight)):
        return [items]
    if isinstance(items, (tuple, list)):
        return [leaf for item in items for leaf in _flat(item)]
    return []


def _resized(labels: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The labels for an output that differs only along dimensions without labels of their own, else None."""
    if labels.ndim != len(shape):
        return None
    for d, size in enumerate(shape):
        if labels.shape[d] != size:
            if varies(labels, d):
                return None
            labels = labels.narrow(d, 0, 1).expand(*(size if i == d else n for i, n in enumerate(labels.shape)))
    return labels


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(call: Call) -> Any:
    """Ties what it reads to the weight's input axis (depthwise and grouped: to the right rows) and emits the output axis."""
    x, weight, bias = call.labels[:3]
    transposed, groups = call.args[6], call.args[8]
    if isinstance(x, Weight):
        return give_up(call, "parameter read by a convolution")
    dim = x.ndim - len(call.args[1].shape) + 1
    space = [d for d in range(dim + 1, x.ndim) if varies(x, d)]
    if space and not varies(x, dim) and any(varies(compact(x), d) for d in space):
        return _across_channels(call, compact(x), space)
    channels = along(x, dim, call.book)
    axis_out, axis_in = (1, 0) if transposed else (0, 1)
    out, read = axis_labels(weight, axis_out), axis_labels(weight, axis_in)
    if groups == 1:
        meet(channels, read, call.book)
    elif groups == len(channels) and (not transposed or len(out) == 1):
        producing = read if transposed else out
        meet(channels[:, None], producing.view(groups, -1), call.book)
        out = producing
    elif transposed:
        meet(channels, read, call.book)
        rows = channels.view(groups, -1)
        call.book.tie(rows, rows[:1])
        if rows.shape[1] == 1:  # a group is a channel: it goes with all that it makes
            call.book.freeze(out, "a depthwise transposed convolution makes several channels of each")
            out = channels.repeat_interleave(len(out))
        else:
            out = out.repeat(groups)
    else:
        meet(channels.view(groups, -1), read, call.book)
        rows = out.view(groups, -1)
        call.book.tie(rows, rows[:1])
    if isinstance(bias, Tensor):
        meet(out, bias.reshape(-1), call.book)
    dim = len(call.shape) - len(call.args[1].shape) + 1
    return out.view(-1, *[1] * (len(call.shape) - dim - 1)).expand(call.shape)


@rule("addmm", "mm")
def linear(call: Call) -> Any:
    """Ties the last axis it reads to the weight and emits the weight's other axis."""
    bias, x, weight = call.labels if call.name == "addmm" else (None, *call.labels)
    if isinstance(x, Weight) or not (isinstance(weight, Weight) or 1 in call.args[-1].shape):
        return product(call)
    read, out = axis_labels(weight, 0), axis_labels(weight, 1)
    if varies(x, 0) and not varies(x, 1):  # the channels are the rows, as where a network mixes tokens
        for parameter in (read, out, *([bias.reshape(-1)] if isinstance(bias, Tensor) else [])):
            call.book.freeze(parameter, "mixes positions, the same way for every channel")
        return x.narrow(1, 0, 1).expand(call.shape)
    meet(along(x, 1, call.book), read, call.book)
    if isinstance(bias, Tensor):
        call.book.tie(out, bias.reshape(-1))
    return out.expand(call.shape)


def _across_channels(call: Call, x: Tensor, space: list[int]) -> Any:
    """The channels lie along a spatial axis (efficient channel attention): the kernel slides over those that are left."""
    weight, bias = call.labels[1:3]
    dim = next(d for d in space if varies(x, d))
    if sum(varies(x, d) for d in range(x.ndim)) > 1 or len(call.shape) != x.ndim or call.shape[dim] != x.shape[dim]:
        return give_up(call, "a convolution slides over the channels")
    for parameter in (weight, bias):
        for d in range(len(parameter.shape) if isinstance(parameter, (Tensor, Weight)) else 0):
            call.book.freeze(axis_labels(parameter, d), "a convolution slides over the channels")
    channels = along(x, dim, call.book)
    call.mix((0, dim, channels), output_axes=(dim,))
    return channels.view(*(-1 if d == dim else 1 for d in range(x.ndim))).expand(call.shape)


@rule("bmm", "baddbmm")
def product(call: Call) -> Any:
    """A product of two activations keeps the rows of the one and the columns of the other; what it sums over stays whole.

    Code that multiplies matrices often divides by a power of the size it sums over: removal there would change more than the sum.
    """
    *added, left, right = call.labels
    if isinstance(left, Tensor) and isinstance(right, Weight) and len(right.axes[0]) == 1 and not added:
        meet(along(left, 2, call.book), right.axes[1], call.book)
        return right.axes[2].expand(call.shape)
    if isinstance(left, Weight) or isinstance(right, Weight):
        return give_up(call, "matrix product of a parameter and an activation")
    for labels in added:
        call.book.freeze(labels, "added to a matrix product")
    last = left.ndim - 1
    for labels, dim in ((left, last), (right, last - 1)):
        if varies(labels, dim):
            call.book.freeze(labels, "a matrix product sums over these channels (attention)")
    batch = [labels.narrow(last, 0, 1).narrow(last - 1, 0, 1) for labels in (left, right) if last == 2 and varies(labels, 0)]
    rows, columns = varies(left, last - 1), varies(right, last)
    if rows + columns + bool(batch) > 1:
        return give_up(call, "product of two different channel axes")
    if batch:
        call.book.tie(batch[0], batch[-1])
        return batch[0].expand(call.shape)
    if rows:
        return left.narrow(last, 0, 1).expand(call.shape)
    return right.narrow(last - 1, 0, 1).expand(call.shape)


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")
def attention(call: Call) -> Any:
    """Its kernels need queries, keys and values of one size, and scale by it."""
    return give_up(call, "attention heads stay whole")


POINTWISE = (
    "relu relu6 hardtanh hardswish hardsigmoid sigmoid silu gelu elu celu selu leaky_relu _prelu_kernel rrelu mish softplus tanh "
    "log_sigmoid_forward threshold softshrink hardshrink abs neg exp log log1p expm1 sqrt rsqrt square reciprocal sin cos erf pow "
    "sign floor ceil round clamp clamp_min clamp_max add sub rsub mul div addcmul addcdiv lerp maximum minimum fmod remainder where "
    "masked_fill copy eq ne lt gt le ge logical_and logical_not logical_or isnan nan_to_num native_dropout bernoulli atan2 "
    "__and__ bitwise_and fill zero"
).split()


@rule(*POINTWISE)
def pointwise(call: Call) -> Any:
    """Ties the labels that meet. An operand broadcast over the channels ties nothing, unless it has channels of its own."""
    shape = call.shape
    if (weight := _as_parameter(call, shape)) is not None:
        return weight
    operands = [as_tensor(item, call.labels, call.book) for item in _flat(call.labels)]
    operands = [o for o in operands if o.ndim]
    full = []
    for i, labels in enumerate(operands):
        pad = len(shape) - labels.ndim
        others = [o for j, o in enumerate(operands) if j != i]
        missed = [
            d
            for d in range(len(shape))
            if (d < pad or labels.shape[d - pad] < shape[d]) and any(_varies_at(o, d - len(shape)) for o in others)
        ]
        if not missed:
            full.append(labels.expand(shape))
        else:
            mixed = any(varies(labels, d) for d in range(labels.ndim))
            call.book.freeze(labels, "product of two different channel axes" if mixed else "broadcast over channels")
    if not full:
        return call.book.frozen(shape, "product of two different channel axes")
    result = full[0]
    for other in full[1:]:
        call.book.tie(result, other)
        if bool((core_view(result) == NEUTRAL).any()):
            result = torch.where(result == NEUTRAL, other, result)
    return (result, result) if isinstance(call.out, tuple) else result


def _as_parameter(call: Call, shape: tuple[int, ...]) -> Weight | None:
    """Arithmetic of a parameter with others or with statistics of it gives a parameter; None where an activation takes part."""
    operands = [o for o in _flat(call.labels) if o.shape]
    weights = [o for o in operands if isinstance(o, Weight)]
    if not weights or weights[0].shape != shape or isinstance(call.out, tuple):
        return None
    axes = weights[0].axes
    long = [d for d in range(len(shape)) if shape[d] > 1]
    for other in operands:
        missed = [d for d in long if len(shape) - d > len(other.shape) or other.shape[d - len(shape)] == 1]
        if isinstance(other, Tensor) and not missed:
            return None
    for other in operands:
        for d in range(-len(other.shape), 0):
            if other.shape[d] > 1:
                call.book.tie(axes[d], axis_labels(other, len(other.shape) + d))
    return Weight(axes)


def core_view(labels: Tensor) -> Tensor:
    """One position of every stride-0 dimension: enough to look at the labels that occur."""
    for d in range(labels.ndim):
        if not varies(labels, d) and labels.shape[d] > 1:
            labels = labels.narrow(d, 0, 1)
    return labels


def _varies_at(labels: Tensor, dim: int) -> bool:
    return -dim <= labels.ndim and varies(labels, dim % labels.ndim)


def as_tensor(item: Labelled, operands: Any, book: Labels) -> Tensor:
    """A parameter with several long axes meets channels along the one axis where the other operand has labels."""
    if isinstance(item, Tensor):
        return item
    others = [o for o in _flat(operands) if isinstance(o, Tensor)]
    ndim = len(item.axes)
    dims = [d for d in range(ndim) if any(_varies_at(o, d - ndim) for o in others)]
    for d, labels in enumerate(item.axes):
        if dims != [d]:
            book.freeze(labels, "parameter used in arithmetic")
    if len(dims) != 1:
        return book.frozen(item.shape, "parameter used in arithmetic")
    return item.axes[dims[0]].view(*(-1 if d == dims[0] else 1 for d in range(ndim))).expand(item.shape)


RESIZING = (
    "max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d "
    "_upsample_bilinear2d_aa reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d mkldnn_max_pool2d _softmax "
    "_log_softmax cumsum cumprod _fft_r2c _fft_c2c _fft_c2r"
).split()
_ALONG_AXES = ("_softmax", "_log_softmax", "cumsum", "cumprod", "_fft_r2c", "_fft_c2c", "_fft_c2r")  # the second argument names them


@rule(*RESIZING)
def resize(call: Call) -> Any:
    """Pooling, interpolation, running sums and Fourier transforms work channel by channel, unless they run along the channels."""
    labels = call.labels[0]
    if isinstance(labels, Weight):
        return give_up(call, f"parameter in {call.name}")
    axes = call.args[1] if call.name in _ALONG_AXES else ()
    if any(varies(labels, d % labels.ndim) for d in ([axes] if isinstance(axes, int) else axes)):
        return give_up(call, f"{call.name.strip('_')} over the channels")
    resized = _resized(labels, call.shape)
    if resized is None:
        return give_up(call, f"{call.name} changes the number of channels")
    return (resized, resized) if isinstance(call.out, tuple) else resized
