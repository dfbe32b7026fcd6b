"""What a criterion may look at: weights, and feature maps of calibration images, on any traced network.

The network runs once over the data, in eval mode. Feature maps are taken by the number of the operation that made them, as
recorded by tracing, not by module hooks: networks of any form have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgeprune.errors import DataError
from edgeprune.graph import ChannelGraph, ChannelGroup, Tap
from edgeprune.graph.running import evaluating, tensors_in
from edgeprune.graph.slim import named_tensors

Observer = Callable[[ChannelGroup, int, Tensor], None]


class Probe:
    """Weights and one pass over the calibration data for one model and its graph."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, data: Iterable[Any] | None = None) -> None:
        self.model = model
        self.graph = graph
        self._data = data
        self._tensors = dict(named_tensors(model))

    def slices(self, group: ChannelGroup) -> list[Tensor]:
        """The weights that produce each channel: one (channels, values) tensor for every conv or linear that makes the group."""
        parts = []
        for member in group.members[: group.producing]:
            weight = self._tensors[member.parameter].detach().movedim(member.axis, 0)
            parts.append(weight[torch.from_numpy(member.indices)].reshape(group.channels, -1))
        return parts

    def observe_maps(self, observer: Observer) -> int:
        """Call `observer(group, tap number, maps)` for every feature map of every batch; returns the number of images.

        maps: float (n, channels, h, w); vectors and flattened maps arrive as (n, channels, 1, k). The inputs of a network that
        takes several are a tuple. Raises DataError for no data.
        """
        wanted: dict[int, list[tuple[ChannelGroup, int, Tap]]] = {}
        for group in self.graph.groups:
            for number, tap in enumerate(self.graph.taps[group.name]):
                wanted.setdefault(tap.call, []).append((group, number, tap))
        images = 0
        with torch.no_grad(), evaluating(self.model):
            for batch in self._data or ():
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
                images += len(next(tensors_in(inputs), ()))
                with _Watch(wanted, observer):
                    self.model(*inputs)
        if not images:
            raise DataError("the calibration data are empty: give at least one batch of images.")
        return images


class _Watch(TorchDispatchMode):
    """Counts the operations the way tracing numbered them, and hands over the wanted ones."""

    def __init__(self, wanted: dict[int, list[tuple[ChannelGroup, int, Tap]]], observer: Observer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._wanted = wanted
        self._observer = observer
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operation and look at its first output."""
        out = func(*args, **(kwargs or {}))
        number, self._next = self._next, self._next + 1
        for group, tap_number, tap in self._wanted.get(number, ()):
            self._observer(group, tap_number, channel_maps(next(tensors_in(out)), tap))
        return out


def channel_maps(tensor: Tensor, tap: Tap) -> Tensor:
    """The group's channels of one output as (n, channels, h, w)."""
    moved = tensor.movedim(tap.axis, 1) if tap.axis else tensor[None].movedim(tap.axis + 1, 1)
    index: NDArray[np.int64] = tap.indices
    maps = moved.index_select(1, torch.from_numpy(index.reshape(-1)).to(moved.device))
    n, channels, spread = maps.shape[0], index.shape[0], index.shape[1]
    if maps.ndim == 4 and spread == 1:
        return maps
    return maps.reshape(n, channels, 1, -1)
