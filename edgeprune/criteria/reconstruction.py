"""What the layers behind a channel cannot get back: the share of their output that is lost when it goes and the rest is refitted.

Formula: s_c = sum over the convs and linears that read channel c of tr(W_c [(H^-1)_cc]^-1 W_c^T) / tr(W H W^T), H the second moments
of all columns of the layer's input (channel x kernel tap; about the mean where the layer has a bias or a batch norm behind it), W_c
and (H^-1)_cc the columns that belong to c. This is the least squared error that any new weights for the remaining columns leave.
`order="greedy"` removes the channels of a group one by one, least loss first, and scores each by the loss at its removal (never below
that of one removed before); `order="single"` scores each as if it were the only one to go.
Cost: one forward pass, and per layer columns² * images * `positions` + columns³; no labels, no gradients.
Source: ours, in the family of Hassibi, Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992; the
error of a layer's output as the measure after Luo, Wu, Lin, "ThiNet", ICCV 2017, and Frantar, Alistarh, "Optimal Brain Compression",
NeurIPS 2022. It is exactly what recovery by reconstruction (train/reconstruct.py) minimises.

Rules. Columns are standardised first, so `ridge` is the same for all and a rescaling that the network does not notice changes nothing.
A layer with more than 2,304 columns, and the largest ones first while all matrices take more than 2 GiB, is measured tap by tap: each
kernel tap refitted from the same tap of the other channels, which needs moments between channels only. A depthwise conv is no reader:
its channels are the group's own, and their readers count. Layers that read through a product of two computed tensors (attention), and
those too large even tap by tap, are left out; a group without any reader left scores its share of the squared weights that produce it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune.criteria.probe import Floats, Probe, Statistic
from edgeprune.errors import DataError, UsageError
from edgeprune.graph import ChannelGraph, ChannelGroup, Member, Op
from edgeprune.plan import Scores
from edgeprune.train.moments import Moments, conv_patches, sampled_places

NEEDS = ("maps",)
PAPER = "ours; Optimal Brain Surgeon (Hassibi, Stork, NIPS 1992) on the outputs of the layers that read a channel"
COLUMNS = 2304
MEMORY_BYTES = 2 << 30
ROWS = 8192
CONSTANT = 1e-5  # a column whose variance is below this share of its mean square is rounding noise


def score(graph: ChannelGraph, probe: Probe, **options: Any) -> Scores:
    """Share of the readers' output energy lost, float64, higher = keep. Shapes: (channels,) per group."""
    return probe.gather(statistic(graph, probe, **options))[0]


def statistic(graph: ChannelGraph, probe: Probe, *, order: str = "greedy", ridge: float = 1e-3, positions: int = 16) -> Statistic:
    """The running second moments. `positions`: how many places of a map are looked at in each image. Raises UsageError."""
    if order not in ("greedy", "single"):
        raise UsageError(f"order must be greedy or single, got {order!r}.")
    if not ridge > 0 or positions < 1:
        raise UsageError(f"ridge must be above 0 and positions at least 1, got {ridge!r} and {positions!r}.")
    return _Losses(graph, probe, greedy=order == "greedy", ridge=ridge, positions=positions)


class _Losses(Statistic):
    maps = False

    def __init__(self, graph: ChannelGraph, probe: Probe, *, greedy: bool, ridge: float, positions: int) -> None:
        self._graph, self._probe, self._greedy, self._ridge = graph, probe, greedy, ridge
        readers, self._left_out = _affordable(_readers(graph))
        self._read = {r.weight: _Reading(r, positions) for r in readers}
        self.operations = {op.call: partial(reading.add, op) for reading in self._read.values() for op in reading.reader.ops}

    def scores(self, images: int) -> Scores:
        """Losses of every group; `facts` names the readers measured tap by tap or not at all, and the groups without any."""
        tapwise = [r.reader.weight for r in self._read.values() if r.reader.tapwise]
        solved = {}
        for name in list(self._read):  # moments go as inverses come: both at once would be twice the memory
            if (reading := self._read.pop(name)).seen:
                solved[name] = reading.solved(self._ridge)
        values, unread = {}, []
        for group in self._graph.groups:
            blocks = [_Block.cut(solved[m.parameter], m) for m in _reading_members(group) if m.parameter in solved]
            if blocks:
                values[group.name] = losses(blocks, greedy=self._greedy)
            else:
                unread.append(group.name)
                squares = [part.double().square().sum(dim=1).cpu().numpy() for part in self._probe.slices(group)]
                values[group.name] = self._probe.reduced([s / max(float(s.sum()), 1e-300) for s in squares])
        return Scores("reconstruction", values, {"images": images, "tap_by_tap": tapwise, "left_out": self._left_out, "unread": unread})


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that reads groups' channels. Its input has `channels` columns per conv group, times `taps` unless `tapwise`."""

    weight: str
    ops: tuple[Op, ...]
    groups: int
    channels: int
    taps: int
    flipped: bool  # a transposed conv: the taps belong to the output
    tapwise: bool = False
    centred: bool = False

    @property
    def columns(self) -> int:
        return self.channels * (1 if self.tapwise or self.flipped else self.taps)

    @property
    def memory_bytes(self) -> int:
        return 8 * self.groups * self.columns**2

    def table(self, member: Member) -> Tensor:
        """The columns of each of a group's channels, (channels, columns per channel)."""
        positions = torch.from_numpy(member.indices)
        if self.ops[0].kind == "linear":
            return positions[:, :: self.taps] // self.taps if self.tapwise else positions
        if self.tapwise or self.flipped:
            return positions
        return (positions[:, :, None] * self.taps + torch.arange(self.taps)).flatten(1)


def _reading_members(group: ChannelGroup) -> tuple[Member, ...]:
    return group.members[group.producing :]


def _readers(graph: ChannelGraph) -> list[_Reader]:
    by_weight: dict[str, list[Op]] = {}
    for op in graph.ops:
        if op.kind in ("conv", "linear") and op.weight and op.name not in ("bmm", "baddbmm"):
            by_weight.setdefault(op.weight, []).append(op)
    normed = {op.inputs[0] for op in graph.ops if op.kind == "norm" and op.inputs and _tracks(op, graph)}
    members: dict[str, list[Member]] = {}
    for group in graph.groups:
        for member in _reading_members(group):
            members.setdefault(member.parameter, []).append(member)
    found = []
    for weight, ops in by_weight.items():
        shape, flipped = graph.shapes[weight], any(m.axis == 0 for m in members.get(weight, ())) and ops[0].kind == "conv"
        depthwise = ops[0].groups > 1 and (shape[1] == 1 or flipped)
        if weight not in members or depthwise:
            continue
        linear = ops[0].kind == "linear"
        taps = _flattened(members[weight]) if linear else int(np.prod(shape[2:]))
        channels = shape[members[weight][0].axis] // (taps if linear else 1)
        centred = all(op.output in normed for op in ops)
        found.append(_Reader(weight, tuple(ops), ops[0].groups, channels, taps, flipped, centred=centred))
    return found


def _tracks(op: Op, graph: ChannelGraph) -> bool:
    return bool(op.weight) and f"{(op.weight or '').removesuffix('weight')}running_mean" in graph.shapes


def _flattened(members: Sequence[Member]) -> int:
    """How many neighbouring columns of a linear belong to one channel, if it is the same number for all."""
    taps = members[0].indices.shape[1]
    whole = all(m.indices.shape[1] == taps and (m.indices == m.indices[:, :1] // taps * taps + np.arange(taps)).all() for m in members)
    return taps if whole else 1


def _affordable(readers: list[_Reader]) -> tuple[list[_Reader], list[str]]:
    """The readers in the form that fits into memory, and the names of those that fit in none."""
    chosen = {r.weight: _tap_by_tap(r) if r.columns > COLUMNS else r for r in readers}
    left_out = []
    for largest in sorted(chosen.values(), key=lambda r: -r.memory_bytes):
        if sum(r.memory_bytes for r in chosen.values()) <= MEMORY_BYTES:
            break
        chosen[largest.weight] = _tap_by_tap(largest)
    for largest in sorted(chosen.values(), key=lambda r: -r.memory_bytes):
        if sum(r.memory_bytes for r in chosen.values()) <= MEMORY_BYTES:
            break
        left_out.append(largest.weight)
        del chosen[largest.weight]
    return list(chosen.values()), left_out


def _tap_by_tap(reader: _Reader) -> _Reader:
    return (
        reader
        if reader.taps == 1 or reader.flipped
        else _Reader(reader.weight, reader.ops, reader.groups, reader.channels, reader.taps, reader.flipped, True, reader.centred)
    )


class _Reading:
    """The moments of one reader's input, and the weights it ran with."""

    def __init__(self, reader: _Reader, positions: int) -> None:
        self.reader = reader
        self.seen = False
        self._positions = positions
        self._moments = Moments(reader.groups, reader.columns)
        self._weight = torch.zeros(0)
        self._centred = reader.centred

    def add(self, op: Op, args: tuple[Any, ...], out: Any) -> None:
        """One batch of one call."""
        reader = self.reader
        self.seen = True
        if op.kind == "linear":
            x, weight = args[-2].reshape(-1, args[-2].shape[-1]), args[-1].T
            self._centred |= op.name == "addmm"
            x = x[:: -(-len(x) // ROWS)]
            self._moments.add(x.reshape(len(x), -1, reader.taps).transpose(1, 2).flatten(0, 1)[:, None] if reader.tapwise else x[:, None])
            self._weight = (
                weight[None] if not reader.tapwise else weight.reshape(len(weight), -1, reader.taps).movedim(2, 1).flatten(0, 1)[None]
            )
            return
        x, weight = args[:2]
        self._centred |= args[2] is not None
        whole = not (reader.tapwise or reader.flipped)
        spatial = out.shape[2:] if whole else x.shape[2:]
        places = sampled_places(spatial, self._positions, op.call)
        if whole:
            rows = conv_patches(x, weight, args[3:6], spatial, places)
            self._weight = weight.reshape(reader.groups, -1, reader.columns)
        else:
            rows = x.flatten(2)[:, :, places.to(x.device)].transpose(1, 2)
            taps_last = weight.flatten(2).transpose(0, 1) if reader.flipped else weight.flatten(2)
            self._weight = taps_last.reshape(reader.groups, -1, reader.channels, reader.taps).transpose(2, 3).flatten(1, 2)
        self._moments.add(rows.reshape(rows.shape[0] * rows.shape[1], reader.groups, reader.columns))

    def solved(self, ridge: float) -> _Solved:
        """The inverse of the standardised second moments, and the weights of standardised columns."""
        second = self._moments.covariance(centred=self._centred)
        if not bool(torch.isfinite(second).all()):
            raise DataError(f"what {self.reader.weight} reads holds NaN or Inf: check the preprocessing (mean, std) and the weights.")
        variance = second.diagonal(dim1=1, dim2=2)
        floor = CONSTANT * self._moments.covariance(centred=False).diagonal(dim1=1, dim2=2)
        spread = torch.where(variance > floor, variance, torch.zeros_like(variance)).sqrt()
        inverse_spread = torch.where(spread > 0, 1 / spread, torch.zeros_like(spread))
        second *= inverse_spread[:, :, None] * inverse_spread[:, None, :]
        second.diagonal(dim1=1, dim2=2).add_(ridge)
        weight = self._weight.double().cpu() * spread[:, None]
        energy = float(torch.einsum("goc,gcd,god->", weight, second, weight))
        if weight.shape[1] > weight.shape[2]:  # the same products of columns with fewer rows
            weight = torch.linalg.qr(weight, mode="r").R
        return _Solved(self.reader, torch.cholesky_inverse(torch.linalg.cholesky(second)), weight, energy)


@dataclass(frozen=True, eq=False)
class _Solved:
    reader: _Reader
    inverse: Tensor  # (groups, columns, columns)
    weight: Tensor  # (groups, rows, columns)
    energy: float


class _Block:
    """One reader as one group sees it: inverse moments and weights of the group's columns, `table` (channels, columns of each)."""

    def __init__(self, inverse: Tensor, weight: Tensor, table: Tensor, energy: float) -> None:
        self._inverse, self._weight, self._table, self._energy = inverse, weight, table, energy

    @staticmethod
    def cut(solved: _Solved, member: Member) -> _Block:
        table = solved.reader.table(member)
        columns = table.flatten()
        inverse = solved.inverse[:, columns[:, None], columns]
        return _Block(inverse, solved.weight[:, :, columns], torch.arange(len(columns)).reshape(table.shape), solved.energy)

    def losses(self, channels: Tensor) -> Tensor:
        """The share of the output energy that each of these channels takes with it, (channels,)."""
        at = self._table[channels]
        inverse = self._inverse[:, at[:, :, None], at[:, None, :]]
        weight = self._weight[:, :, at].permute(0, 2, 3, 1)
        whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(inverse), weight, upper=False)
        return whitened.square().sum(dim=(0, 2, 3)) / self._energy if self._energy > 0 else torch.zeros(len(channels), dtype=torch.float64)

    def remove(self, channel: int) -> None:
        """The remaining weights become those that make up for the channel best; the inverse loses its columns."""
        at = self._table[channel]
        rows = self._inverse[:, at]
        gain = torch.linalg.solve(rows[:, :, at], rows)
        self._weight = self._weight - self._weight[:, :, at] @ gain
        self._inverse = self._inverse - rows.transpose(1, 2) @ gain


def losses(blocks: Sequence[_Block], *, greedy: bool) -> Floats:
    """The loss of every channel of a group, summed over its readers, (channels,)."""
    left = torch.arange(len(blocks[0]._table))
    values = np.zeros(len(left))
    last = 0.0
    while len(left):
        found = torch.stack([block.losses(left) for block in blocks]).sum(dim=0)
        if not greedy:
            return found.numpy()
        least = int(found.argmin())
        channel = int(left[least])
        last = max(float(found[least]), last * (1 + 1e-9))
        values[channel] = last
        for block in blocks:
            block.remove(channel)
        left = left[left != channel]
    return values
