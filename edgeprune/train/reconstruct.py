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
Of two convs of which the second alone reads the first, the first is then fitted to what should come out behind the second, and the second
once more (train/pairs.py).
Of a residual branch that vanished as a whole the constant vanishes too, and with it an addition in the artifact, which takes longer than
its MACs say: the layers behind the sum make up for it (ResNet-56 with 14 of 27 branches gone: 93.8 instead of 94.05% of held training
images right, and 2.15 instead of 1.98 times as fast in ONNX Runtime). Where no layer is behind it, the constant is fitted to the mean of
what the branch gave, or of what the sum lacks.
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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.data import Augment, Split, at_once
from edgeprune.errors import DataError
from edgeprune.graph import ChannelGraph, Op
from edgeprune.graph.running import Observer, fresh, tensors_in
from edgeprune.graph.slim import named_tensors, recall, removed_positions, slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from edgeprune.train import Progress, silent
from edgeprune.train.moments import Moments
from edgeprune.train.pairs import Conv, Pair, pairs_of, step
from edgeprune.train.recording import BATCH, Recorder, at_places, by_row, frozen, rows_read, transposed
from edgeprune.train.ridge import RECTIFY_ROUNDS, RIDGES, Affine, Fit, substituted
from edgeprune.train.targets import Target, could_go, targets_of

ROWS = 49_152  # positions of maps, over all images, that a layer is fitted on: the more images, the fewer in each
LEAST_POSITIONS = 4
RIDGE = 1e-3  # of what stands in for inputs that go
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
    in_pairs: bool = True,
    progress: Progress = silent,
) -> nn.Module:
    """A copy of `small` whose convs and linears were refitted to the dense network's outputs; the inputs are untouched.

    Needs images only, no labels; `augment` as the network's own training had it makes them more like new ones. `ridges`: pulls towards
    the present weights, as shares of the mean variance of a layer's inputs, of which each layer takes the one that serves unseen images
    best. `in_pairs`: a conv that one other conv reads is also fitted to what comes out behind that one; twice the time. At most as many
    images as their feature maps fit into 2 GiB, and as many positions as 640 MiB hold of the dense network's outputs. Raises DataError
    when there are none.
    """
    batch = _batch(split, min(images, _affordable(graph)), augment)
    return Recording.of(dense, graph, (batch,), plan=plan, in_pairs=in_pairs).refitted(small, plan, ridges=ridges, progress=progress)


@dataclass(frozen=True, eq=False)
class Recording:
    """What the dense network computes on some images, at the sampled places of its layers: any number of slim networks are fitted to it.

    `moments`: by call number, those of what a layer reads; `ends`: by the call number of a pair's second layer, whole maps of what comes
    out behind it (train/pairs.py). Both are empty unless they were asked for.
    """

    dense: nn.Module
    graph: ChannelGraph
    inputs: tuple[Tensor, ...]
    positions: int
    outputs: Mapping[tuple[str, int], Tensor]
    eps: Mapping[int, float]
    moments: Mapping[int, Moments]
    weights: Mapping[str, Tensor]
    ends: Mapping[int, Tensor]

    @staticmethod
    def of(
        dense: nn.Module,
        graph: ChannelGraph,
        inputs: tuple[Tensor, ...],
        *,
        rows: int = ROWS,
        plan: Plan | None = None,
        substitutes: bool = False,
        in_pairs: bool = False,
    ) -> Recording:
        """One run of the dense network; `inputs` are its forward's arguments.

        At most as many images and positions as `reconstruct` says. With `plan` it serves this plan alone, and takes less memory.
        `substitutes`: refits are pulled towards weights that the moments of what layers read give, instead of the present ones.
        `in_pairs`: a conv that one other conv reads is also fitted to what comes out behind that one.
        """
        inputs = tuple(x[: _affordable(graph)].contiguous() for x in inputs)
        if graph.exported is not None:  # the slim network runs the exported operations, so the dense one must too
            dense = recall(graph, dense)
            graph = trace(dense, tuple(x[:1] for x in inputs))
        positions = max(LEAST_POSITIONS, rows // len(inputs[0]))
        gone, empty = (could_go(graph), ()) if plan is None else (removed_positions(graph, plan), plan.empty)
        targets = targets_of(graph, gone, positions, empty)
        recorded = 4 * len(inputs[0]) * sum(len(t.kept) * len(t.places) for t in targets.values())
        if recorded > RECORDED_BYTES:
            positions = max(LEAST_POSITIONS, positions * RECORDED_BYTES // recorded)
            targets = targets_of(graph, gone, positions, empty)
        together = at_once(BATCH, inputs[0].shape[2:])
        parts = list(zip(*(x.split(together) for x in inputs), strict=True)) if targets else []
        pairs = pairs_of(graph, targets, len(inputs[0])) if in_pairs else {}
        recorder = Recorder(targets, pairs, substitutes=substitutes)
        with frozen(dense), recorder:
            for part in parts:
                recorder.calls = 0
                dense(*part)
        weights = {name: t.detach() for name, t in named_tensors(dense)} if substitutes else {}
        return Recording(dense, graph, inputs, positions, recorder.outputs(), recorder.eps, recorder.moments, weights, recorder.ends())

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
        if targets := targets_of(self.graph, gone, self.positions, plan.empty):
            constants = {target.op.weight for target in targets.values() if target.constant}
            runs = self._with_branches(fitted, plan, constants) if plan.empty else fitted
            inputs, tensors = fresh(self.inputs), dict(named_tensors(runs))
            pairs = {call: pair for call, pair in pairs_of(self.graph, targets, len(inputs[0])).items() if call in self.ends}
            refitter = _Refitter(targets, pairs, self, tensors, ridges=ridges, rectify_rounds=rectify_rounds, progress=progress)
            with frozen(runs), refitter:
                runs(*inputs)
            if runs is not fitted:
                _copy_into(fitted, tensors)
        return fitted

    def _with_branches(self, small: nn.Module, plan: Plan, constants: Collection[str | None]) -> nn.Module:
        """The slim network with one channel in each branch that vanished, without effect: it runs the operations of the dense one.

        The branches give nothing, except those whose last layer is among `constants`.
        """
        one_each = Plan({name: kept or (0,) for name, kept in plan.keep.items()})
        whole = slim(self.dense, self.graph, one_each)
        _copy_into(whole, dict(named_tensors(small)))
        tensors = dict(named_tensors(whole))
        for name in plan.empty:
            for end in self.graph.branches[name].ends:
                for held in (end.weight, *(() if end.weight in constants else end.shifts)):
                    tensors[held].detach().zero_()
        return whole


def _copy_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module's tensors the values of those of the same name."""
    with torch.no_grad():
        for name, tensor in named_tensors(module):
            if name in tensors:
                tensor.copy_(tensors[name])


def _affordable(graph: ChannelGraph) -> int:
    """Images whose feature maps fit into the memory bound: a handful of the largest ones are alive at once."""
    largest = max(int(np.prod(a.shape)) for a in graph.activations)
    return max(32, MEMORY_BYTES // (4 * 6 * largest))


def _batch(split: Split, images: int, augment: Augment | None) -> Tensor:
    if not len(split):
        raise DataError("reconstruction needs calibration images: give data with a training part.")
    return torch.cat([x for x, _ in split.batches(BATCH, shuffle_seed=0, limit=images, augment=augment)])


class _Refitter(Observer):
    """Before a target layer runs, its weights are replaced by those that fit the recorded outputs best."""

    def __init__(
        self,
        targets: Mapping[int, Target],
        pairs: Mapping[int, Pair],
        recording: Recording,
        tensors: Mapping[str, Tensor],
        *,
        ridges: Sequence[float],
        rectify_rounds: int,
        progress: Progress,
    ) -> None:
        super().__init__()
        self._targets, self._pairs, self._recording, self._tensors = targets, pairs, recording, tensors
        self._ridges, self._rectify_rounds, self._progress = ridges, rectify_rounds, progress
        self._calls = self._done = 0
        self._beside: dict[int, list[Target]] = {}
        for target in targets.values():
            if target.beside is not None:
                self._beside.setdefault(target.beside, []).append(target)
        self._sums: dict[int, Tensor] = {}
        self._whole_sums: dict[int, Tensor] = {}
        self._firsts = {pair.first.call for pair in pairs.values()}
        self._read: dict[int, tuple[tuple[Any, ...], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Refit if this is a target, then run the operation."""
        call, self._calls = self._calls, self._calls + 1
        if (target := self._targets.get(call)) is not None:
            pair = self._pairs.get(call)
            if pair is None:
                self._refit(target, args)
            else:
                args = self._refit_both(pair, args)
            self._sums.pop(call, None)
            self._done += 1
            self._progress("reconstructing layers", self._done, len(self._targets))
        if call in self._firsts:
            self._read[call] = args, args[0]._version
        out = func(*args, **(kwargs or {}))
        for waiting in self._beside.get(call, ()):
            self._sums[waiting.op.call] = at_places(out, waiting)
            if waiting.op.call in self._pairs:
                self._whole_sums[waiting.op.call] = next(tensors_in(out))[: len(self._recording.ends[waiting.op.call])].clone()
        return out

    def _refit(self, target: Target, args: tuple[Any, ...]) -> None:
        if transposed(target, args):
            return
        wanted, beside = _staying(self._recording.outputs["output", target.op.call], target), None
        affine = self._affine(target.norm, len(target.kept))
        if target.beside is not None:
            beside = self._sums[target.op.call]
            lacking = _staying(self._recording.outputs["beside", target.op.call], target) - beside
            wanted = wanted + lacking * affine.inverse[:, None]
        weight = self._tensors[target.op.weight or ""]
        bias, mean = self._free(target, args)
        present = self._present(target, weight)
        if target.constant:
            present = present[..., :0]
        gain = affine.gain.double().reshape(present.shape[:2])
        fit = Fit(present, self._ridges, gain, free=bias is not None or mean is not None)
        left, places = by_row(wanted), len(target.places) if target.op.kind == "conv" else 1
        for x in rows_read(target, args):
            fit.add(x[..., : present.shape[2]], left[: len(x)].reshape(len(x), x.shape[1], -1), places)
            left = left[len(x) :]
        fit.solve()
        if target.rectified and len(present) == 1 and fit.free:
            fit.rectify(affine, None if beside is None else by_row(beside), rounds=self._rectify_rounds)
        if not target.constant:
            weight.copy_(weight * fit.weight.reshape(-1, *[1] * (weight.ndim - 1)) if target.scaled else fit.weight.reshape(weight.shape))
        if bias is not None:
            bias.copy_(fit.intercept.reshape(-1))
        elif mean is not None:
            mean.sub_(fit.intercept.reshape(-1).to(mean.dtype))

    def _free(self, target: Target, args: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None]:
        """The bias of a layer or, where it has none, the running mean of the norm behind it: what takes up its intercept."""
        bias = args[2] if target.op.kind == "conv" else (args[0] if target.op.name == "addmm" else None)
        return bias, self._tensors[target.norm.stem + "running_mean"] if target.norm and bias is None else None

    def _refit_both(self, pair: Pair, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Refit the second layer, then the first towards what comes out behind the second, then the second again; what that one reads."""
        second = pair.second
        tensors = [t for t in (self._tensors[second.op.weight or ""], *self._free(second, args)) if t is not None]
        before = [t.clone() for t in tensors]
        self._refit(second, args)
        if (hidden := self._refit_first(pair, args)) is not None:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            args = (hidden, *args[1:])
            self._refit(second, args)
        return args

    def _refit_first(self, pair: Pair, args: tuple[Any, ...]) -> Tensor | None:
        """What the second layer reads after a step of the first one; None where none helps."""
        at_first, version = self._read.pop(pair.first.call)
        x, second = at_first[0], pair.second
        beside = self._whole_sums.pop(second.op.call, None)
        bias, norm = at_first[2], pair.first_norm
        if x._version != version or (bias is None and norm is None):  # written over since; nothing to take up a shift
            return None
        first = self._folded(at_first, norm)
        wanted = _staying(self._recording.ends[second.op.call], second)
        summed = beside if pair.end.kind == "add" else None
        moved = step(first, self._folded(args, second.norm), x[: len(wanted)], wanted, summed, rectified=second.rectified)
        if moved is None:
            return None
        inverse = self._affine(norm, len(first.shift)).inverse
        at_first[1].add_((moved.weight - first.weight) * inverse.view(-1, *[1] * (x.ndim - 1)))
        shift = (moved.shift - first.shift) * inverse
        if bias is not None:
            bias.add_(shift)
        elif norm is not None:
            self._tensors[norm.stem + "running_mean"].sub_(shift)
        return self._folded(at_first, norm)(x).clamp(min=0)

    def _folded(self, args: tuple[Any, ...], norm: Op | None) -> Conv:
        """A conv of these arguments with its norm."""
        affine = self._affine(norm, len(args[1]))
        shift = affine.shift if args[2] is None else affine.shift + args[2] * affine.gain
        return Conv(args[1] * affine.gain.view(-1, *[1] * (args[1].ndim - 1)), shift, args[3:])

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

    def _affine(self, norm: Op | None, outputs: int) -> Affine:
        """What the norm behind a layer does to its outputs."""
        if norm is None:
            ones = torch.ones(outputs)
            return Affine(ones, torch.zeros_like(ones), ones)
        name = norm.stem
        scale = self._tensors[name + "weight"]
        spread = (self._tensors[name + "running_var"] + self._recording.eps[norm.call]).sqrt()
        gain = scale / spread
        shift = self._tensors[name + "bias"] - self._tensors[name + "running_mean"] * gain
        return Affine(gain, shift, torch.where(scale.abs() > 1e-3, spread / scale, torch.zeros_like(scale)))


def _staying(found: Tensor, target: Target) -> Tensor:
    """What the dense network computed, of the outputs that stay."""
    return found if found.shape[1] == len(target.kept) else found[:, target.kept]
