"""What the layers of a network read and give while it runs: looked at by reconstruction at the sampled places of each layer's map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.graph.running import Observer, contiguous, evaluating, tensors_in
from edgeprune.train.moments import Moments, conv_patches
from edgeprune.train.pairs import Pair
from edgeprune.train.targets import Target

BATCH = 128
MOMENTS = 2304  # values that an output reads: of layers that read more, moments would be large
PATCH_BYTES = 256 << 20


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, contiguous weights."""
    with torch.no_grad(), evaluating(model), contiguous(model):
        yield


class Recorder(Observer):
    """Keeps the outputs of the target layers at their sampled places, and the moments of what they read where these are asked for."""

    def __init__(self, targets: Mapping[int, Target], pairs: Mapping[int, Pair], *, substitutes: bool) -> None:
        super().__init__()
        self.calls = 0
        self._targets = targets
        self._pairs = {pair.end.call: pair for pair in pairs.values()}
        self._ends: dict[int, list[Tensor]] = {call: [] for call in pairs}
        self.moments = {
            call: Moments(1, len(t.read)) for call, t in targets.items() if substitutes and t.read is not None and len(t.read) <= MOMENTS
        }
        self._wanted: dict[int, list[tuple[str, Target]]] = {}
        for target in targets.values():
            self._wanted.setdefault(target.op.call, []).append(("output", target))
            if target.beside is not None:
                self._wanted.setdefault(target.beside, []).append(("beside", target))
        self._norms = {norm.call for norm in (*(t.norm for t in targets.values()), *(p.first_norm for p in pairs.values())) if norm}
        self._found: dict[tuple[str, int], list[Tensor]] = {}
        self.eps: dict[int, float] = {}
        """By call number of a batch norm, what it adds to the variance (torch gives it last)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operation and look at its output."""
        out = func(*args, **(kwargs or {}))
        for role, target in self._wanted.get(self.calls, ()):
            self._found.setdefault((role, target.op.call), []).append(at_places(out, target)[:, target.kept])
        if (pair := self._pairs.get(self.calls)) is not None:
            ends = self._ends[pair.second.op.call]
            ends.append(next(tensors_in(out))[: pair.images - sum(map(len, ends)), pair.second.kept].clone())
        if (moments := self.moments.get(self.calls)) is not None and not transposed(self._targets[self.calls], args):
            for rows in rows_read(self._targets[self.calls], args):
                moments.add(rows)
        if self.calls in self._norms:
            self.eps[self.calls] = float(args[-1])
        self.calls += 1
        return out

    def outputs(self) -> dict[tuple[str, int], Tensor]:
        """By role ("output", "beside") and call number of the layer, (images, outputs that stay, places)."""
        return {key: torch.cat(self._found.pop(key)) for key in list(self._found)}

    def ends(self) -> dict[int, Tensor]:
        """By call number of a pair's second layer, (images, outputs that stay, *size)."""
        return {call: torch.cat(self._ends.pop(call)) for call in list(self._ends)}


def transposed(target: Target, args: tuple[Any, ...]) -> bool:
    """Whether a conv's weight has its inputs first: it stays as it is."""
    return target.op.kind == "conv" and bool(args[6])


def at_places(result: Any, target: Target) -> Tensor:
    """An operation's output at the target's places, (images, channels, places)."""
    out = next(tensors_in(result))  # a batch norm gives its statistics too
    return out.flatten(2)[:, :, target.places] if target.op.kind == "conv" else out[:, :, None]


def by_row(values: Tensor) -> Tensor:
    """(images, outputs, places) -> (images * places, outputs)."""
    return values.movedim(1, 2).reshape(-1, values.shape[1])


def rows_read(target: Target, args: tuple[Any, ...]) -> Iterator[Tensor]:
    """What a layer reads at its places, rows (rows, groups, values) in the order of images and places, a bounded number at a time."""
    if target.op.kind == "linear":
        yield args[-2][:, None]
        return
    x, weight = args[:2]
    if target.scaled:
        made = torch.cat([torch.ops.aten.convolution(part, weight, None, *args[3:]) for part in x.split(BATCH)])
        yield by_row(at_places(made, target))[:, :, None]
        return
    spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], *_lists(args), strict=True)]
    places = len(target.places)
    step = max(1, PATCH_BYTES // (4 * places * x.shape[1] * weight.shape[2:].numel()))
    for part in x.split(step):
        patches = conv_patches(part, weight, args[3:6], spatial, target.places)
        yield patches.reshape(patches.shape[0] * places, target.op.groups, -1)


def _lists(args: tuple[Any, ...]) -> list[list[int]]:
    """Stride, padding and dilation of a conv's arguments, one number for each spatial axis."""
    axes = args[0].ndim - 2
    return [list(v) * axes if len(v) == 1 else list(v) for v in args[3:6]]
