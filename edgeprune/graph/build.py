"""From labels to groups: what one traced run left behind becomes the ChannelGraph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.graph.channels import (
    Activation,
    ChannelGraph,
    ChannelGroup,
    ExportedSizes,
    Member,
    Mixing,
    Op,
    Read,
    SizedAxis,
    Tap,
    WrittenAxis,
    WrittenSizes,
)
from edgeprune.graph.labels import Labels, Place


class Trace(Protocol):
    """What the tracer recorded: axes and producers of parameters, sizes and labels of every tensor, the operations."""

    book: Labels
    tensors: dict[str, Tensor]
    trainable: frozenset[str]
    axes: dict[tuple[str, int], Tensor]
    producers: dict[tuple[str, int], None]
    sizes: list[tuple[tuple[int, ...], Tensor, int | Tensor]]
    varying: list[tuple[int, Tensor] | None]
    ops: list[Op]
    inputs: list[int]
    outputs: list[int]
    exported: tuple[Any, list[tuple[str, int, Tensor]]] | None


@dataclass(frozen=True)
class _Rows:
    """Every labelled position of every parameter axis: axis number, position, class; sorted by class."""

    axis: NDArray[np.int64]
    position: NDArray[np.int64]
    channel: NDArray[np.int64]


def build(tracer: Trace) -> ChannelGraph:
    """Classes of labels → groups; label counts of every tensor → sizes as linear functions of the groups' widths.

    The nodes of `written` are still the dispatched operations (Place.key).
    """
    classes, reasons = tracer.book.resolve()
    keys = list(tracer.axes)
    order = {key: i for i, key in enumerate(keys)}
    producers = np.array([order[key] for key in tracer.producers if key in order], dtype=np.int64)
    roots = [classes[tracer.axes[key].numpy()] for key in keys]
    blocked = np.zeros(int(classes.max()) + 1, dtype=bool)
    blocked[list(reasons)] = True
    rows = _rows(roots, blocked)
    groups = _groups(rows, keys, producers)
    group_of = np.full(len(blocked), -1, dtype=np.int64)
    channel_of = np.zeros(len(blocked), dtype=np.int64)
    for number, (group, members) in enumerate(groups):
        group_of[members] = number
        channel_of[members] = np.arange(group.channels)
    frozen = {}
    for key in tracer.producers:
        stays = [int(c) for c in np.unique(roots[order[key]])] if key in order else []
        why = next((reasons[c] for c in stays if c in reasons), None)
        if why or any(group_of[c] < 0 for c in stays):
            frozen[f"{key[0]}[{key[1]}]"] = why or "its channels are tied to one another: all would have to go at once"
    wide = np.array([group.channels for group, _ in groups], dtype=np.int64)
    offsets = np.cumsum([0, *wide])
    number = np.where(group_of < 0, -1, offsets[group_of] + channel_of)[classes]  # of every label, over all groups
    activations = _activations(tracer.sizes, number, offsets)
    return ChannelGraph(
        groups=tuple(g for g, _ in groups),
        frozen=frozen,
        ops=tuple(tracer.ops),
        activations=activations,
        shapes={n: tuple(t.shape) for n, t in tracer.tensors.items()},
        trainable=tracer.trainable,
        taps=_taps(tracer, classes, group_of, channel_of, groups),
        input_activations=tuple(tracer.inputs),
        output_activations=tuple(tracer.outputs),
        mixing=tuple(_mixing(tracer.book, classes, group_of, channel_of)),
        written=_written_sizes(tracer.book.places, number),
        exported=_exported_sizes(tracer, number),
    )


def _mixing(book: Labels, classes: NDArray[np.int64], group_of: NDArray[np.int64], channel_of: NDArray[np.int64]) -> Iterator[Mixing]:
    for op, ordinal, reads, output_axes in book.mixed:
        members = [(argument, axis, classes[labels.numpy()]) for argument, axis, labels in reads]
        if any((group_of[m] >= 0).any() for _, _, m in members):
            yield Mixing(op, ordinal, tuple(Read(a, d, group_of[m], channel_of[m]) for a, d, m in members), output_axes)


def _written_sizes(places: list[Place], number: NDArray[np.int64]) -> WrittenSizes | None:
    axes = [WrittenAxis(p.key, p.axis, number[p.labels.numpy()], p.bounds, p.silent) for p in places]
    can_go = tuple(axis for axis in axes if (axis.channels >= 0).any())
    return WrittenSizes(None, (), can_go) if can_go else None


def _exported_sizes(tracer: Trace, number: NDArray[np.int64]) -> ExportedSizes | None:
    if tracer.exported is None:
        return None
    inputs, axes = tracer.exported
    return ExportedSizes(inputs, tuple(SizedAxis(node, axis, number[labels.numpy()]) for node, axis, labels in axes))


def _rows(roots: list[NDArray[np.int64]], blocked: NDArray[np.bool_]) -> _Rows:
    axis = np.repeat(np.arange(len(roots)), [len(r) for r in roots]) if roots else np.zeros(0, dtype=np.int64)
    position = np.concatenate([np.arange(len(r)) for r in roots]) if roots else np.zeros(0, dtype=np.int64)
    channel = np.concatenate(roots) if roots else np.zeros(0, dtype=np.int64)
    free = ~blocked[channel]
    axis, position, channel = axis[free], position[free], channel[free]
    by_class = np.lexsort((position, axis, channel))
    return _Rows(axis[by_class], position[by_class], channel[by_class])


def _groups(rows: _Rows, keys: list[tuple[str, int]], producers: NDArray[np.int64]) -> list[tuple[ChannelGroup, NDArray[np.int64]]]:
    """Classes that touch the same axes equally often form a group; returns each with its classes in channel order.

    A class on its own is no group, because one channel must stay.
    """
    if not len(rows.channel):
        return []
    starts = np.flatnonzero(np.r_[True, rows.channel[1:] != rows.channel[:-1]])
    lengths = np.diff(np.r_[starts, len(rows.channel)])
    salt = np.random.default_rng(0).integers(1, 2**62, size=len(keys), dtype=np.uint64)
    signature = np.add.reduceat(salt[rows.axis], starts)
    produced = np.maximum.reduceat(np.isin(rows.axis, producers), starts)
    groups: list[tuple[ChannelGroup, NDArray[np.int64]]] = []
    taken: dict[str, int] = {}
    rank = np.full(len(keys), len(keys) + 1)
    rank[producers] = np.arange(len(producers))
    alike = np.argsort(signature, kind="stable")
    ends = np.r_[np.flatnonzero(np.diff(signature[alike])) + 1, len(alike)]
    classes_of = {int(signature[mine[0]]): mine for mine in np.split(alike, ends[:-1])}
    for value in dict.fromkeys(signature[produced].tolist()):
        mine = classes_of[value]
        n, k = len(mine), int(lengths[mine[0]])
        if n == 1:
            continue
        table = starts[mine][:, None] + np.arange(k)
        axes = rows.axis[table[0]]
        positions = rows.position[table]
        columns: dict[int, NDArray[np.int64]] = {int(a): positions[:, axes == a] for a in dict.fromkeys(axes.tolist())}
        ordered = sorted(columns, key=lambda a: (rank[a], a))
        by_channel = np.argsort(columns[ordered[0]][:, 0], kind="stable")
        members = tuple(Member(*keys[a], columns[a][by_channel]) for a in ordered)
        producing = int((rank[ordered] < len(keys)).sum())
        name = members[0].parameter.rpartition(".")[0] or members[0].parameter
        taken[name] = taken.get(name, 0) + 1
        name = name if taken[name] == 1 else f"{name}#{taken[name]}"
        groups.append((ChannelGroup(name, n, members, producing), rows.channel[starts[mine]][by_channel]))
    rank_of = dict(zip(keys, rank.tolist(), strict=True))
    return sorted(groups, key=lambda g: rank_of[g[0].members[0][:2]])


def _activations(
    sizes: list[tuple[tuple[int, ...], Tensor, int | Tensor]], number: NDArray[np.int64], offsets: NDArray[np.int64]
) -> tuple[Activation, ...]:
    """Most tensors share the labels of another one (a norm and its input, say): those are counted once.

    `sizes`: shape, labels, and how often each of them stands: one number for all, or one for each. `number` of every label: its
    channel over all groups, or -1; `offsets`: the first channel of each group.
    """
    counts: dict[tuple[int, int, tuple[int, ...]], tuple[int, list[tuple[int, float]], bool]] = {}
    activations = []
    for shape, flat, repeat in sizes:
        key = (flat.data_ptr(), len(flat), flat.stride())
        if key not in counts:
            counts[key] = _counted(number[flat.numpy()], None if isinstance(repeat, int) else repeat.numpy(), offsets)
        (fixed, per_channel, even), times = counts[key], float(repeat) if isinstance(repeat, int) else 1.0
        activations.append(Activation(shape, fixed * times, tuple((g, n * times) for g, n in per_channel), even))
    return tuple(activations)


def _counted(
    channels: NDArray[np.int64], weights: NDArray[np.int64] | None, offsets: NDArray[np.int64]
) -> tuple[int, list[tuple[int, float]], bool]:
    """Elements that stay, elements per channel of each group, and whether these are the same for all its channels."""
    count = np.bincount(channels + 1, weights=weights, minlength=1).astype(np.int64)
    fixed, count = int(count[0]), np.pad(count[1:], (0, max(0, int(offsets[-1]) - len(count) + 1)))
    starts, widths = offsets[:-1], np.diff(offsets)
    if not len(starts):
        return fixed, [], True
    total = np.add.reduceat(count, starts)
    found = np.flatnonzero(total)
    even = np.array_equal(np.maximum.reduceat(count, starts)[found] * widths[found], total[found])
    return fixed, [(int(g), total[g] / int(widths[g])) for g in found], even


def _taps(
    tracer: Trace,
    classes: NDArray[np.int64],
    group_of: NDArray[np.int64],
    channel_of: NDArray[np.int64],
    groups: list[tuple[ChannelGroup, NDArray[np.int64]]],
) -> dict[str, tuple[Tap, ...]]:
    """Where a group's channels can be looked at: every tensor that a conv, linear or pooling reads and that holds all of them."""
    made_by = {op.output: op.call for op in tracer.ops}
    found: dict[str, dict[int, Tap]] = {g.name: {} for g, _ in groups}
    for op in tracer.ops:
        if op.kind not in ("conv", "linear", "pool") or not op.inputs:
            continue
        number = op.inputs[0]
        varying = tracer.varying[number]
        if varying is None or number not in made_by:
            continue
        dim, labels = varying
        members = classes[labels.numpy()]
        for g in np.unique(group_of[members]).tolist():
            if g < 0 or number in found[groups[g][0].name]:
                continue
            group = groups[g][0]
            where = np.flatnonzero(group_of[members] == g)
            order = where[np.argsort(channel_of[members[where]], kind="stable")]
            if len(order) % group.channels == 0:
                found[group.name][number] = Tap(made_by[number], dim, order.reshape(group.channels, -1))
    shapes = tracer.sizes

    def spread(number: int) -> int:
        return int(np.prod(shapes[number][0])) // max(1, shapes[number][0][tracer.varying[number][0]])  # type: ignore[index]

    taps = {}
    for name, by_number in found.items():
        most = max((spread(n) for n in by_number), default=0)
        taps[name] = tuple(t for n, t in by_number.items() if spread(n) > 1 or most <= 1)
    return taps
