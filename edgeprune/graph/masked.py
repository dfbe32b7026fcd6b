"""A network whose channels can be switched off and on again: many masks, one copy, no surgery.

`Masked` zeroes in place what a plan would remove and puts it back, so a mask costs a few copies of weights instead of a copy of the
network; it computes what `slim.mask` computes. `Prefix` keeps what a forward computes before it first reads the masked weights, for
many masks of one layer. Everything here is exact: no mask changes what another one gives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from edgeprune.errors import DataError
from edgeprune.graph.channels import ChannelGraph
from edgeprune.graph.mixing import Kept, compute_over_kept
from edgeprune.graph.running import Observer, fresh, in_format, single_sample, tensors_in
from edgeprune.graph.slim import kept_positions, mask, named_tensors
from edgeprune.plan import Plan

Bits = NDArray[np.bool_]
Batch = tuple[tuple[Any, ...], Tensor]  # (the forward's positional arguments, labels)


class Masked:
    """A copy of `model`, in eval mode, in which `set` switches channels off and on; the original is untouched.

    `columns[group.name]` is the group's place in a keep vector, `channels` its length: all channels of all groups, in the order of
    `graph.groups`. A batch norm may be recalibrated in the copy (`masked.model`); `reset` forgets that. `memory_format` is the
    copy's: torch.channels_last is the faster one for convolutions on a CPU, where the network's code allows it.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, *, memory_format: torch.memory_format = torch.preserve_format) -> None:
        self.model = in_format(mask(model, graph, Plan({})), memory_format)
        for module in self.model.modules():
            module.training = False
        ends = np.cumsum([g.channels for g in graph.groups], dtype=np.int64)
        self.columns = {g.name: slice(int(end) - g.channels, int(end)) for g, end in zip(graph.groups, ends, strict=True)}
        self.channels = int(ends[-1]) if len(ends) else 0
        self._tensors = dict(named_tensors(self.model))
        self._values = {name: t.detach().clone() for name, t in self._tensors.items()}
        self._keep: Bits = np.ones(self.channels, dtype=np.bool_)
        self._axes: dict[str, list[tuple[int, slice, NDArray[np.int64]]]] = {}
        self._touches: dict[str, tuple[str, ...]] = {}
        for group in graph.groups:
            self._touches[group.name] = tuple(dict.fromkeys(m.parameter for m in group.members))
            for member in group.members:
                self._axes.setdefault(member.parameter, []).append((member.axis, self.columns[group.name], member.indices))
        self._graph = graph
        self._mixing: dict[tuple[str, int], Kept] = {}
        if graph.mixing:
            compute_over_kept(self.model, self._mixing)

    @property
    def mixes(self) -> bool:
        """Whether operations over the set of channels run over the kept ones: then a forward's operations depend on the mask."""
        return bool(self._graph.mixing)

    def set(self, keep: Bits) -> nn.Module:
        """The copy with exactly the channels of `keep`, bool (channels,), switched on; all of a group may be off.

        Only tensors of groups whose channels changed since the last call are written.
        """
        if keep.shape != (self.channels,):
            raise ValueError(f"a keep vector of this network has {self.channels} values, got {keep.shape}")
        keep = keep.astype(np.bool_, copy=True)
        changed = [name for name, part in self.columns.items() if (keep[part] != self._keep[part]).any()]
        with torch.no_grad():
            for parameter in dict.fromkeys(p for name in changed for p in self._touches[name]):
                tensor = self._tensors[parameter].copy_(self._values[parameter])
                for axis, part, indices in self._axes[parameter]:
                    gone = indices[~keep[part]].reshape(-1)
                    if len(gone):
                        tensor.index_fill_(axis, torch.from_numpy(gone).to(tensor.device), 0)
        self._switch(keep)
        return self.model

    def _switch(self, keep: Bits) -> None:
        self._keep = keep
        self._mixing.clear()
        self._mixing.update(kept_positions(self._graph, keep))

    def reset(self) -> nn.Module:
        """The copy as dense as it was at first: every channel on, every parameter and buffer at its own value."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(self._values[name])
        self._switch(np.ones(self.channels, dtype=np.bool_))
        return self.model

    def keep_of(self, plan: Plan) -> Bits:
        """The keep vector of a plan; groups that it does not name stay whole."""
        keep = np.ones(self.channels, dtype=np.bool_)
        for name, kept in plan.keep.items():
            part = self.columns[name]
            keep[part] = False
            keep[part.start + np.asarray(kept, dtype=np.int64)] = True
        return keep

    def tensors(self, groups: Iterable[str]) -> tuple[Tensor, ...]:
        """The copy's parameters and buffers that hold channels of these groups."""
        return tuple(self._tensors[p] for p in dict.fromkeys(p for name in groups for p in self._touches[name]))


def summed_loss(outputs: Any, labels: Tensor) -> float:
    """Cross-entropy summed over the images of a batch, nats. Raises DataError for outputs that are no logits of these labels."""
    logits = next(tensors_in(outputs), None)
    if logits is None or logits.ndim != 2 or len(logits) != len(labels) or int(labels.max()) >= logits.shape[1]:
        shape = None if logits is None else tuple(logits.shape)
        raise DataError(
            f"a loss needs a classifier with outputs (images, classes), and labels below the number of classes; this network returns "
            f"{shape} for {len(labels)} images with labels up to {int(labels.max())}."
        )
    return float(F.cross_entropy(logits.double(), labels, reduction="sum"))


def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy of a network over batches, nats; the network runs in the mode it is in."""
    loss, images = 0.0, 0
    with torch.no_grad():
        for inputs, labels in batches:
            loss += summed_loss(model(*inputs), labels)
            images += len(labels)
    return loss / images


class Prefix:
    """A forward on fixed inputs whose beginning is kept: everything before it first reads one of `tensors`.

    Those may change between two calls of `run`; all else must stay as it was. `kept_bytes` says what is held. The forward's Python
    runs every time; operations of the beginning give back what they gave before, or an empty tensor of that size where nothing later
    reads it. `outputs` are those of the one whole forward that the recording takes.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], tensors: Collection[Tensor]) -> None:
        self._model = model
        self._inputs = inputs
        storages = {t.untyped_storage().data_ptr() for t in tensors}
        one, all_of_them = single_sample(inputs), fresh(inputs)  # copied outside: these operations are not the network's
        with torch.no_grad():
            with _Scout(storages) as scout:
                needed = scout.needed(model(*one))
            self._recorder = _Recorder(scout.first, needed, scout.writes_later)
            with self._recorder:
                self.outputs = model(*all_of_them)
        if self._recorder.calls != scout.calls:  # the code depends on the batch: nothing can be kept
            self._recorder.first = 0
            self._recorder.kept.clear()

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept tensors."""
        return sum(t.numel() * t.element_size() for t in tensors_in(list(self._recorder.kept.values())))

    def run(self) -> Any:
        """The outputs, with the tensors as they are now."""
        inputs = fresh(self._inputs)
        with torch.no_grad(), _Replay(self._recorder):
            return self._model(*inputs)


class _Shape(NamedTuple):
    """What an operation returned where its values are not needed."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Numbered(Observer):
    """Calls `at(number, func, args, kwargs)` for every operation of a forward, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Number the operation and pass it on."""
        number, self.calls = self.calls, self.calls + 1
        return self.at(number, func, args, kwargs or {})

    def at(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operation gives."""
        return func(*args, **kwargs)


class _Scout(_Numbered):
    """Runs one image: the first operation that reads a storage, what is read behind it, and whether anything is written there."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()
        self._storages = storages
        self._makers: dict[int, int] = {}
        self._alive: list[Any] = []  # ids are only unique among living tensors
        self._read: set[int] = set()
        self.first = -1
        self.writes_later = False

    def at(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note who made what, and who reads it."""
        given = list(tensors_in([args, kwargs]))
        if self.first < 0 and any(t.untyped_storage().data_ptr() in self._storages for t in given):
            self.first = number
        if self.first >= 0:
            self._read |= {id(t) for t in given}
            self.writes_later |= bool(func._schema.is_mutable)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self._alive.append(out)
        for tensor in tensors_in(out):
            self._makers.setdefault(id(tensor), number)
        return out

    def needed(self, outputs: Any) -> set[int]:
        """The operations of the beginning whose results are read behind it or leave the network."""
        read = self._read | {id(t) for t in tensors_in(outputs)}
        return {number for tensor, number in self._makers.items() if tensor in read}


class _Recorder(_Numbered):
    """Runs the real inputs and keeps what the scout found to be needed."""

    def __init__(self, first: int, needed: set[int], copies: bool) -> None:
        super().__init__()
        self.first = first
        self.copies = copies
        self.kept: dict[int, Any] = {}
        self.shapes: dict[int, Any] = {}
        self._needed = needed

    def at(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the result or its shape; at the first operation that changes, keep the values as they are there."""
        if number == self.first and self.copies:
            self.kept = {n: _copied(out) for n, out in self.kept.items()}
        out = func(*args, **kwargs)
        if number < self.first:
            if number in self._needed:
                self.kept[number] = out
            else:
                self.shapes[number] = tree_map(_shape, out)
        return out


class _Replay(_Numbered):
    """Gives the kept beginning, computes the rest."""

    def __init__(self, recorded: _Recorder) -> None:
        super().__init__()
        self._recorded = recorded

    def at(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What was kept, or the operation itself."""
        recorded = self._recorded
        if number >= recorded.first:
            return func(*args, **kwargs)
        if number in recorded.kept:
            return _copied(recorded.kept[number]) if recorded.copies else _aliased(recorded.kept[number])
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            return args[0]  # written in place: what is kept of it has its last value
        return tree_map(_empty, recorded.shapes[number], is_leaf=lambda s: isinstance(s, _Shape))


def _copied(value: Any) -> Any:
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, value)


def _aliased(value: Any) -> Any:
    """The same memory in new tensors: torch refuses to hand out one tensor as a view twice."""
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, value)


def _shape(value: Any) -> Any:
    return _Shape(tuple(value.shape), value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value


def _empty(value: Any) -> Any:
    if not isinstance(value, _Shape):
        return value
    return torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=value.device)
