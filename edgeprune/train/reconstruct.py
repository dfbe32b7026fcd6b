"""Recovery without training or labels: the weights that remain are refitted so that layers compute what they computed before.

Every conv and linear behind the first cut is fitted by ridge regression to the dense network's output of the same layer on calibration
images, in the order in which they run, each on inputs that the already refitted network gives it; images set aside decide how hard it is
pulled towards the weights that are there (train/ridge.py). One run of the dense network records its outputs at random positions, one run of
the slim network stops at each layer, solves, and goes on with the new weights: two forward passes in all. A layer that writes into a
residual sum is fitted to what the sum lacks, so errors of earlier blocks are mended by later ones. What the fit cannot give back to a
weight (the intercept) goes into the layer's bias or into the running mean of the batch norm behind it. Of a depthwise conv the scale of
each channel is fitted; transposed convs stay as they are.
Where a ReLU follows, a value that should be negative may be any negative value: the fit is repeated with such targets moved to where
the layer already is, with the moments in hand (each round lowers the convex error that forgives what the ReLU cuts off).
No BN recalibration after it: a least-squares fit that explains a share R² of a channel's variance has that share of its variance, and
statistics of the dense network pass it on as it is. Statistics of the fit's own would stretch it by 1 / R, noise included, which takes
the error from 1 - R² to 2 (1 - R) of the variance and unbalances every residual sum it goes into.
More and other images were tried: 4,096, half of them mixed with another one, come closer to the dense network on distorted training
images, but not on new ones (ResNet-56 at -50% 91.56 against 91.58% right, at -64% 88.37 against 88.75, 10,000 test images).
A classifier refitted to the dense network's probabilities comes much closer to them, and gives no more of its answers (held-out and foreign
images); the pull of `substitutes` changes nothing at this number of rows.
Source: reconstruction by least squares after He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.data import Augment, Split, at_once
from edgeprune.errors import DataError
from edgeprune.graph import ChannelGraph
from edgeprune.graph.running import Observer, contiguous, evaluating, fresh, tensors_in
from edgeprune.graph.slim import named_tensors, recall, removed_positions
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from edgeprune.train import Progress, silent
from edgeprune.train.moments import Moments, conv_patches
from edgeprune.train.ridge import RECTIFY_ROUNDS, RIDGES, Affine, Fit, substituted
from edgeprune.train.targets import Target, could_go, prefix, targets_of

ROWS = 49_152  # positions of maps, over all images, that a layer is fitted on: the more images, the fewer in each
LEAST_POSITIONS = 4
RIDGE = 1e-3  # of what stands in for inputs that go
BATCH = 128
MOMENTS = 2304  # values that an output reads: of layers that read more, moments would be large
PATCH_BYTES = 256 << 20
MEMORY_BYTES = 2 << 30
RECORDED_BYTES = 640 << 20


def reconstruct(
    small: nn.Module,
    dense: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    split: Split,
    *,
    images: int = 2048,
    augment: Augment | None = None,
    ridges: Sequence[float] = RIDGES,
    progress: Progress = silent,
) -> nn.Module:
    """A copy of `small` whose convs and linears were refitted to the dense network's outputs; the inputs are untouched.

    Needs images only, no labels; `augment` as the network's own training had it makes them more like new ones. `ridges`: pulls towards
    the present weights, as shares of the mean variance of a layer's inputs, of which each layer takes the one that serves unseen images
    best. At most as many images as their feature maps fit into 2 GiB, and as many positions as 640 MiB hold of the dense network's
    outputs. Raises DataError when there are none.
    """
    batch = _batch(split, min(images, _affordable(graph)), augment)
    return Recording.of(dense, graph, (batch,), plan=plan).refitted(small, plan, ridges=ridges, progress=progress)


@dataclass(frozen=True, eq=False)
class Recording:
    """What the dense network computes on some images, at the sampled places of its layers: any number of slim networks are fitted to it.

    `moments`: by call number, those of what a layer reads; empty unless they were asked for.
    """

    graph: ChannelGraph
    inputs: tuple[Tensor, ...]
    positions: int
    outputs: Mapping[tuple[str, int], Tensor]
    eps: Mapping[int, float]
    moments: Mapping[int, Moments]
    weights: Mapping[str, Tensor]

    @staticmethod
    def of(
        dense: nn.Module,
        graph: ChannelGraph,
        inputs: tuple[Tensor, ...],
        *,
        rows: int = ROWS,
        plan: Plan | None = None,
        substitutes: bool = False,
    ) -> Recording:
        """One run of the dense network; `inputs` are its forward's arguments.

        At most as many images and positions as `reconstruct` says. With `plan` it serves this plan alone, and takes less memory.
        `substitutes`: refits are pulled towards weights that the moments of what layers read give, instead of the present ones.
        """
        inputs = tuple(x[: _affordable(graph)].contiguous() for x in inputs)
        if graph.exported is not None:  # the slim network runs the exported operations, so the dense one must too
            dense = recall(graph, dense)
            graph = trace(dense, tuple(x[:1] for x in inputs))
        positions = max(LEAST_POSITIONS, rows // len(inputs[0]))
        gone = could_go(graph) if plan is None else removed_positions(graph, plan)
        targets = targets_of(graph, gone, positions)
        recorded = 4 * len(inputs[0]) * sum(len(t.kept) * len(t.places) for t in targets.values())
        if recorded > RECORDED_BYTES:
            positions = max(LEAST_POSITIONS, positions * RECORDED_BYTES // recorded)
            targets = targets_of(graph, gone, positions)
        together = at_once(BATCH, inputs[0].shape[2:])
        parts = list(zip(*(x.split(together) for x in inputs), strict=True)) if targets else []
        recorder = _Recorder(targets, substitutes=substitutes)
        with _frozen(dense), recorder:
            for part in parts:
                recorder.calls = 0
                dense(*part)
        weights = {name: t.detach() for name, t in named_tensors(dense)} if substitutes else {}
        return Recording(graph, inputs, positions, recorder.outputs(), recorder.eps, recorder.moments, weights)

    def refitted(
        self,
        small: nn.Module,
        plan: Plan,
        *,
        ridges: Sequence[float] = RIDGES,
        rectify_rounds: int = RECTIFY_ROUNDS,
        progress: Progress = silent,
    ) -> nn.Module:
        """A copy of the plan's slim network, refitted; see `reconstruct`."""
        fitted = copy.deepcopy(small)
        gone = removed_positions(self.graph, plan)
        if targets := targets_of(self.graph, gone, self.positions):
            inputs, tensors = fresh(self.inputs), dict(named_tensors(fitted))
            refitter = _Refitter(targets, self, tensors, ridges=ridges, rectify_rounds=rectify_rounds, progress=progress)
            with _frozen(fitted), refitter:
                fitted(*inputs)
        return fitted


def _affordable(graph: ChannelGraph) -> int:
    """Images whose feature maps fit into the memory bound: a handful of the largest ones are alive at once."""
    largest = max(int(np.prod(a.shape)) for a in graph.activations)
    return max(32, MEMORY_BYTES // (4 * 6 * largest))


def _batch(split: Split, images: int, augment: Augment | None) -> Tensor:
    if not len(split):
        raise DataError("reconstruction needs calibration images: give data with a training part.")
    return torch.cat([x for x, _ in split.batches(BATCH, shuffle_seed=0, limit=images, augment=augment)])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    with torch.no_grad(), evaluating(model), contiguous(model):
        yield


class _Recorder(Observer):
    """Keeps the outputs of the target layers at their sampled places, and the moments of what they read where these are asked for."""

    def __init__(self, targets: Mapping[int, Target], *, substitutes: bool) -> None:
        super().__init__()
        self.calls = 0
        self._targets = targets
        self.moments = {
            call: Moments(1, len(t.read)) for call, t in targets.items() if substitutes and t.read is not None and len(t.read) <= MOMENTS
        }
        self._wanted: dict[int, list[tuple[str, Target]]] = {}
        for target in targets.values():
            self._wanted.setdefault(target.op.call, []).append(("output", target))
            if target.beside is not None:
                self._wanted.setdefault(target.beside, []).append(("beside", target))
        self._norms = {target.norm.call for target in targets.values() if target.norm}
        self._found: dict[tuple[str, int], list[Tensor]] = {}
        self.eps: dict[int, float] = {}
        """By call number of a batch norm, what it adds to the variance (torch gives it last)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operation and look at its output."""
        out = func(*args, **(kwargs or {}))
        for role, target in self._wanted.get(self.calls, ()):
            self._found.setdefault((role, target.op.call), []).append(_at_places(out, target)[:, target.kept])
        if (moments := self.moments.get(self.calls)) is not None and not _transposed(self._targets[self.calls], args):
            for rows in _rows_read(self._targets[self.calls], args):
                moments.add(rows)
        if self.calls in self._norms:
            self.eps[self.calls] = float(args[-1])
        self.calls += 1
        return out

    def outputs(self) -> dict[tuple[str, int], Tensor]:
        """By role ("output", "beside") and call number of the layer, (images, outputs that stay, places)."""
        return {key: torch.cat(self._found.pop(key)) for key in list(self._found)}


def _transposed(target: Target, args: tuple[Any, ...]) -> bool:
    """Whether a conv's weight has its inputs first: it stays as it is."""
    return target.op.kind == "conv" and bool(args[6])


def _at_places(result: Any, target: Target) -> Tensor:
    out = next(tensors_in(result))  # a batch norm gives its statistics too
    return out.flatten(2)[:, :, target.places] if target.op.kind == "conv" else out[:, :, None]


class _Refitter(Observer):
    """Before a target layer runs, its weights are replaced by those that fit the recorded outputs best."""

    def __init__(
        self,
        targets: Mapping[int, Target],
        recording: Recording,
        tensors: Mapping[str, Tensor],
        *,
        ridges: Sequence[float],
        rectify_rounds: int,
        progress: Progress,
    ) -> None:
        super().__init__()
        self._targets, self._recording, self._tensors = targets, recording, tensors
        self._ridges, self._rectify_rounds, self._progress = ridges, rectify_rounds, progress
        self._calls = self._done = 0
        self._beside: dict[int, list[Target]] = {}
        for target in targets.values():
            if target.beside is not None:
                self._beside.setdefault(target.beside, []).append(target)
        self._sums: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Refit if this is a target, then run the operation."""
        call, self._calls = self._calls, self._calls + 1
        if (target := self._targets.get(call)) is not None:
            self._refit(target, args)
            self._done += 1
            self._progress("reconstructing layers", self._done, len(self._targets))
        out = func(*args, **(kwargs or {}))
        for waiting in self._beside.get(call, ()):
            self._sums[waiting.op.call] = _at_places(out, waiting)
        return out

    def _refit(self, target: Target, args: tuple[Any, ...]) -> None:
        if _transposed(target, args):
            return
        wanted, beside = self._wanted("output", target), None
        affine = self._affine(target)
        if target.beside is not None:
            beside = self._sums.pop(target.op.call)
            lacking = self._wanted("beside", target) - beside
            wanted = wanted + lacking * affine.inverse[:, None]
        weight = self._tensors[target.op.weight or ""]
        bias = args[2] if target.op.kind == "conv" else (args[0] if target.op.name == "addmm" else None)
        mean = self._tensors[prefix(target.norm) + "running_mean"] if target.norm and bias is None else None
        present = self._present(target, weight)
        gain = affine.gain.double().reshape(present.shape[:2])
        fit = Fit(present, self._ridges, gain, free=bias is not None or mean is not None)
        left, places = _rows(wanted), len(target.places) if target.op.kind == "conv" else 1
        for x in _rows_read(target, args):
            fit.add(x, left[: len(x)].reshape(len(x), x.shape[1], -1), places)
            left = left[len(x) :]
        fit.solve()
        if target.rectified and len(present) == 1 and fit.free:
            fit.rectify(affine, None if beside is None else _rows(beside), rounds=self._rectify_rounds)
        weight.copy_(weight * fit.weight.reshape(-1, *[1] * (weight.ndim - 1)) if target.scaled else fit.weight.reshape(weight.shape))
        if bias is not None:
            bias.copy_(fit.intercept.reshape(-1))
        elif mean is not None:
            mean.sub_(fit.intercept.reshape(-1).to(mean.dtype))

    def _wanted(self, role: str, target: Target) -> Tensor:
        """What the dense network computed, of the outputs that stay."""
        found = self._recording.outputs[role, target.op.call]
        return found if found.shape[1] == len(target.kept) else found[:, target.kept]

    def _present(self, target: Target, weight: Tensor) -> Tensor:
        """The weights to pull towards, (groups, outputs, values): of a depthwise conv the factor of each channel, which is 1."""
        if target.scaled:
            return torch.ones(len(weight), 1, 1)
        moments = self._recording.moments.get(target.op.call)
        if moments is None or target.read is None:
            groups = target.op.groups
            return weight.reshape(groups, len(weight) // groups, -1)
        dense = self._recording.weights[target.op.weight or ""][target.kept].flatten(1)
        return substituted(dense, moments.covariance()[0], target.read, RIDGE)[None]

    def _affine(self, target: Target) -> Affine:
        """What the norm behind a layer does to its outputs."""
        if target.norm is None:
            ones = torch.ones(len(target.kept))
            return Affine(ones, torch.zeros_like(ones), ones)
        name = prefix(target.norm)
        scale = self._tensors[name + "weight"]
        spread = (self._tensors[name + "running_var"] + self._recording.eps[target.norm.call]).sqrt()
        gain = scale / spread
        shift = self._tensors[name + "bias"] - self._tensors[name + "running_mean"] * gain
        return Affine(gain, shift, torch.where(scale.abs() > 1e-3, spread / scale, torch.zeros_like(scale)))


def _rows(values: Tensor) -> Tensor:
    """(images, outputs, places) -> (images * places, outputs)."""
    return values.movedim(1, 2).reshape(-1, values.shape[1])


def _rows_read(target: Target, args: tuple[Any, ...]) -> Iterator[Tensor]:
    """What a layer reads at its places, rows (rows, groups, values) in the order of images and places, a bounded number at a time."""
    if target.op.kind == "linear":
        yield args[-2][:, None]
        return
    x, weight = args[:2]
    if target.scaled:
        made = torch.cat([torch.ops.aten.convolution(part, weight, None, *args[3:]) for part in x.split(BATCH)])
        yield _rows(_at_places(made, target))[:, :, None]
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
