"""What the network's outputs lose when a channel goes and the layers that read it are refitted to the rest.

Formula: s_c = sum over the convs and linears that read channel c of tr(R W_c [(H^-1)_cc]^-1 W_c^T), H the second moments of all columns
of the layer's input (channel x kernel tap; about the mean where the layer has a bias or a batch norm behind it), W_c and (H^-1)_cc the
columns that belong to c. Without R this is the least squared error that any new weights for the remaining columns leave. R is the
diagonal of how much the network's outputs react to the layer's (reaction.py): with it every layer is measured in one unit, the mean
squared change of the outputs, and scores of different layers may be compared and added. `measure="layer"` leaves R out and divides by
tr(W H W^T) instead: the share of the layer's own output that is lost.
`order="greedy"` removes the channels of a group one by one, least loss first, and scores each by the loss at its removal (never below
that of one removed before; in at most 128 steps, so several at a time in wider groups); `order="single"` scores each as if it were the
only one to go.
Cost: one forward pass, a backward pass over 256 images, and per layer columns² * images * `positions` + columns³; no labels.
Source: ours, in the family of Hassibi, Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992; the
error of a layer's output as the measure after Luo, Wu, Lin, "ThiNet", ICCV 2017, and Frantar, Alistarh, "Optimal Brain Compression",
NeurIPS 2022. It is exactly what recovery by reconstruction (train/reconstruct.py) minimises.

Rules. Columns are standardised first, so `ridge` is the same for all and a rescaling that the network does not notice changes nothing.
It is the noise that inputs are thought to have, as a share of their variance: what a channel has in common with others counts less, because
these may go too, and what stays will come from layers that lost channels themselves. On a ResNet-20 trained without them, 5,000 new images
after the refit: 84.2, 84.2, 84.8, 84.9% right at -50% of the MACs and 78.3, 78.3, 81.0, 80.5 at -64% for 0.001, 0.01, 0.2, 0.5.
`shrink` draws their correlations towards none by as much as so few images call for (`shrinkage`): as they are, 128 images would show
any 129th channel to be a sum of the others (EfficientNet-Lite0's head lost 1,064 of its 1,280 channels that way).
A layer with more than 2,304 columns, and the largest ones first while all matrices take more than 2 GiB, is measured tap by tap: each
kernel tap refitted from the same tap of the other channels, which needs moments between channels only. A depthwise conv is no reader:
its channels are the group's own, and their readers count. Layers that read through a product of two computed tensors (attention), and
those too large even tap by tap, are left out; a group without any reader left scores its share of the squared weights that produce it,
times the mean loss of all others. A reader whose effect on the outputs cannot be seen (its weights are computed) has the mean effect of
the rest; where no output can be differentiated the measure is the layers' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune.criteria.probe import Floats, Probe, Statistic
from edgeprune.criteria.reaction import effect
from edgeprune.errors import DataError, UsageError
from edgeprune.graph import ChannelGraph, ChannelGroup, Member, Op
from edgeprune.plan import Scores
from edgeprune.train.moments import Moments, conv_patches, sampled_places

NEEDS = ("maps", "gradients")
PAPER = "ours; Optimal Brain Surgeon (Hassibi, Stork, NIPS 1992) on the outputs of the layers that read a channel"
COLUMNS = 2304
MEMORY_BYTES = 2 << 30
ROWS = 8192
STEPS = 128
CONSTANT = 1e-10  # a column whose variance is below this share of its mean square is constant


def score(graph: ChannelGraph, probe: Probe, **options: Any) -> Scores:
    """Mean squared change of the network's outputs, float64, higher = keep. Shapes: (channels,) per group."""
    return probe.gather(statistic(graph, probe, **options))[0]


def statistic(
    graph: ChannelGraph,
    probe: Probe,
    *,
    order: str = "greedy",
    measure: str = "outputs",
    ridge: float = 0.2,
    shrink: bool = True,
    positions: int = 16,
) -> Statistic:
    """The running second moments. `positions`: how many places of a map are looked at in each image. Raises UsageError."""
    if measure not in ("outputs", "layer"):
        raise UsageError(f"measure must be outputs or layer, got {measure!r}.")
    if order not in ("greedy", "single"):
        raise UsageError(f"order must be greedy or single, got {order!r}.")
    if not ridge > 0 or positions < 1:
        raise UsageError(f"ridge must be above 0 and positions at least 1, got {ridge!r} and {positions!r}.")
    return _Losses(graph, probe, greedy=order == "greedy", outputs=measure == "outputs", ridge=ridge, shrink=shrink, positions=positions)


class _Losses(Statistic):
    maps = False

    def __init__(
        self, graph: ChannelGraph, probe: Probe, *, greedy: bool, outputs: bool, ridge: float, shrink: bool, positions: int
    ) -> None:
        self._graph, self._probe, self._greedy, self._ridge, self._shrink = graph, probe, greedy, ridge, shrink
        readers, self._left_out = _affordable(_readers(graph))
        self._read = {r.weight: _Reading(r, positions) for r in readers}
        self.operations = {op.call: partial(reading.add, op) for reading in self._read.values() for op in reading.reader.ops}
        self.layers = frozenset(self._read) if outputs else frozenset()
        self._reactions: dict[str, Tensor] = {}
        self._reacting = 0

    def react(self, reactions: Mapping[str, Tensor], images: int) -> None:
        """Add one batch."""
        self._reacting += images
        for name, reaction in reactions.items():
            self._reactions[name] = self._reactions.get(name, 0.0) + reaction

    def scores(self, images: int) -> Scores:
        """Losses of every group; `facts` names the readers measured tap by tap or not at all, and the groups without any."""
        tapwise = [r.reader.weight for r in self._read.values() if r.reader.tapwise]
        solved = {}
        for name in list(self._read):  # moments go as inverses come: both at once would be twice the memory
            if (reading := self._read.pop(name)).seen:
                reaction = self._reactions.get(name)
                solved[name] = reading.solved(self._ridge, self._shrink, None if reaction is None else effect(reaction, self._reacting))
        seen = [s.energy for s in solved.values() if s.reacts]
        unit = float(np.mean(seen)) if seen else 1.0
        values, unread = {}, []
        for group in self._graph.groups:
            blocks = [_Block.cut(solved[m.parameter], m, unit) for m in _reading_members(group) if m.parameter in solved]
            if blocks:
                values[group.name] = losses(blocks, greedy=self._greedy)
            else:
                unread.append(group.name)
        usual = float(np.mean([v.sum() for v in values.values()])) if values else 1.0
        for group in (g for g in self._graph.groups if g.name in unread):
            squares = [part.double().square().sum(dim=1).cpu().numpy() for part in self._probe.slices(group)]
            values[group.name] = usual * self._probe.reduced([s / max(float(s.sum()), 1e-300) for s in squares])
        facts = {"images": images, "tap_by_tap": tapwise, "left_out": self._left_out, "unread": unread}
        return Scores("reconstruction", values, facts, additive=bool(seen))


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
    normed = {op.inputs[0] for op in graph.ops if op.kind == "norm" and op.inputs and graph.keeps_statistics(op)}
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
        self._moments.add(rows.reshape(rows.shape[0] * rows.shape[1], reader.groups, reader.columns), images=len(rows))

    def solved(self, ridge: float, shrink: bool, reaction: Tensor | None) -> _Solved:
        """The inverse of the standardised second moments, and the weights of standardised columns, each row times its outputs' effect."""
        mean, second = self._moments.mean(), self._moments.covariance()
        floor = CONSTANT * (second.diagonal(dim1=1, dim2=2) + mean.square())
        if not self._centred:
            second += mean[:, :, None] * mean[:, None, :]
        if not bool(torch.isfinite(second).all()):
            raise DataError(f"what {self.reader.weight} reads holds NaN or Inf: check the preprocessing (mean, std) and the weights.")
        power = second.diagonal(dim1=1, dim2=2)
        spread = torch.where(power > floor, power, torch.zeros_like(power)).sqrt()
        inverse_spread = torch.where(spread > 0, 1 / spread, torch.zeros_like(spread))
        second *= inverse_spread[:, :, None] * inverse_spread[:, None, :]
        if shrink:
            drawn = shrinkage(second, self._moments.independent_rows())
            second *= 1 - drawn
            second.diagonal(dim1=1, dim2=2).add_(drawn)
        second.diagonal(dim1=1, dim2=2).add_(ridge + self.reader.columns * self._moments.rounding)
        weight = self._weight.double().cpu() * spread[:, None]
        if reaction is not None:
            weight *= self._per_row(reaction).sqrt()[:, :, None]
        energy = float(torch.einsum("goc,gcd,god->", weight, second, weight))
        if weight.shape[1] > weight.shape[2]:  # the same products of columns with fewer rows
            weight = torch.linalg.qr(weight, mode="r").R
        return _Solved(self.reader, torch.cholesky_inverse(torch.linalg.cholesky(second)), weight, energy, reaction is not None)

    def _per_row(self, reaction: Tensor) -> Tensor:
        """A figure of each output as one of each row of the weights, (groups, rows): tap by tap, an output has a row for every tap."""
        repeats = self._weight.shape[0] * self._weight.shape[1] // len(reaction)
        linear = self.reader.ops[0].kind == "linear"
        rows = reaction.repeat(repeats) if linear else reaction.repeat_interleave(repeats)
        return rows.reshape(self._weight.shape[:2])


def shrinkage(correlation: Tensor, rows: float) -> float:
    """How far to draw correlations (groups, columns, columns) that were estimated from so many rows towards none at all, 0 to 1.

    What brings them closest to the true ones for normal variables: Chen, Wiesel, Eldar, Hero, "Shrinkage Algorithms for MMSE Covariance
    Estimation", IEEE Transactions on Signal Processing 58 (2010), the oracle approximating estimator; of several groups the mean.
    """
    p = correlation.shape[1]
    squares = correlation.square().sum(dim=(1, 2))
    traces = correlation.diagonal(dim1=1, dim2=2).sum(1).square()
    wanted = ((1 - 2 / p) * squares + traces) / ((rows + 1 - 2 / p) * (squares - traces / p)).clamp(min=1e-12)
    return float(wanted.clamp(max=1).mean())


@dataclass(frozen=True, eq=False)
class _Solved:
    reader: _Reader
    inverse: Tensor  # (groups, columns, columns)
    weight: Tensor  # (groups, rows, columns)
    energy: float
    reacts: bool  # rows are weighted by their effect on the network's outputs


class _Block:
    """One reader as one group sees it: inverse moments and weights of the group's columns, `table` (channels, columns of each)."""

    def __init__(self, inverse: Tensor, weight: Tensor, table: Tensor, scale: float) -> None:
        self._inverse, self._weight, self._table, self._scale = inverse, weight, table, scale

    @staticmethod
    def cut(solved: _Solved, member: Member, unit: float) -> _Block:
        """`unit`: what a whole reader is worth whose effect on the outputs is not known."""
        table = solved.reader.table(member)
        columns = table.flatten()
        inverse = solved.inverse[:, columns[:, None], columns]
        scale = 1.0 if solved.reacts else unit / solved.energy if solved.energy > 0 else 0.0
        return _Block(inverse, solved.weight[:, :, columns], torch.arange(len(columns)).reshape(table.shape), scale)

    def losses(self, channels: Tensor) -> Tensor:
        """What each of these channels takes with it, (channels,)."""
        at = self._table[channels]
        inverse = self._inverse[:, at[:, :, None], at[:, None, :]]
        weight = self._weight[:, :, at].permute(0, 2, 3, 1)
        whitened: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(inverse), weight, upper=False)
        return self._scale * whitened.square().sum(dim=(0, 2, 3))

    def remove(self, channels: Tensor) -> None:
        """The remaining weights become those that make up for these channels best; the inverse loses their columns."""
        at = self._table[channels].flatten()
        rows = self._inverse[:, at]
        gain = torch.linalg.solve(rows[:, :, at], rows)
        self._weight -= self._weight[:, :, at] @ gain
        self._inverse.baddbmm_(rows.transpose(1, 2), gain, alpha=-1)


def losses(blocks: Sequence[_Block], *, greedy: bool) -> Floats:
    """The loss of every channel of a group, summed over its readers, (channels,)."""
    left = torch.arange(len(blocks[0]._table))
    at_once = -(-len(left) // STEPS)
    values = np.zeros(len(left))
    last = 0.0
    while len(left):
        found = torch.stack([block.losses(left) for block in blocks]).sum(dim=0)
        if not greedy:
            return found.numpy()
        order = found.argsort(stable=True)
        for least in order[:at_once].tolist():
            last = max(float(found[least]), last * (1 + 1e-9))
            values[int(left[least])] = last
        gone, left = left[order[:at_once]], left[order[at_once:].sort().values]
        for block in blocks:
            block.remove(gone)
    return values
