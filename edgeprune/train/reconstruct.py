"""Recovery without training or labels: the weights that remain are refitted so that layers compute what they computed before.

Every conv and linear behind the first cut is fitted by ridge regression to the dense network's output of the same layer on
calibration images, in the order in which they run, each on inputs that the already refitted network gives it. One run of the dense
network records its outputs at random positions, one run of the slim network stops at each layer, solves, and goes on with the new
weights: two forward passes in all. A layer that writes into a residual sum is fitted to what the sum lacks, so errors of earlier
blocks are mended by later ones. What the fit cannot give back to a weight (the intercept) goes into the layer's bias or into the
running mean of the batch norm behind it. Of a depthwise conv the scale of each channel is fitted; transposed convs stay as they are.
Where a ReLU follows, a value that should be negative may be any negative value: the fit is repeated with such targets moved to where
the layer already is, with the moments in hand (each round lowers the convex error that forgives what the ReLU cuts off).
No BN recalibration after it: a least-squares fit that explains a share R² of a channel's variance has that share of its variance, and
statistics of the dense network pass it on as it is. Statistics of the fit's own would stretch it by 1 / R, noise included, which takes
the error from 1 - R² to 2 (1 - R) of the variance and unbalances every residual sum it goes into.
More and other images were tried: 4,096, half of them mixed with another one, come closer to the dense network on distorted training
images, but not on new ones (ResNet-56 at -50% 91.56 against 91.58% right, at -64% 88.37 against 88.75, 10,000 test images).
Source: reconstruction by least squares after He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.data import Augment, Split
from edgeprune.errors import DataError
from edgeprune.graph import ChannelGraph, Op
from edgeprune.graph.running import Observer, evaluating, tensors_in
from edgeprune.graph.slim import named_tensors, recall, removed_positions
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from edgeprune.train import Progress, silent
from edgeprune.train.moments import Moments, conv_patches, sampled_places

ROWS = 49_152  # positions of maps, over all images, that a layer is fitted on: the more images, the fewer in each
LEAST_POSITIONS = 12
RECTIFY_ROUNDS = 3
PATCH_BYTES = 256 << 20
KEPT_BYTES = 512 << 20
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
    ridge: float = 1e-3,
    progress: Progress = silent,
) -> nn.Module:
    """A copy of `small` whose convs and linears were refitted to the dense network's outputs; the inputs are untouched.

    Needs images only, no labels; `augment` as the network's own training had it makes them more like new ones. `ridge` pulls towards
    the present weights, as a share of the mean variance of the inputs. At most as many images as their feature maps fit into 2 GiB, and
    as many positions as 640 MiB hold of the dense network's outputs.
    Raises DataError when there are none.
    """
    batch = _batch(split, min(images, _affordable(graph)), augment)
    if graph.exported is not None:  # the slim network runs the exported operations, so the dense one must too
        dense = recall(graph, dense)
        graph = trace(dense, batch[:1])
    positions = max(LEAST_POSITIONS, ROWS // len(batch))
    targets = _targets(graph, plan, positions)
    recorded = 4 * len(batch) * sum(len(t.kept) * len(t.places) for t in targets.values())
    if recorded > RECORDED_BYTES:
        targets = _targets(graph, plan, max(LEAST_POSITIONS, positions * RECORDED_BYTES // recorded))
    if not targets:
        return copy.deepcopy(small)
    fitted = copy.deepcopy(small)
    recorder = _Recorder(targets)
    with _frozen(dense), recorder:
        for part in batch.split(split.at_once(128)):
            recorder.calls = 0
            dense(part)
    with _frozen(fitted), _Refitter(targets, recorder, dict(named_tensors(fitted)), ridge, progress):
        fitted(batch)
    return fitted


@dataclass(frozen=True, eq=False)
class _Target:
    """One layer to refit: its operation, the outputs that stay, the batch norm behind it, the call whose result is added to it.

    `rectified`: what comes of that goes through a ReLU and nowhere else. `scaled`: a depthwise conv, of which only the scale of each
    channel is refitted: it mixes no channels, so what it lost is not in its inputs.
    """

    op: Op
    kept: Tensor
    norm: Op | None
    places: Tensor
    beside: int | None
    rectified: bool
    scaled: bool


def _targets(graph: ChannelGraph, plan: Plan, positions: int) -> dict[int, _Target]:
    """By call number, every conv and linear from the first one on that lost inputs; fitted at so many positions of each image's map."""
    gone = removed_positions(graph, plan)
    norms = {op.inputs[0]: op for op in graph.ops if op.kind == "norm" and op.inputs and op.weight}
    seen: set[str] = set()
    targets: dict[int, _Target] = {}
    for op in graph.ops:
        if op.kind not in ("conv", "linear") or op.weight is None or op.weight in seen:
            continue
        seen.add(op.weight)
        shape = graph.shapes[op.weight]
        if (not targets and (op.weight, 1) not in gone) or op.name == "bmm":
            continue
        if op.kind == "conv" and graph.activations[op.output].shape[1] != shape[0]:  # transposed
            continue
        lost = gone.get((op.weight, 0), np.zeros(shape[0], dtype=bool))
        norm = norms.get(op.output)
        norm = norm if norm and _prefix(norm) + "running_mean" in graph.shapes else None
        spatial = int(np.prod(graph.activations[op.output].shape[2:])) if op.kind == "conv" else 1
        places = sampled_places([spatial], positions, op.call)
        kept = torch.from_numpy(np.flatnonzero(~lost))
        scaled = op.groups > 1 and shape[1] == 1
        targets[op.call] = _Target(op, kept, norm, places, _beside(graph, op), _rectified(graph, op), scaled)
    return targets


def _prefix(norm: Op) -> str:
    return (norm.weight or "").removesuffix("weight")


def _rectified(graph: ChannelGraph, op: Op) -> bool:
    """Whether a layer's result goes, through its norm and a sum at most, into a ReLU and nowhere else."""
    number = op.output
    for kind in ("norm", "add"):
        readers = [o for o in graph.ops if number in o.inputs]
        if len(readers) == 1 and readers[0].kind == kind:
            number = readers[0].output
    readers = [o for o in graph.ops if number in o.inputs]
    return len(readers) == 1 and readers[0].name == "relu" and number not in graph.output_activations


def _beside(graph: ChannelGraph, op: Op) -> int | None:
    """The call that made the other operand of the residual sum this layer writes into (through its norm), if it ran before."""
    outputs = {op.output, *(n.output for n in graph.ops if n.kind == "norm" and n.inputs and n.inputs[0] == op.output)}
    for add in graph.ops:
        if add.kind == "add" and len(add.inputs) == 2 and outputs & set(add.inputs):
            other = next((a for a in add.inputs if a not in outputs), None)
            made = next((o.call for o in reversed(graph.ops) if o.output == other and o.call < op.call), None)
            same = other is not None and graph.activations[other].shape == graph.activations[op.output].shape
            return made if same else None
    return None


def _affordable(graph: ChannelGraph) -> int:
    """Images whose feature maps fit into the memory bound: a handful of the largest ones are alive at once."""
    largest = max(int(np.prod(a.shape)) for a in graph.activations)
    return max(32, MEMORY_BYTES // (4 * 6 * largest))


def _batch(split: Split, images: int, augment: Augment | None) -> Tensor:
    if not len(split):
        raise DataError("reconstruction needs calibration images: give data with a training part.")
    return torch.cat([x for x, _ in split.batches(128, shuffle_seed=0, limit=images, augment=augment)])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    with torch.no_grad(), evaluating(model):
        yield


class _Recorder(Observer):
    """Keeps the outputs of the target layers at their sampled places."""

    def __init__(self, targets: Mapping[int, _Target]) -> None:
        super().__init__()
        self.calls = 0
        self._wanted: dict[int, list[tuple[str, _Target]]] = {}
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
        if self.calls in self._norms:
            self.eps[self.calls] = float(args[-1])
        self.calls += 1
        return out

    def outputs(self) -> dict[tuple[str, int], Tensor]:
        """By role ("output", "beside") and call number of the layer, (images, outputs that stay, places)."""
        return {key: torch.cat(self._found.pop(key)) for key in list(self._found)}


def _at_places(result: Any, target: _Target) -> Tensor:
    out = next(tensors_in(result))  # a batch norm gives its statistics too
    return out.flatten(2)[:, :, target.places] if target.op.kind == "conv" else out[:, :, None]


class _Refitter(Observer):
    """Before a target layer runs, its weights are replaced by those that fit the recorded outputs best."""

    def __init__(
        self,
        targets: Mapping[int, _Target],
        recorder: _Recorder,
        tensors: Mapping[str, Tensor],
        ridge: float,
        progress: Progress,
    ) -> None:
        super().__init__()
        self._targets, self._wanted, self._eps, self._tensors = targets, recorder.outputs(), recorder.eps, tensors
        self._ridge, self._progress = ridge, progress
        self._calls = self._done = 0
        self._beside: dict[int, list[_Target]] = {}
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

    def _refit(self, target: _Target, args: tuple[Any, ...]) -> None:
        if target.op.kind == "conv" and args[6]:  # a transposed conv, whose weight has its inputs first, stays as it is
            return
        wanted, beside = self._wanted.pop(("output", target.op.call)), None
        affine = self._affine(target)
        if target.beside is not None:
            beside = self._sums.pop(target.op.call)
            lacking = self._wanted.pop(("beside", target.op.call)) - beside
            wanted = wanted + lacking * affine.inverse[:, None]
        weight = self._tensors[target.op.weight or ""]
        bias = args[2] if target.op.kind == "conv" else (args[0] if target.op.name == "addmm" else None)
        mean = self._tensors[_prefix(target.norm) + "running_mean"] if target.norm and bias is None else None
        present = _present(target, weight)
        fit = _Fit(present, self._ridge, free=bias is not None or mean is not None)
        for x, y in _chunks(target, args, _rows(wanted)):
            fit.add(x, y)
        fit.solve()
        if target.rectified and len(present) == 1 and fit.free:
            fit.rectify(affine, None if beside is None else _rows(beside))
        weight.copy_(weight * fit.weight.reshape(-1, *[1] * (weight.ndim - 1)) if target.scaled else fit.weight.reshape(weight.shape))
        if bias is not None:
            bias.copy_(fit.intercept.reshape(-1))
        elif mean is not None:
            mean.sub_(fit.intercept.reshape(-1).to(mean.dtype))

    def _affine(self, target: _Target) -> _Affine:
        """What the norm behind a layer does to its outputs."""
        if target.norm is None:
            ones = torch.ones(len(target.kept))
            return _Affine(ones, torch.zeros_like(ones), ones)
        name = _prefix(target.norm)
        scale = self._tensors[name + "weight"]
        spread = (self._tensors[name + "running_var"] + self._eps[target.norm.call]).sqrt()
        gain = scale / spread
        shift = self._tensors[name + "bias"] - self._tensors[name + "running_mean"] * gain
        return _Affine(gain, shift, torch.where(scale.abs() > 1e-3, spread / scale, torch.zeros_like(scale)))


class _Affine(NamedTuple):
    """z = gain * y + shift, for each output; `inverse` is 1 / gain, or 0 where a norm hardly passes an output on."""

    gain: Tensor
    shift: Tensor
    inverse: Tensor


def _rows(values: Tensor) -> Tensor:
    """(images, outputs, places) -> (images * places, outputs)."""
    return values.movedim(1, 2).reshape(-1, values.shape[1])


def _present(target: _Target, weight: Tensor) -> Tensor:
    """The weights to refit, (groups, outputs, values): of a depthwise conv the factor of each channel, which is 1."""
    if target.scaled:
        return torch.ones(len(weight), 1, 1)
    groups = target.op.groups
    return weight.reshape(groups, len(weight) // groups, -1)


def _chunks(target: _Target, args: tuple[Any, ...], outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of inputs (rows, groups, values) and wanted outputs (rows, groups, outputs), a bounded number of images at a time."""
    if target.op.kind == "linear":
        x = args[-2]
        yield x[:, None], outputs[:, None]
        return
    x, weight = args[:2]
    if target.scaled:
        made = torch.cat([torch.ops.aten.convolution(part, weight, None, *args[3:]) for part in x.split(128)])
        yield _rows(_at_places(made, target))[:, :, None], outputs[:, :, None]
        return
    groups = target.op.groups
    spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], *_lists(args), strict=True)]
    places = len(target.places)
    step = max(1, PATCH_BYTES // (4 * places * x.shape[1] * weight.shape[2:].numel()))
    for start in range(0, len(x), step):
        patches = conv_patches(x[start : start + step], weight, args[3:6], spatial, target.places)
        rows = patches.reshape(patches.shape[0] * places, groups, -1)
        yield rows, outputs[start * places : start * places + len(rows)].reshape(len(rows), groups, -1)


def _lists(args: tuple[Any, ...]) -> list[list[int]]:
    """Stride, padding and dilation of a conv's arguments, one number for each spatial axis."""
    axes = args[0].ndim - 2
    return [list(v) * axes if len(v) == 1 else list(v) for v in args[3:6]]


class _Fit:
    """Ridge regression of a layer's wanted outputs on its inputs, pulled towards the weights it has; one for each conv group.

    `free`: the intercept may be anything, else it is 0. After `solve`: `weight` (groups, outputs, values), `intercept` (groups, outputs).
    """

    def __init__(self, present: Tensor, ridge: float, *, free: bool) -> None:
        self.free = free
        self.weight = present.double()
        self.intercept = torch.zeros(present.shape[:2], dtype=torch.float64)
        self._ridge = ridge
        self._moments = Moments(present.shape[0], present.shape[1] + present.shape[2])
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._bytes = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x (rows, groups, values), y (rows, groups, outputs); those of the first half gigabyte are kept to look at again."""
        self._moments.add(torch.cat([x, y], dim=2))
        if self._bytes < KEPT_BYTES:
            self._bytes += 4 * x.numel()
            self._seen.append((x, y))

    def solve(self) -> None:
        """The weights and the intercept that fit best."""
        second, mean = self._moments.covariance(), self._moments.mean()
        if not self.free:
            second = second + mean[:, :, None] * mean[:, None, :]
        values = self.weight.shape[2]
        xx, xy = second[:, :values, :values], second[:, :values, values:]
        pull = (self._ridge * xx.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12))[:, None, None]
        self._factor = torch.linalg.cholesky(xx + pull * torch.eye(values, dtype=torch.float64))
        self._mean = mean[:, None, :values]
        self.weight = torch.cholesky_solve(xy + pull * self.weight.transpose(1, 2), self._factor).transpose(1, 2)
        if self.free:
            self.intercept = mean[:, values:] - (self._mean @ self.weight.transpose(1, 2))[:, 0]

    def rectify(self, affine: _Affine, beside: Tensor | None) -> None:
        """Refit to what passes a ReLU behind z = gain * y + shift (+ beside, (rows, outputs)); layers without conv groups."""
        x, y = (torch.cat(parts)[:, 0] for parts in zip(*self._seen, strict=True))
        offset = affine.shift if beside is None else affine.shift + beside[: len(x)]
        wanted = y * affine.gain + offset
        for _ in range(RECTIFY_ROUNDS):
            present = (x @ self.weight[0].T.to(x.dtype) + self.intercept[0].to(x.dtype)) * affine.gain + offset
            rest = (torch.where(wanted > 0, wanted, present.clamp(max=0)) - present) * affine.inverse
            mean = rest.mean(dim=0).double()
            cross = (x.T @ rest).double() / len(x) - self._mean[0].T * mean
            step = torch.cholesky_solve(cross, self._factor[0])
            self.weight = self.weight + step.T
            self.intercept = self.intercept + mean - self._mean[0] @ step
