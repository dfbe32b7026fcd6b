"""What data movement does to channel labels: the same operation runs on the labels. Rules are registered as in rules.py.

Sizes are checked later: whether a cut or a split was computed from the tensor or written as a number, a rehearsal shows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import torch

from edgeprune.graph.labels import compact, varies
from edgeprune.graph.rules import Call, Fill, Weight, along, as_tensor, axis_labels, core_view, give_up, meet, rule

FIXED_SIZE = "the network's code cuts or pads its channels at fixed positions"


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
def same(call: Call) -> Any:
    """The same labels."""
    return call.labels[0]


@rule(*"zeros ones full new_zeros new_ones new_full".split())
def fill(call: Call) -> Any:
    """The same value everywhere: any position can go, so each axis may follow what it meets."""
    made = Fill(tuple(call.book.fresh(n) for n in call.shape))
    for axis, labels in enumerate(made.axes):
        call.place(axis, labels, (), silent=False)
    return made


@rule(*"new_empty new_empty_strided empty eye arange linspace rand randn scalar_tensor".split())
def constant(call: Call) -> Any:
    """Sizes given as numbers; a tensor it was called on is not read."""
    return call.book.frozen(call.shape, "constant made in the forward pass")


@rule("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "flip", "repeat", "pixel_shuffle", "pixel_unshuffle")
def move(call: Call) -> Any:
    """Positions move as the data does."""
    labels = call.labels[0]
    if isinstance(labels, Weight):
        if call.name in ("squeeze", "unsqueeze"):
            return _reshaped_parameter(call, labels)
        if call.name not in ("t", "transpose", "permute"):
            return give_up(call, "parameter reshaped")
        order = call.func(torch.empty(*range(2, 2 + len(labels.axes)), device="meta"), *call.args[1:]).shape
        return Weight(tuple(labels.axes[n - 2] for n in order))
    if call.name == "expand" and len(call.shape) == labels.ndim and not any(varies(labels, d) for d in range(labels.ndim)):
        grown = [d for d, n in enumerate(call.shape) if n != labels.shape[d]]
        if len(grown) == 1:  # one value for all channels: as many copies as what it meets has channels
            labels = call.book.fresh(call.shape[grown[0]]).view(*(-1 if d == grown[0] else 1 for d in range(labels.ndim)))
    if call.name == "flip":
        return call.func(core_view(labels), call.args[1]).expand(call.shape)
    moved = call.func(labels, *call.args[1:], **call.kwargs)
    return compact(moved) if call.name == "repeat" else moved


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def reshape(call: Call) -> Any:
    """Merging axes keeps labels; where one labelled axis is split, the last part may shrink: positions that differ in the others meet."""
    labels = call.labels[0]
    if isinstance(labels, Weight):
        return _reshaped_parameter(call, labels)
    shape = call.shape
    if not any(varies(labels, d) for d in range(labels.ndim)):
        return (labels[(0,) * labels.ndim] if labels.numel() else torch.zeros((), dtype=torch.long)).expand(shape)
    out = compact(labels.reshape(shape))
    for inside, outside in _factors(tuple(labels.shape), shape):
        parts = [d for d in outside if varies(out, d)]
        if labels.ndim == 2 and inside == [1] and len(shape) > 3:
            parts.reverse()  # features become maps (channels, height, width): the channels may shrink
        if len(parts) > 1 and len([d for d in inside if varies(labels, d)]) > 1:
            return give_up(call, "an axis with channels is split in a way that fixes its size")
        for d in parts[:-1]:
            one = out.narrow(d, 0, 1)
            call.book.tie(out, one)
            out = one.expand(shape)
    return out


def _reshaped_parameter(call: Call, weight: Weight) -> Any:
    """Of axes that are merged the first keeps its labels and the others stay whole; of a split axis the last part may shrink."""
    shape = call.shape
    axes = [torch.zeros(n, dtype=torch.long) for n in shape]
    for inside, outside in _factors(weight.shape, shape):
        if not inside or not outside:
            continue
        for d in inside[1:]:
            call.book.freeze(weight.axes[d], "parameter reshaped")
        first = weight.axes[inside[0]]
        merged = first.repeat_interleave(math.prod(weight.shape[d] for d in inside[1:]))
        out = compact(merged.view([shape[d] for d in outside]))
        parts = [i for i in range(out.ndim) if varies(out, i)]
        for i in parts[:-1]:
            call.book.tie(out, out.narrow(i, 0, 1))
            out = out.narrow(i, 0, 1).expand(out.shape)
        for i in parts[-1:]:
            axes[outside[i]] = along(out, i, call.book)
    return Weight(tuple(axes))


def _factors(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pairs of dimension lists with equal products, dimensions of size 1 left out."""
    pairs = []
    i = j = 0
    while i < len(before) and j < len(after):
        inside, outside, a, b = [i], [j], before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(before):
                inside, a, i = [*inside, i], a * before[i], i + 1
            elif b < a and j < len(after):
                outside, b, j = [*outside, j], b * after[j], j + 1
            else:
                break
        pairs.append(([d for d in inside if before[d] > 1], [d for d in outside if after[d] > 1]))
    return pairs


@rule("as_strided")
def restrided(call: Call) -> Any:
    """Other strides of the same tensor."""
    if (
        not isinstance(call.labels[0], Weight)
        and tuple(call.args[0].shape) == call.shape
        and call.args[0].is_contiguous() == call.out.is_contiguous()
    ):
        return call.labels[0]
    return give_up(call, "no rule for the operation as_strided")


@rule("cat", "concat")
def cat(call: Call) -> Any:
    """Along the channels: one after the other. Along another axis: the channels meet."""
    shape = call.shape
    dim = call.argument(1, "dim", 0) % len(shape)
    parts = [p for p, t in zip(call.labels[0], call.args[0], strict=True) if t.numel() or t.ndim > 1]
    parts = [_filled(p, dim, parts, call) if isinstance(p, Fill) else p for p in parts]
    if any(isinstance(p, Weight) for p in parts):
        return give_up(call, "parameters concatenated")
    if any(varies(p, d) for p in parts for d in range(p.ndim) if d != dim) and not any(varies(p, dim) for p in parts):
        for part in parts[1:]:
            call.book.tie(parts[0].narrow(dim, 0, 1), part.narrow(dim, 0, 1))
        return parts[0].narrow(dim, 0, 1).expand(shape)
    for d in range(len(shape)):
        if d != dim and all(not varies(p, d) for p in parts):
            parts = [p.narrow(d, 0, 1) for p in parts]
    return torch.cat(parts, dim).expand(shape)


def _filled(fill: Fill, dim: int, parts: list[Any], call: Call) -> Any:
    """Filled channels beside others are channels; elsewhere they follow the channels of what they stand beside."""
    others = [p for p in parts if isinstance(p, torch.Tensor)]
    if any(varies(p, d) for p in others for d in range(p.ndim) if d != dim):
        return as_tensor(fill, others, call.book)
    return fill.axes[dim].view(*(-1 if d == dim else 1 for d in range(len(fill.axes)))).expand(fill.shape)


@rule("stack")
def stack(call: Call) -> Any:
    """All parts must have the same channels."""
    parts = call.labels[0]
    if any(isinstance(p, Weight) for p in parts):
        return give_up(call, "parameters stacked")
    for part in parts[1:]:
        call.book.tie(parts[0], part)
    return parts[0].unsqueeze(call.argument(1, "dim", 0)).expand(call.shape)


@rule("split", "split_with_sizes", "unbind", "chunk", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
def split(call: Call) -> Any:
    """Equal parts of the channels stay equally long; unequal parts take their channels with them."""
    labels = call.labels[0]
    if isinstance(labels, Weight):
        return _split_parameter(call, labels)
    dim = call.argument(1 if call.name == "unbind" else 2, "dim", 0) % labels.ndim
    equal = len({tuple(o.shape) for o in call.out}) == 1
    if varies(labels, dim) and (call.name == "unbind" or not (equal or call.book.may_cut)):
        return give_up(call, FIXED_SIZE)
    parts = call.func(labels, *call.args[1:], **call.kwargs)
    if varies(labels, dim):
        ends = itertools.accumulate(part.shape[dim] for part in call.out)
        call.place(dim, axis_labels(labels, dim), (0, *ends), silent=not equal)
        if equal:
            call.book.balance([along(part, dim, call.book) for part in parts])
    return parts


def _split_parameter(call: Call, weight: Weight) -> Any:
    """The axis that is split stays whole; the others may shrink."""
    dim = call.argument(1 if call.name == "unbind" else 2, "dim", 0) % len(weight.axes)
    call.book.freeze(weight.axes[dim], "parameter split")
    if call.name == "unbind":
        return give_up(call, "parameter split")
    parts = weight.axes[dim].split([part.shape[dim] for part in call.out])
    return tuple(Weight((*weight.axes[:dim], part, *weight.axes[dim + 1 :])) for part in parts)


@rule("glu")
def gated(call: Call) -> Any:
    """One half of the channels scales the other, position by position."""
    labels, dim = call.labels[0], call.argument(1, "dim", -1)
    if isinstance(labels, Weight):
        return give_up(call, "parameter in glu")
    left, right = labels.chunk(2, dim)
    call.book.tie(left, right)
    return left


@rule("slice", "select", "roll", "narrow", "index_select", "unfold")
def cut(call: Call) -> Any:
    """Along axes without channels anything goes; a slice through the channels takes its channels with it, other cuts fix them."""
    labels = call.labels[0]
    if isinstance(labels, Fill) and call.name in ("slice", "select", "narrow"):
        return _part_of_fill(call, labels)
    if isinstance(labels, Weight):
        return give_up(call, "parameter sliced")
    dims = call.argument(2, "dims", ()) if call.name == "roll" else [call.argument(1, "dim", 0)]
    if tuple(labels.shape) == call.shape and call.name in ("slice", "narrow"):
        return labels
    if any(varies(labels, d % labels.ndim) for d in dims) or not dims:
        if not call.book.may_cut or call.name not in ("slice", "narrow") or call.argument(4, "step", 1) != 1:
            return give_up(call, FIXED_SIZE)
        dim = dims[0] % labels.ndim
        first = slice(call.argument(2, "start"), None).indices(labels.shape[dim])[0]
        call.place(dim, axis_labels(labels, dim), (first, first + call.shape[dim]))
    elif call.name == "roll":
        return labels
    return call.func(labels, *call.args[1:], **call.kwargs)


def _part_of_fill(call: Call, fill: Fill) -> Fill:
    """A window into which something will be written."""
    dim = call.argument(1, "dim", 0) % len(fill.axes)
    if call.name == "select":
        return Fill((*fill.axes[:dim], *fill.axes[dim + 1 :]))
    size, n = len(fill.axes[dim]), call.shape[dim]
    start, step = call.argument(2, "start"), call.argument(4, "step", 1) if call.name == "slice" else 1
    first = slice(start, None).indices(size)[0]
    if n == size:
        return fill
    if step == 1 and call.book.may_cut:
        call.place(dim, fill.axes[dim], (first, first + n))
    else:
        call.book.freeze(fill.axes[dim], FIXED_SIZE)
    return Fill((*fill.axes[:dim], fill.axes[dim][first::step][:n], *fill.axes[dim + 1 :]))


@rule("constant_pad_nd")
def pad(call: Call) -> Any:
    """Spatial padding keeps the labels; padding on the channel axis moves them, and the padded positions go with what they meet."""
    labels, amounts = call.labels[0], call.args[1]
    for i in range(0, len(amounts), 2):
        dim, before, after = labels.ndim - 1 - i // 2, amounts[i], amounts[i + 1]
        sizes = [n + before + after if d == dim else n for d, n in enumerate(labels.shape)]
        if not varies(labels, dim):
            labels = labels.narrow(dim, 0, 1).expand(sizes)
        elif min(before, after) < 0:
            return give_up(call, FIXED_SIZE)
        elif before or after:
            thin = core_view(labels)
            padded = call.book.fresh(1 + before + after)[1:]  # a label of its own even where it is one position
            if not call.book.may_cut:
                call.book.freeze(padded, FIXED_SIZE)
            front, back = (p.view(-1, *[1] * (thin.ndim - 1 - dim)) for p in padded.split([before, after]))
            ends = [p.expand(*thin.shape[:dim], -1, *thin.shape[dim + 1 :]) for p in (front, back)]
            inside = torch.zeros(labels.shape[dim], dtype=torch.long)  # how many of these stay is the pad's input, no number of its own
            call.place(dim - labels.ndim, torch.cat([padded[:before], inside, padded[before:]]), (before, before + len(inside)))
            labels = torch.cat([ends[0], thin, ends[1]], dim).expand(sizes)
    return labels


@rule("im2col")
def unfolded(call: Call) -> Any:
    """Every channel becomes one channel per position of the window."""
    maps, window = call.labels[0], call.args[1]
    if isinstance(maps, Weight):
        return give_up(call, "parameter in unfold")
    return along(maps, maps.ndim - 3, call.book).repeat_interleave(math.prod(window)).view(-1, 1).expand(call.shape)


@rule("mkldnn_rnn_layer")
def recurrent(call: Call) -> Any:
    """What it reads may shrink; its own width stays (four gates share it, and the code makes the first state)."""
    x, weight = call.labels[:2]
    if isinstance(x, Weight) or not isinstance(weight, Weight):
        return give_up(call, "a recurrent layer without input weights")
    meet(along(x, x.ndim - 1, call.book), weight.axes[1], call.book)
    for axes in (weight.axes[:1], *(p.axes if isinstance(p, Weight) else (p,) for p in call.labels[2:7])):
        for labels in axes:
            call.book.freeze(labels, "the width of a recurrent layer stays")
    return give_up(replace(call, labels=()), "the width of a recurrent layer stays")


@rule("channel_shuffle", "native_channel_shuffle")
def shuffle(call: Call) -> Any:
    """The groups that are interleaved stay equal."""
    labels, groups = call.labels[0], call.args[1]
    channels = along(labels, 1, call.book).view(groups, -1)
    call.book.tie(channels, channels[:1])
    return channels.t().reshape(-1).view(-1, *[1] * (len(call.shape) - 2)).expand(call.shape)
