"""What data movement does to channel labels: the same operation runs on the labels. Rules are registered as in rules.py.

Sizes are checked later: whether a cut or a split was computed from the tensor or written as a number, a rehearsal shows.
"""

from __future__ import annotations

from typing import Any

import torch

from edgeprune.graph.labels import compact, core, varies
from edgeprune.graph.rules import Call, Weight, along, core_view, give_up, rule

FIXED_SIZE = "the network's code cuts or pads its channels at fixed positions"


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
def same(call: Call) -> Any:
    """The same labels."""
    return call.labels[0]


@rule(*"zeros ones full new_zeros new_ones new_full".split())
def fill(call: Call) -> Any:
    """The same value everywhere: any position can go, so each axis may follow what it meets."""
    return Weight(tuple(call.book.fresh(n) for n in call.shape))


@rule(*"new_empty new_empty_strided empty eye arange linspace rand randn scalar_tensor".split())
def constant(call: Call) -> Any:
    """Sizes given as numbers; a tensor it was called on is not read."""
    return call.book.frozen(call.shape, "constant made in the forward pass")


@rule("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "flip", "repeat", "pixel_shuffle", "pixel_unshuffle")
def move(call: Call) -> Any:
    """Positions move as the data does."""
    labels = call.labels[0]
    if isinstance(labels, Weight):
        if call.name not in ("t", "transpose", "permute"):
            return give_up(call, "parameter reshaped")
        order = call.func(torch.empty(*range(2, 2 + len(labels.axes)), device="meta"), *call.args[1:]).shape
        return Weight(tuple(labels.axes[n - 2] for n in order))
    return call.func(labels, *call.args[1:], **call.kwargs)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def reshape(call: Call) -> Any:
    """Merging axes keeps labels; where one labelled axis is split in two, the parts must stay equal, so they are tied."""
    labels = call.labels[0]
    if isinstance(labels, Weight):
        return give_up(call, "parameter reshaped")
    shape = call.shape
    if not any(varies(labels, d) for d in range(labels.ndim)):
        return (labels[(0,) * labels.ndim] if labels.numel() else torch.zeros((), dtype=torch.long)).expand(shape)
    out = compact(labels.reshape(shape))
    for inside, outside in _factors(tuple(labels.shape), shape):
        if not any(varies(labels, d) for d in inside):
            continue
        if len(outside) == 2 and len(inside) == 1:
            first = out.narrow(outside[0], 0, 1)
            call.book.tie(out, first)
            out = first.expand(shape)
        elif len(outside) > 1:
            return give_up(call, "an axis with channels is split in a way that fixes its size")
    return out


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


@rule("cat", "concat")
def cat(call: Call) -> Any:
    """Along the channels: one after the other. Along another axis: the channels meet."""
    shape = call.shape
    dim = call.argument(1, "dim", 0) % len(shape)
    parts = [p for p, t in zip(call.labels[0], call.args[0], strict=True) if t.numel() or t.ndim > 1]
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


@rule("stack")
def stack(call: Call) -> Any:
    """All parts must have the same channels."""
    parts = call.labels[0]
    if any(isinstance(p, Weight) for p in parts):
        return give_up(call, "parameters stacked")
    for part in parts[1:]:
        call.book.tie(parts[0], part)
    return parts[0].unsqueeze(call.argument(1, "dim", 0)).expand(call.shape)


@rule("split", "split_with_sizes", "unbind", "chunk")
def split(call: Call) -> Any:
    """Equal parts of the channels stay equal (tied position by position); unequal parts take their channels with them."""
    labels = call.labels[0]
    if isinstance(labels, Weight):
        return give_up(call, "parameter split")
    dim = call.argument(1 if call.name == "unbind" else 2, "dim", 0) % labels.ndim
    equal = len({tuple(o.shape) for o in call.out}) == 1
    if varies(labels, dim) and (call.name == "unbind" or not (equal or call.book.may_cut)):
        return give_up(call, FIXED_SIZE)
    parts = call.func(labels, *call.args[1:], **call.kwargs)
    if varies(labels, dim) and equal:
        for part in parts[1:]:
            call.book.tie(parts[0], part)
    elif varies(labels, dim):
        call.book.cuts.append(core(labels)[0])
    return parts


@rule("slice", "select", "roll", "narrow", "index_select", "unfold")
def cut(call: Call) -> Any:
    """Along axes without channels anything goes; a slice through the channels takes its channels with it, other cuts fix them."""
    labels = call.labels[0]
    if isinstance(labels, Weight):
        return give_up(call, "parameter sliced")
    dims = call.argument(2, "dims", ()) if call.name == "roll" else [call.argument(1, "dim", 0)]
    if tuple(labels.shape) == call.shape and call.name in ("slice", "narrow"):
        return labels
    if any(varies(labels, d % labels.ndim) for d in dims) or not dims:
        if not call.book.may_cut or call.name not in ("slice", "narrow") or call.argument(4, "step", 1) != 1:
            return give_up(call, FIXED_SIZE)
        call.book.cuts.append(core(labels)[0])
    return call.func(labels, *call.args[1:], **call.kwargs)


@rule("constant_pad_nd")
def pad(call: Call) -> Any:
    """Spatial padding keeps the labels; padding on the channel axis moves them, and the padded positions stay."""
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
            fixed = [call.book.frozen((*thin.shape[:dim], n, *thin.shape[dim + 1 :]), FIXED_SIZE) for n in (before, after)]
            labels = torch.cat([fixed[0], thin, fixed[1]], dim).expand(sizes)
    return labels


@rule("channel_shuffle", "native_channel_shuffle")
def shuffle(call: Call) -> Any:
    """The groups that are interleaved stay equal."""
    labels, groups = call.labels[0], call.args[1]
    channels = along(labels, 1, call.book).view(groups, -1)
    call.book.tie(channels, channels[:1])
    return channels.t().reshape(-1).view(-1, *[1] * (len(call.shape) - 2)).expand(call.shape)
