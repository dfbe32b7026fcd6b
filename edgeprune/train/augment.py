"""The batches of one epoch of training: this process's part of each, normalised and augmented as a whole on the device.

Everything random is drawn on the CPU for the whole epoch from one seed: the order of the images, each image's crop and flip, each
batch's mixing. So an image gets the same crop whatever the batch size, device or number of processes, and an epoch can be repeated.
Sources: mixup after Zhang, Cissé, Dauphin, Lopez-Paz (2018), CutMix after Yun, Han, Oh, Chun, Choe, Yoo (2019); partners are the two
images of a pair in the batch, so that both lie in one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from edgeprune.data import Augment, Split, normalised
from edgeprune.train import Recipe
from edgeprune.train.processes import Processes

PRIME = 7919  # apart enough that the epochs of neighbouring seeds differ


class Batch(NamedTuple):
    """One process's part of a global batch.

    x (n, channels, h, w); y (n,) int64, -1 without labels; partner (n,): the labels of what was mixed in, with the weight 1 - share;
    share (n,), all 1 where nothing was mixed; images: how many the global batch has.
    """

    x: Tensor
    y: Tensor
    partner: Tensor
    share: Tensor
    images: int


def seed_of(seed: int, epoch: int) -> int:
    """The seed of everything random in an epoch (0, 1, …)."""
    return seed + PRIME * epoch


def augment_of(recipe: Recipe, size: tuple[int, int]) -> Augment:
    """The crops and flips of a recipe for images of this size."""
    return Augment(crop_padding=size[0] // 8 if recipe.crop_padding is None else recipe.crop_padding, flip=recipe.flip)


def steps_in(images: int, recipe: Recipe, processes: int) -> int:
    """Steps of an epoch; a last batch with fewer than two images for each process is left out, because batch norms cannot use it."""
    rest = images % recipe.batch_size
    return images // recipe.batch_size + (rest >= 2 * processes)


def batches(split: Split, recipe: Recipe, *, seed: int, epoch: int, processes: Processes) -> Iterator[Batch]:
    """All steps of an epoch. Reading and decoding are the source's; the rest happens on the device, a batch at a time."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    order = split.shuffled(generator)
    steps = steps_in(len(order), recipe, processes.count)
    changes = augment_of(recipe, split.preprocessing.size).draw(len(order), generator)
    mixes = [_Mix.draw(recipe, split.preprocessing.size, generator) for _ in range(steps)]
    sizes = [min(recipe.batch_size, len(order) - recipe.batch_size * step) for step in range(steps)]
    parts = [_part(recipe.batch_size * step, n, processes) for step, n in enumerate(sizes)]
    for n, mix, part, (raw, y) in zip(sizes, mixes, parts, split.raw([order[p] for p in parts]), strict=True):
        x = normalised(torch.from_numpy(raw).to(processes.device, non_blocking=True), split.preprocessing)
        yield mix.apply(changes.apply(x, part), y.to(processes.device), n)


def _part(start: int, images: int, processes: Processes) -> slice:
    """This process's images of a global batch: whole pairs, as even as they come."""
    first, stop = (2 * (images // 2 * i // processes.count) for i in (processes.index, processes.index + 1))
    return slice(start + first, start + (images if processes.index == processes.count - 1 else stop))


@dataclass(frozen=True)
class _Mix:
    """How the two images of every pair of a batch are mixed: by weight, or by a box of the other image; not at all where share is 1."""

    share: float = 1.0
    box: tuple[slice, slice] | None = None

    @staticmethod
    def draw(recipe: Recipe, size: tuple[int, int], generator: torch.Generator) -> _Mix:
        """Where both kinds are on, every other batch has one of them, at random."""
        kinds = [kind for kind in ("mixup", "cutmix") if getattr(recipe, kind)]
        if not kinds:
            return _Mix()
        kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
        share = _beta(getattr(recipe, kind), generator)
        if kind == "mixup":
            return _Mix(share)
        lengths = [round(n * math.sqrt(1 - share)) for n in size]
        starts = [int(torch.randint(n - length + 1, (), generator=generator)) for n, length in zip(size, lengths, strict=True)]
        box = tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
        return _Mix(1 - math.prod(lengths) / math.prod(size), (box[0], box[1]))

    def apply(self, x: Tensor, y: Tensor, images: int) -> Batch:
        """The batch with its labels; an image without a partner, the last of an odd number, stays as it is."""
        share = torch.ones(len(x), device=x.device)
        if self.share == 1 or len(x) < 2:
            return Batch(x, y, y, share, images)
        paired = len(x) - len(x) % 2
        partner = torch.arange(len(x), device=x.device)
        partner[:paired] = partner[:paired].view(-1, 2).flip(1).flatten()
        mixed = x.clone()
        if self.box is None:
            mixed[:paired] = torch.lerp(x[partner[:paired]], x[:paired], self.share)
        else:
            mixed[:, :, self.box[0], self.box[1]] = x[partner][:, :, self.box[0], self.box[1]]
        share[:paired] = self.share
        return Batch(mixed, y, y[partner], share, images)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """One draw from Beta(alpha, alpha): of two gammas, the share of the first."""
    a, b = (float(torch._standard_gamma(torch.tensor(alpha, dtype=torch.float64), generator=generator)) for _ in range(2))
    return a / (a + b)
