"""How good a network is with channels removed, before any training: what searches judge their candidates by.

A candidate is recovered on some images, it may train a few steps on them, and its loss is taken on others, which it never sees otherwise.
It is recovered as the product will recover it. `reconstruct` refits its layers (train/reconstruct.py) in a cheap form: one run of the dense
network serves all candidates, few positions are fitted, with one look behind each ReLU, and because so few would not do for wide layers,
fits are pulled towards what the moments of the dense network's own inputs give. `bn` recalibrates batch norms, as searches in the
literature do; it misleads where networks will be reconstructed (docs/allocators.md). `none` leaves it as it is.
The loss is the cross-entropy with the labels, or the divergence from the dense network's answers (outputs that are no logits: the squared
error, as a share of their variance): where the dense network was trained on all images at hand, cross-entropy hardly tells good candidates
apart, and the divergence does.
Candidates are slimmed, because small networks are fast; `masked` judges them by the masked dense network instead, whose loss is the
same, and which is all there is for recalibrated exported networks, whose batch norms are fixed operations once slimmed.
Recalibration before judging: Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", ECCV 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.criteria.probe import Probe
from edgeprune.errors import DataError, UsageError
from edgeprune.graph import ChannelGraph
from edgeprune.graph.masked import Masked
from edgeprune.graph.running import evaluating, fresh, in_format, layout_for, tensors_in
from edgeprune.graph.slim import slim
from edgeprune.plan import Plan
from edgeprune.train.evaluate import logits_of, refit_norms, settled
from edgeprune.train.reconstruct import Recording

LOSSES = ("divergence", "cross_entropy")
RECOVERIES = ("reconstruct", "bn", "none")
ROWS = 4096  # positions of maps, over all images, that each layer is refitted on
PULL = 128  # as many rows' worth are fits pulled towards the dense network's weights
BATCH = 64  # the fastest for small networks on one thread
TRAINING_BATCH = 128
TRAINING: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}  # the settings of LeGR's search

Images = tuple[Tensor, ...]  # the forward's arguments, (n, …) each
Pairs = tuple[Images, Tensor]  # with labels (n,), -1 for none


@dataclass(frozen=True)
class Verdict:
    """Mean loss over the images, nats, and the share of them classified right (NaN without labels)."""

    loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Judge:
    """The dense network, the images, and what is done with them; callable: a plan in, its Verdict out. Runs on one thread.

    `held` judge, on `spare` candidates are recovered and trained. `rows`: positions that a layer is refitted on. A verdict depends on the
    plan alone.
    """

    model: nn.Module
    graph: ChannelGraph
    held: Pairs
    spare: Pairs
    loss: str = "divergence"
    steps: int = 0
    recover: str = "reconstruct"
    rows: int = ROWS
    masked: bool = False

    def __call__(self, plan: Plan) -> Verdict:
        """How good the network is under the plan; an infinite loss where its outputs are not finite."""
        with _one_thread():
            network = self._network(plan)
            if self.steps:
                self._train(network)
            if self.recover == "bn" or (self.steps and self.recover != "none"):
                refit_norms(network, self._batches(self.spare[0], 2 * BATCH))
            return self._verdict(network)

    @cached_property
    def dense(self) -> Verdict:
        """How good the dense network is as it stands; its divergence is 0."""
        with _one_thread(), evaluating(self.model):
            return self._verdict(self.model)

    def _network(self, plan: Plan) -> nn.Module:
        if self.masked or (self.graph.exported is not None and self.recover != "reconstruct"):
            self._masked.reset()
            return self._masked.set(self._masked.keep_of(plan))
        network = settled(slim(self.model, self.graph, plan))
        if self.recover == "reconstruct":
            network = self._recording.refitted(network, plan, ridges=(PULL / self.rows,), rectify_rounds=1)
        return in_format(network, self._format)

    @cached_property
    def _recording(self) -> Recording:
        return Recording.of(self.model, self.graph, self.spare[0], rows=self.rows, substitutes=True)

    @cached_property
    def _masked(self) -> Masked:
        return Masked(self.model, self.graph, memory_format=self._format)

    @cached_property
    def _format(self) -> torch.memory_format:
        """The faster one in which the masked network runs, and so every candidate."""
        return layout_for(Masked(self.model, self.graph).model, *(x[:2] for x in self.held[0]))

    def _batches(self, images: Images, size: int) -> Iterator[Images]:
        """The images in the format that is fastest here, `size` at a time."""
        return (fresh(part, self._format) for part in zip(*(x.split(size) for x in images), strict=True))

    def _outputs(self, network: nn.Module) -> tuple[Tensor, ...]:
        """What the network returns for all held images, float64."""
        with torch.no_grad():
            found = [tuple(tensors_in(network(*part))) for part in self._batches(self.held[0], BATCH)]
        return tuple(torch.cat([t.double() for t in parts]) for parts in zip(*found, strict=True))

    @cached_property
    def _answers(self) -> tuple[Tensor, ...]:
        """What the dense network returns for the held images."""
        with evaluating(self.model):
            return self._outputs(self.model)

    def _verdict(self, network: nn.Module) -> Verdict:
        outputs, labels = self._outputs(network), self.held[1]
        classifies = outputs[0].ndim == 2 and int(labels.min()) >= 0
        right = float((outputs[0].argmax(dim=1) == labels).double().mean()) if classifies else math.nan
        loss = float(F.cross_entropy(logits_of(outputs), labels)) if self.loss == "cross_entropy" else divergence(self._answers, outputs)
        return Verdict(loss if math.isfinite(loss) else math.inf, right)

    def _train(self, network: nn.Module) -> None:
        """`steps` updates on the spare images, in an order that is the same for all candidates."""
        images, labels = self.spare
        size = min(TRAINING_BATCH, len(labels))
        generator = torch.Generator().manual_seed(0)
        order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(-(-self.steps * size // len(labels)))])
        optimizer = torch.optim.SGD(network.parameters(), **TRAINING)
        for part in order[: self.steps * size].split(size):
            with suppress(NotImplementedError):  # an exported program: its mode was fixed at export
                network.train()
            loss = F.cross_entropy(logits_of(network(*fresh(tuple(x[part] for x in images), self._format))), labels[part])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        settled(network)


def divergence(answers: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """KL(answers || outputs) of logits, nats, mean over the images; of other outputs the squared error over the answers' variance."""
    first, other = answers[0], outputs[0]
    if first.ndim == 2:
        return float(F.kl_div(F.log_softmax(other, dim=1), F.log_softmax(first, dim=1), log_target=True, reduction="batchmean"))
    error = sum(float((a - b).square().sum()) for a, b in zip(answers, outputs, strict=True))
    return error / max(sum(float((a - a.mean(dim=0)).square().sum()) for a in answers), 1e-300)


def judge_of(
    probe: Probe | None,
    *,
    images: int,
    recalibration_images: int,
    loss: str,
    steps: int,
    recover: str,
    rows: int = ROWS,
    masked: bool = False,
) -> Judge:
    """A judge with the first `images` images of the probe's data, and the next ones to recover and train on.

    Where the data hold fewer, a third of them recovers. Raises UsageError without a network and data or for options out of range,
    DataError for too few images, or where labels are needed and missing.
    """
    if probe is None or probe.data is None:
        raise UsageError("this allocator runs candidates on images: give model and data to allocate, or --data.")
    if loss not in LOSSES:
        raise UsageError(f"the loss that judges candidates must be one of {', '.join(LOSSES)}, got {loss!r}.")
    if recover not in RECOVERIES:
        raise UsageError(f"what recovers candidates before they are judged must be one of {', '.join(RECOVERIES)}, got {recover!r}.")
    if masked and recover == "reconstruct":
        raise UsageError("masked networks are not reconstructed: judge slim ones (masked=False), or recover by bn or none.")
    if images < 1 or recalibration_images < 2 or steps < 0:
        raise UsageError(f"at least one image must judge and two recover, got {images} and {recalibration_images}; steps {steps}.")
    x, y = _gathered(probe.data, images + recalibration_images)
    if len(y) < 4:
        raise DataError(f"{len(y)} images are too few to judge candidates by: give at least 4.")
    held = min(images, len(y) - min(recalibration_images, max(2, len(y) // 3)))
    if int(y.min()) < 0 and (loss == "cross_entropy" or steps):
        raise DataError("judging by cross-entropy and training need labels: give labelled images, or judge by divergence with 0 steps.")
    judging, spare = (tuple(t[part] for t in x) for part in (slice(0, held), slice(held, None)))
    judge = Judge(probe.model, probe.graph, (judging, y[:held]), (spare, y[held:]), loss, steps, recover, rows, masked)
    if not math.isfinite(judge.dense.loss):
        raise DataError(f"the loss of the dense network is {judge.dense.loss}: check the preprocessing (mean, std) and the weights.")
    return judge


def _gathered(data: Iterable[Any], images: int) -> Pairs:
    """The first `images` images of batches (inputs, labels) or inputs."""
    found: list[Pairs] = []
    missing = images
    for batch in data:
        x, y = (batch[0], batch[1] if len(batch) > 1 else None) if isinstance(batch, (tuple, list)) else (batch, None)
        inputs = tuple(x) if isinstance(x, (tuple, list)) else (x,)
        if not all(isinstance(t, Tensor) and t.ndim for t in inputs):
            raise DataError("candidates are judged on batches of images: every input must be a tensor with a batch axis.")
        labels = y.long() if isinstance(y, Tensor) else torch.full((len(inputs[0]),), -1)
        found.append((tuple(t[:missing] for t in inputs), labels[:missing]))
        missing -= len(found[-1][1])
        if missing <= 0:
            break
    if not found:
        raise DataError("the data are empty: give at least one batch of images.")
    return tuple(torch.cat(parts) for parts in zip(*(x for x, _ in found), strict=True)), torch.cat([y for _, y in found])


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same rounding whatever else the machine does: sums depend on how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
