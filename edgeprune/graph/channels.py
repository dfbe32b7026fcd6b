"""What tracing finds: which channels can go, what goes with each, and the operations that ran. No torch here.

A removable channel is a class of parameter indices that must vanish together; a ChannelGroup collects the classes that touch
the same parameter axes, so that one plan entry per group says how wide it stays. The operations carry sizes as linear
functions of the group widths: the cost models evaluate any plan from them without touching the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeprune.graph.branches import NORM_TENSORS, Branch, branches_of, left
from edgeprune.graph.lengths import Floats, Sizes, axis_lengths, checked, elements


class Member(NamedTuple):
    """One parameter axis a group reaches: `indices[c]` are the positions on that axis that belong to channel c."""

    parameter: str
    axis: int
    indices: NDArray[np.int64]  # (channels, positions per channel)


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are removed one by one, each with everything that belongs to it.

    `name` is the module that produces them; the first `producing` members are the axes of convs and linears that make them.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    producing: int = 1

    @property
    def filters(self) -> int:
        """Filters of the producing layer per channel: more than one where a grouped conv or a shuffle ties some."""
        return int(self.members[0].indices.shape[1])

    def widths(self, round_to: int = 1, minimum: int = 1) -> tuple[int, ...]:
        """The widths a plan may choose, ascending, the dense one last.

        Multiples of `round_to` of the producing axis (a channel of a grouped conv spans several positions of it); a group
        narrower than that stays whole. Never below `minimum`, never below 1.
        """
        step = round_to // math.gcd(round_to, self.filters)
        return (*(w for w in range(step, self.channels, step) if w >= minimum), self.channels)


class Share(NamedTuple):
    """What a group weighs in the dense network.

    `macs` and `params` would vanish if the whole group went and everything else stayed: all of every layer whose weight it reaches
    on one axis, or the part of it that belongs to the group; of a residual branch that goes with it (ChannelGraph.branches) all of every
    layer. A layer that reads one group and makes another counts for both, so
    the groups of a network add up to more than the network. `channel_macs` and `channel_params` are what its first channel saves.
    """

    macs: int
    params: int
    channel_macs: int
    channel_params: int


class Tap(NamedTuple):
    """Where a group's channels can be looked at: `indices` (channels, k) along `axis` of what dispatched operation `call` returns."""

    call: int
    axis: int
    indices: NDArray[np.int64]


class Read(NamedTuple):
    """What an operation over channels reads: position i of `axis` of its tensor `argument` is `channels[i]` of group `groups[i]`.

    Positions that always stay have group -1.
    """

    argument: int
    axis: int
    groups: NDArray[np.int64]
    channels: NDArray[np.int64]


class Mixing(NamedTuple):
    """An operation that computes over the set of channels, so that zeros do not stand for removed ones.

    The `ordinal`-th operation called `op` that the forward dispatches. Its result has the positions of the first reads along
    `output_axes`, in this order.
    """

    op: str
    ordinal: int
    reads: tuple[Read, ...]
    output_axes: tuple[int, ...]


@dataclass(frozen=True)
class Activation:
    """Size of one tensor of the traced run: elements = fixed + sum over groups of per_channel[g] * kept channels of g.

    Exact where `even`: all channels of a group have as many elements. Elsewhere, as in the first part of a split, the mean.
    """

    shape: tuple[int, ...]
    fixed: float
    per_channel: tuple[tuple[int, float], ...]  # (group number, elements per kept channel)
    even: bool = True


@dataclass(frozen=True)
class Op:
    """One operation of the traced run, batch 1, in the order in which they ran.

    kind: conv, linear, norm, activation, add, mul, pool, cat, resize, move (no arithmetic: view, slice, pad…) or other.
    `weight` names the parameter of conv, linear and norm; `kernel` and `stride` are empty for other kinds. MACs of conv and
    linear are `positions` * elements of the weight (for a transposed conv, positions of the input). `inputs` and `output`
    index ChannelGraph.activations; `call` is the operation's number among all that the forward dispatches. `fused` is the number
    of the op (index in ChannelGraph.ops) whose kernel computes this one in an inference runtime (a norm or activation right
    after a conv), or -1. `tensors`: every parameter and buffer that it reads; `bias`: that of a conv or linear (None without one, ""
    where it is no parameter); `eps`: a norm's.
    """

    kind: str
    name: str
    weight: str | None
    inputs: tuple[int, ...]
    output: int
    call: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1
    positions: int = 0
    fused: int = -1
    bias: str | None = None
    eps: float = 0.0
    tensors: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """What the names of its tensors begin with: those of its module."""
        return (self.weight or "").removesuffix("weight")


class SizedAxis(NamedTuple):
    """An axis whose size an exported network holds as a number in operation `node`.

    `channels[i]` is the channel at position i, counted over all groups in their order, or -1 where the position stays, (n,).
    """

    node: str
    axis: int
    channels: NDArray[np.int64]


class WrittenAxis(NamedTuple):
    """An axis that node `node` of the user's code, as torch.fx writes it, cuts, pads, splits or fills at `bounds`.

    `channels` as in SizedAxis; a negative `axis` counts from the last one; `silent`: a wrong number could go unnoticed.
    """

    node: str
    axis: int
    channels: NDArray[np.int64]
    bounds: tuple[int, ...]
    silent: bool


@dataclass(frozen=True, eq=False)
class WrittenSizes:
    """Numbers of channels in the user's code that torch.fx can change: the modules whose forward holds one, and the numbers.

    `inputs`: example inputs, as running.described says.
    """

    inputs: Any
    opened: tuple[str, ...]
    axes: tuple[WrittenAxis, ...]


@dataclass(frozen=True, eq=False)
class ExportedSizes:
    """What it takes to slim a network through torch.export: example inputs to export it with (running.described) and its numbers."""

    inputs: Any
    axes: tuple[SizedAxis, ...]


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The traced network. `frozen` maps a parameter axis ("fc.weight[0]") to the reason why its channels stay.

    `shapes` holds the dense shape of every parameter and buffer; `output_activations` index the network's outputs;
    `taps[group.name]` says where its feature maps appear in a run; `mixing` lists the norms and sums over channels that removal changes.
    `written` is None where the user's own code takes fewer channels everywhere; where it holds their number as a fixed number and a
    plan removes some of these, its forward is written down with other numbers. Where that cannot be, `exported` says how the
    exported network is slimmed. `stuck`: groups whose residual branch the code does not let go, with the reason (cut.offered).
    """

    groups: tuple[ChannelGroup, ...]
    frozen: Mapping[str, str]
    ops: tuple[Op, ...]
    activations: tuple[Activation, ...]
    shapes: Mapping[str, tuple[int, ...]]
    trainable: frozenset[str]  # the names in `shapes` that are parameters, not buffers
    taps: Mapping[str, tuple[Tap, ...]]
    input_activations: tuple[int, ...]
    output_activations: tuple[int, ...]
    mixing: tuple[Mixing, ...] = ()
    written: WrittenSizes | None = None
    exported: ExportedSizes | None = None
    stuck: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def dense_widths(self) -> NDArray[np.int64]:
        """Channels of every group, (groups,)."""
        return np.array([g.channels for g in self.groups], dtype=np.int64)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of conv and linear, one sample, dense."""
        return sum(op.positions * math.prod(self.shapes[op.weight]) for op in self.multiplying if op.weight)

    @property
    def params(self) -> int:
        """Parameters (no buffers), dense."""
        return sum(math.prod(self.shapes[name]) for name in self.trainable)

    def macs_at(self, widths: NDArray[Any]) -> Floats:
        """MACs of the slim network, as `macs` counts them: widths (plans, groups) or (groups,) -> (plans,)."""
        w = checked(widths, len(self.groups))
        stays = left(
            self, w, len(self.multiplying), lambda name: [n for n, op in enumerate(self.multiplying) if op.weight in self._gone(name)]
        )
        total: Floats = (elements(self._weights_by_axis, w) * stays) @ self._positions
        return total

    def params_at(self, widths: NDArray[Any]) -> Floats:
        """Parameters of the slim network, as `params` counts them: widths (plans, groups) or (groups,) -> (plans,)."""
        w, names = checked(widths, len(self.groups)), sorted(self.trainable)
        stays = left(self, w, len(names), lambda name: [n for n, own in enumerate(names) if own in self._gone(name)])
        total: Floats = (elements(self._parameters_by_axis, w) * stays).sum(axis=1)
        return total

    @cached_property
    def branches(self) -> Mapping[str, Branch]:
        """The groups of which a plan may keep no channel: inside a residual branch, which then vanishes."""
        return {name: branch for name, branch in branches_of(self).items() if name not in self.stuck}

    def keeps_statistics(self, norm: Op) -> bool:
        """Whether it is a batch norm with a scale, a shift, a running mean and a running variance."""
        return bool(norm.weight) and all(norm.stem + leaf in self.shapes for leaf in NORM_TENSORS)

    def _gone(self, name: str) -> frozenset[str]:
        """The tensors that a group takes along when it vanishes."""
        return self.branches[name].tensors

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        """What each group weighs, in the order of `groups`."""
        alone = np.diag(self.dense_widths)
        saved = [np.rint(dense - count(self.dense_widths - less)).astype(np.int64)
                 for less in (alone, np.eye(len(self.groups), dtype=np.int64)) for dense, count in self._counts()]  # fmt: skip
        return tuple(Share(*map(int, row)) for row in zip(*saved, strict=True))

    @property
    def prunable(self) -> tuple[float, float]:
        """The shares of MACs and of parameters that vanish when every group keeps one channel: no plan removes more."""
        ones = np.ones(len(self.groups))
        macs, params = (1 - float(count(ones)[0]) / dense if dense else 0.0 for dense, count in self._counts())
        return macs, params

    def _counts(self) -> tuple[tuple[int, Callable[[NDArray[Any]], Floats]], ...]:
        return (self.macs, self.macs_at), (self.params, self.params_at)

    @cached_property
    def multiplying(self) -> tuple[Op, ...]:
        """The convs and linears with a weight: the operations whose MACs count."""
        return tuple(op for op in self.ops if op.kind in ("conv", "linear") and op.weight)

    @cached_property
    def _positions(self) -> Floats:
        return np.array([op.positions for op in self.multiplying], dtype=np.float64)

    @cached_property
    def _weights_by_axis(self) -> tuple[Sizes, ...]:
        return axis_lengths(self, [op.weight for op in self.multiplying])

    @cached_property
    def _parameters_by_axis(self) -> tuple[Sizes, ...]:
        return axis_lengths(self, sorted(self.trainable))
