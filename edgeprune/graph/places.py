"""What looking up and writing at places does to channel labels. Rules are registered as in rules.py.

Places along axes without channels are data: which of them, and how many, may depend on values. Channels stay channels where all of
them are read or written alike.
"""

from __future__ import annotations

from typing import Any

import torch

from edgeprune.graph.labels import varies
from edgeprune.graph.moves import FIXED_SIZE
from edgeprune.graph.rules import Call, Fill, Weight, along, axis_labels, give_up, rule


@rule("index", "gather", "sort", "topk", "argsort", "cummax", "cummin", "kthvalue", "take_along_dim")
def look_up(call: Call) -> Any:
    """Positions of axes without channels are picked or reordered."""
    labels, shape = call.labels[0], call.shape
    if call.name == "index":
        return _indexed(call, labels)
    position = 2 if call.name in ("topk", "kthvalue", "take_along_dim") else 1
    dim = call.argument(position, "dim", -1)
    if isinstance(labels, Weight) or isinstance(dim, bool) or not labels.ndim or varies(labels, dim % labels.ndim):
        return give_up(call, f"{call.name} over the channels")
    if call.name in ("gather", "take_along_dim") and any(varies(labels, d) and shape[d] != labels.shape[d] for d in range(labels.ndim)):
        return give_up(call, FIXED_SIZE)
    found = labels.narrow(dim, 0, 1)
    found = (found if len(shape) == labels.ndim else found.squeeze(dim)).expand(shape)
    return tuple(found for _ in call.out) if isinstance(call.out, tuple) else found


def _indexed(call: Call, labels: Any) -> Any:
    indices = call.args[1]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return give_up(call, FIXED_SIZE)
    if isinstance(labels, Weight):
        for d in range(len(indices)):
            if indices[d] is not None:
                call.book.freeze(labels.axes[d], "a table that is looked up")
        if indices[0] is None or any(i is not None for i in indices[1:]) or len(labels.axes) != 2:
            return give_up(call, "a table that is looked up")
        return labels.axes[1].expand(call.shape)
    if looked_up := [d for d, i in enumerate(indices) if i is not None and varies(labels, d)]:
        found = _all_in_order(call, labels, looked_up)
        return give_up(call, FIXED_SIZE) if found is None else found
    ranks = max(i.ndim for i in indices if i is not None)
    for d, i in enumerate(indices):
        labels = labels if i is None else labels.narrow(d, 0, 1)
    first = [None if i is None else torch.zeros([1] * ranks, dtype=torch.long) for i in indices]
    return call.func(labels, first).expand(call.shape)


def _all_in_order(call: Call, labels: torch.Tensor, looked_up: list[int]) -> torch.Tensor | None:
    """All channels looked up one after the other, as code does that picks places of every map; None for anything else."""
    indices = call.args[1]
    axes = [d for d, i in enumerate(indices) if i is not None]
    d, n = looked_up[0], labels.shape[looked_up[0]]
    which = indices[d]
    if axes != list(range(axes[0], axes[-1] + 1)) or sum(varies(labels, e) for e in range(labels.ndim)) > 1:
        return None
    if n not in which.shape or not torch.equal(which.reshape(-1), torch.arange(n, dtype=which.dtype)):
        return None
    dim = axes[0] + max(indices[e].ndim for e in axes) - which.ndim + list(which.shape).index(n)
    return axis_labels(labels, d).view(*(-1 if e == dim else 1 for e in range(len(call.shape)))).expand(call.shape)


@rule("index_put", "index_copy", "index_add", "scatter", "scatter_add", "scatter_reduce")
def written_by_index(call: Call) -> Any:
    """Values put into places along some axes; along the others they have the channels of what they are put into."""
    into, places, values = call.labels[0], call.args[1], call.labels[2 if call.name == "index_put" else 3]
    shape = tuple(call.args[0].shape)
    if call.name == "index_put":
        axes = [d for d, i in enumerate(places) if i is not None]
        if axes != list(range(len(axes))) or any(i.dtype == torch.bool for i in places if i is not None):
            return give_up(call, "written at places that depend on data")
    else:
        axes = [places % len(shape)]
    others = [d for d in range(len(shape)) if d not in axes]
    if not isinstance(values, torch.Tensor) or not isinstance(into, (torch.Tensor, Fill)):
        return give_up(call, "written piece by piece")
    if not values.numel():  # no places were found: nothing is written
        return into
    shift = values.ndim - len(shape)  # the last axes are those of what is written into
    found = [d for d in others if 0 <= d + shift < values.ndim and varies(values, d + shift)]
    own = [d for d in others if isinstance(into, torch.Tensor) and varies(into, d)]
    if len({*found, *own}) != 1 or any(varies(values, d) for d in range(values.ndim) if d - shift not in found):
        return give_up(call, "written piece by piece")
    dim = (found or own)[0]
    channels = axis_labels(into, dim)
    if found and values.shape[dim + shift] != shape[dim]:
        return give_up(call, FIXED_SIZE)
    if call.name.startswith("scatter") and isinstance(call.labels[2], torch.Tensor) and varies(call.labels[2], dim):
        call.book.tie(channels, along(call.labels[2], dim, call.book))
    if found:
        call.book.tie(channels, along(values, dim + shift, call.book))
    elif values.ndim and values.numel() > 1:
        call.book.tie(channels, values.reshape(-1)[0])
    return channels.view(*(-1 if d == dim else 1 for d in range(len(shape)))).expand(shape)


@rule("embedding")
def embedding(call: Call) -> Any:
    """Rows are looked up; the columns are channels."""
    table = call.labels[0]
    if not isinstance(table, Weight):
        return give_up(call, "a table that is looked up")
    call.book.freeze(table.axes[0], "a table that is looked up")
    return table.axes[1].expand(call.shape)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def sampled(call: Call) -> Any:
    """All channels are looked at in the same places."""
    maps, grid = call.labels[:2]
    if isinstance(maps, Weight) or isinstance(grid, Weight):
        return give_up(call, "parameter in grid_sample")
    call.book.freeze(grid, "places to look at")
    return along(maps, 1, call.book).view(-1, *[1] * (len(call.shape) - 2)).expand(call.shape)


@rule("roi_align", "roi_pool")
def regions(call: Call) -> Any:
    """All channels of every region."""
    maps, boxes = call.labels[:2]
    if isinstance(maps, Weight) or isinstance(boxes, Weight):
        return give_up(call, "parameter in roi_align")
    call.book.freeze(boxes, "places to look at")
    found = along(maps, 1, call.book).view(-1, 1, 1).expand(call.shape)
    return (found, found) if isinstance(call.out, tuple) else found
