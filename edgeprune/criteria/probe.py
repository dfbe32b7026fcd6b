"""What a criterion may look at: weights, feature maps, labels and gradients, on any traced network.

The network runs once over the data, in eval mode, for all criteria that are asked. Feature maps are taken by the number of the
operation that made them, as recorded by tracing, not by module hooks: networks of any form have them. A criterion that reads data is
a running statistic: it sees one batch at a time and keeps sums, so memory does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.criteria.reaction import reactions
from edgeprune.errors import DataError, UsageError
from edgeprune.graph import ChannelGraph, ChannelGroup, Tap
from edgeprune.graph.running import Observer, contiguous, evaluating, tensors_in
from edgeprune.graph.slim import named_tensors
from edgeprune.plan import Scores

Floats = NDArray[np.float64]
REACTING_IMAGES = 256  # a random direction for each image, averaged over its positions: more change the ranking little
REDUCERS: dict[str, Callable[[Floats], Floats]] = {
    "mean": lambda rows: rows.mean(axis=0),
    "sum": lambda rows: rows.sum(axis=0),
    "max": lambda rows: rows.max(axis=0),
    "first": lambda rows: rows[0],
    "backward": lambda rows: rows[-1],
}


@dataclass(frozen=True, eq=False)
class View:
    """One batch of one group's feature maps where the next layer reads them: maps (n, channels, h, w), finite; labels (n,) or None.

    n counts images: where a linear runs over tokens, a map holds one row per token. Where a layer has no batch axis that fits the
    images, labels are None and `aligned` is false; labels are also None where the data have none.
    """

    group: ChannelGroup
    tap: int
    maps: Tensor
    labels: Tensor | None
    aligned: bool = True

    @cached_property
    def pooled(self) -> Tensor:
        """The mean of each map, float64 (n, channels); summed in the maps' own type, which is many times faster."""
        return self.maps.mean(dim=(2, 3)).double()

    @property
    def key(self) -> tuple[str, int]:
        """(group name, tap number): what a statistic keeps its sums by."""
        return self.group.name, self.tap


class Statistic:
    """What one criterion gathers while the network runs over the data; a criterion overrides what it needs.

    `gradients`: whether the run goes backward too. `operations`: by call number, what wants an operation's arguments and result.
    `layers`: the weights of the layers whose outputs' effect on the network's outputs is asked for.
    """

    gradients: ClassVar[bool] = False
    maps: ClassVar[bool] = True
    operations: Mapping[int, Callable[[tuple[Any, ...], Any], None]] = {}
    layers: frozenset[str] = frozenset()

    def update(self, view: View) -> None:
        """One batch of one group's maps at one of its taps."""

    def finish_batch(self, outputs: Any) -> None:
        """The end of one batch's forward pass: what the network returned."""

    def backward(self, gradients: Mapping[str, Tensor], images: int) -> None:
        """Gradients of the mean cross-entropy of one batch of `images`, by parameter name."""

    def react(self, reactions: Mapping[str, Tensor], images: int) -> None:
        """How the network's outputs react to each layer's (the sums of reaction.py), over one batch of `images`."""

    def scores(self, images: int) -> Scores:
        """The result, after `images` images."""
        raise TypeError(f"{type(self).__name__} does not say how its sums become scores")


class Probe:
    """Weights of one model, one pass over its calibration data, and how several layers of one group make one score."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, data: Iterable[Any] | None = None, *, reduce: str = "mean") -> None:
        if reduce not in REDUCERS:
            raise UsageError(f"reduce must be one of {', '.join(REDUCERS)}, got {reduce!r}.")
        self.model = model
        self.graph = graph
        self.data = data
        self._reduce = REDUCERS[reduce]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by the names that tracing uses."""
        return dict(named_tensors(self.model))

    def slices(self, group: ChannelGroup) -> list[Tensor]:
        """The weights that produce each channel: one (channels, values) tensor for every conv or linear that makes the group."""
        parts = []
        for member in group.members[: group.producing]:
            weight = self.tensors[member.parameter].detach().movedim(member.axis, 0)
            parts.append(weight[torch.from_numpy(member.indices)].reshape(group.channels, -1))
        return parts

    def reduced(self, rows: Sequence[Floats], *, balance: bool = False) -> Floats:
        """One score per channel from those of each layer (or tap) of its group: (layers, channels) -> (channels,) float64.

        `balance`: each layer is divided by its mean first, for figures whose scale differs from layer to layer.
        """
        table = np.stack([np.asarray(r, dtype=np.float64) for r in rows])
        if balance and len(table) > 1:
            means = table.mean(axis=1, keepdims=True)
            table = np.where(means > 0, table / np.where(means > 0, means, 1.0), table)
        return self._reduce(table)

    def gather(self, *statistics: Statistic) -> tuple[Scores, ...]:
        """Run the network once over the data and give every statistic what it asks for; the scores of each.

        Batches are inputs, or (inputs, labels); the inputs of a network that takes several are a tuple. Raises DataError for no
        data, for maps that are not finite, and where gradients are asked for without labels.
        """
        images = 0
        directions = torch.Generator().manual_seed(0)
        with evaluating(self.model), contiguous(self.model):
            for batch in self.data if self.data is not None else ():
                inputs, labels = _parts(batch)
                images += count_of(inputs)
                if forward := [s for s in statistics if s.maps or s.operations]:
                    with torch.no_grad(), _Watch(self.graph, forward, count_of(inputs), labels):
                        outputs = self.model(*inputs)
                    for statistic in forward:
                        statistic.finish_batch(outputs)
                if backward := [s for s in statistics if s.gradients]:
                    gradients, count = self._gradients(inputs, labels)
                    for statistic in backward:
                        statistic.backward(gradients, count)
                if any(s.layers for s in statistics) and (left := REACTING_IMAGES - images + count_of(inputs)) > 0:
                    self._react(statistics, _first(inputs, left), directions)
        if not images:
            raise DataError("the calibration data are empty: give at least one batch of images.")
        return tuple(s.scores(images) for s in statistics)

    def _react(self, statistics: Sequence[Statistic], inputs: tuple[Any, ...], directions: torch.Generator) -> None:
        weights = {name: self.tensors[name] for s in statistics for name in s.layers}
        size = 2 * 4 * sum(int(np.prod(a.shape)) for a in self.graph.activations)
        found = reactions(self.model, inputs, weights, generator=directions, bytes_per_image=size)
        for statistic in statistics:
            statistic.react({name: r for name, r in found.items() if name in statistic.layers}, count_of(inputs))

    def _gradients(self, inputs: tuple[Any, ...], labels: Tensor | None) -> tuple[dict[str, Tensor], int]:
        if labels is None:
            raise DataError("this criterion follows the loss, so it needs labels: give batches of (inputs, labels).")
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            logits = next(tensors_in(self.model(*inputs)))
            if logits.ndim != 2 or int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
                raise DataError(
                    f"this criterion follows the loss of a classifier, but the outputs are {tuple(logits.shape)} and the labels go from "
                    f"{int(labels.min())} to {int(labels.max())}: give the classes' numbers, or choose a criterion without gradients."
                )
            loss = F.cross_entropy(logits, labels)
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}, len(labels)


def count_of(inputs: tuple[Any, ...]) -> int:
    """Images in a batch."""
    return len(next(tensors_in(inputs), ()))


def _first(inputs: tuple[Any, ...], images: int) -> tuple[Any, ...]:
    """At most `images` of a batch; the whole batch where its inputs are lists of images."""
    whole = count_of(inputs) <= images or not all(isinstance(t, Tensor) for t in inputs)
    return inputs if whole else tuple(t[:images] for t in inputs)


def _parts(batch: Any) -> tuple[tuple[Any, ...], Tensor | None]:
    """(inputs, labels) of one batch."""
    pair = isinstance(batch, (tuple, list))
    inputs, labels = (batch[0], batch[1] if len(batch) > 1 else None) if pair else (batch, None)
    arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    in_rows = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in arguments)
    return in_rows, labels if isinstance(labels, Tensor) else None


class _Watch(Observer):
    """Counts the operations the way tracing numbered them, and hands over the wanted ones."""

    def __init__(self, graph: ChannelGraph, statistics: Sequence[Statistic], images: int, labels: Tensor | None) -> None:
        super().__init__()
        self._readers = [s for s in statistics if s.maps]
        self._operations = [s.operations for s in statistics if s.operations]
        self._images = images
        self._labels = labels
        self._next = 0
        self._taps: dict[int, list[tuple[ChannelGroup, int, Tap]]] = {}
        for group in graph.groups if self._readers else ():
            for number, tap in enumerate(graph.taps[group.name]):
                self._taps.setdefault(tap.call, []).append((group, number, tap))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operation and look at it."""
        out = func(*args, **(kwargs or {}))
        number, self._next = self._next, self._next + 1
        for operations in self._operations:
            if number in operations:
                operations[number](args, out)
        for group, tap_number, tap in self._taps.get(number, ()):
            maps = channel_maps(next(tensors_in(out)), tap)
            if not bool(torch.isfinite(maps.sum())):
                raise DataError(f"the feature maps of {group.name} hold NaN or Inf: check the preprocessing (mean, std) and the weights.")
            if maps.shape[0] > self._images and maps.shape[0] % self._images == 0:
                maps = maps.reshape(self._images, -1, *maps.shape[1:]).transpose(1, 2).flatten(3)
            aligned = maps.shape[0] == self._images
            view = View(group, tap_number, maps, self._labels if aligned else None, aligned)
            for statistic in self._readers:
                statistic.update(view)
        return out


def channel_maps(tensor: Tensor, tap: Tap) -> Tensor:
    """The group's channels of one output as (n, channels, h, w); vectors and flattened maps become (n, channels, 1, k)."""
    moved = tensor.movedim(tap.axis, 1) if tap.axis else tensor[None].movedim(tap.axis + 1, 1)
    index: NDArray[np.int64] = tap.indices
    if moved.ndim == 4 and index.shape == (moved.shape[1], 1) and (index[:, 0] == np.arange(len(index))).all():
        return moved  # all channels in their order: no copy
    maps = moved.index_select(1, torch.from_numpy(index.reshape(-1)).to(moved.device))
    n, channels, spread = maps.shape[0], index.shape[0], index.shape[1]
    if maps.ndim == 4 and spread == 1:
        return maps
    return maps.reshape(n, channels, 1, -1)
