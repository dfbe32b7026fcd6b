"""Accuracy and loss of a network on a split, and the statistics its batch norms should have. Networks are left as they were."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.data import Split
from edgeprune.errors import DataError, ExportError, GateError
from edgeprune.export import Runner
from edgeprune.graph.running import evaluating, tensors_in
from edgeprune.train import Progress, silent

EVALUATION_BATCH = 250


@dataclass(frozen=True)
class Accuracy:
    """Share of images classified right (top 1, 0 to 1), and mean cross-entropy in nats, over `images` images."""

    accuracy: float
    loss: float
    images: int


def evaluate(model: nn.Module, split: Split, *, batch_size: int = EVALUATION_BATCH, progress: Progress = silent) -> Accuracy:
    """Top-1 accuracy and cross-entropy on every image of the split.

    Raises DataError for images without labels, labels the network has no output for and outputs that are no logits, GateError for
    outputs that are not finite.
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), evaluating(model):
        return _judge(lambda x: logits_of(model(x.to(device))).cpu(), split, batch_size, progress)


def accuracy_of(run: Runner, split: Split, *, batch_size: int = EVALUATION_BATCH, progress: Progress = silent) -> Accuracy:
    """The same for an artifact: `run` takes and returns arrays. An artifact of fixed batch is fed one image at a time."""

    def logits(x: Tensor) -> Tensor:
        try:
            return logits_of([torch.from_numpy(o) for o in run(x.numpy())])
        except ExportError:
            if len(x) == 1:
                raise
            return torch.cat([logits(image[None]) for image in x])

    return _judge(logits, split, batch_size, progress)


def _judge(logits_for: Callable[[Tensor], Tensor], split: Split, batch_size: int, progress: Progress) -> Accuracy:
    right, loss, images = 0, 0.0, 0
    highest = int(split.labels.max(initial=0))
    for x, y in split.batches(split.at_once(batch_size)):
        logits = logits_for(x)
        if highest >= logits.shape[1]:
            raise DataError(
                f"{split.source.name} has the label {highest} but the network has {logits.shape[1]} outputs (labels 0 to "
                f"{logits.shape[1] - 1}): give data with the network's classes, numbered as in its training."
            )
        right += int((logits.argmax(dim=1) == y).sum())
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        images += len(y)
        progress("evaluating", images, len(split))
    if not math.isfinite(loss):
        raise GateError(
            f"the network's outputs for {split.source.name} are not finite (loss {loss}): check its weights and the preprocessing, and "
            "after training use a smaller --lr."
        )
    return Accuracy(right / images, loss / images, images)


def logits_of(outputs: Any) -> Tensor:
    """The classifier's (n, classes) output: the first tensor of what the network returns. Raises DataError for other shapes."""
    first = next(tensors_in(outputs), None)
    if first is None or first.ndim != 2:
        shape = None if first is None else tuple(first.shape)
        raise DataError(f"accuracy needs a classifier with outputs (images, classes); this network returns {shape}. Leave --data out.")
    return first


def recalibrate(model: nn.Module, split: Split, *, images: int = 1024, batch_size: int = 128) -> nn.Module:
    """A copy whose batch norms have the statistics of the first `images` images (equal weight for every batch).

    Pruning changes what flows through the network; statistics of the dense network no longer fit. Networks without batch norms,
    and all networks where there is only one image, come back as plain copies. Images are taken in an order shuffled with a fixed
    seed; a last batch of one image is left out.
    """
    fresh = copy.deepcopy(model)
    if min(images, len(split)) >= 2:
        refit_norms(fresh, ((x,) for x, _ in split.batches(batch_size, shuffle_seed=0, limit=images)))
    return settled(fresh)


def refit_norms(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> None:
    """Give the batch norms of `model`, in place, the statistics of these images (equal weight for every batch); eval mode afterwards.

    Every batch holds the forward's arguments.
    """
    norms = batch_norms(model)
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    settled(model)
    for norm in norms:
        norm.train()
    with torch.no_grad():
        for inputs in batches if norms else ():
            if len(inputs[0]) > 1:
                model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    settled(model)


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]


def settled(model: nn.Module) -> nn.Module:
    """The same network, now in eval mode; by the flags alone, because exported programs refuse `eval()`."""
    for module in model.modules():
        module.training = False
    return model
