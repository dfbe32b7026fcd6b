"""Batches: the same images whatever the batch size or the number of processes, cropped, flipped and mixed as documented."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgeprune.data import Split, load_data
from edgeprune.train import Recipe
from edgeprune.train.augment import Batch, batches, steps_in
from edgeprune.train.processes import Processes

CLASSES = 4


def split(n: int = 40, side: int = 8) -> Split:
    """Float images, so that what comes out can be compared with what went in."""
    x = np.random.default_rng(0).normal(size=(n, 1, side, side)).astype(np.float32)
    y = np.arange(n) % CLASSES
    return load_data(((x, y), (x, y))).train


def epoch(source: Split, recipe: Recipe, *, seed: int = 3, number: int = 0, index: int = 0, count: int = 1) -> list[Batch]:
    return list(batches(source, recipe, seed=seed, epoch=number, processes=Processes(index, count)))


def pixels(parts: list[Batch]) -> Tensor:
    return torch.cat([b.x for b in parts])


PLAIN = Recipe(batch_size=8, flip=False, crop_padding=0)


def test_every_image_once_in_an_order_of_the_epoch() -> None:
    source = split()
    first, again, second = epoch(source, PLAIN), epoch(source, PLAIN), epoch(source, PLAIN, number=1)
    x, y = next(iter(source.batches(40)))
    rows = {image.numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)}
    for parts in (first, second):
        assert [rows[image.numpy().tobytes()] for image in pixels(parts)] == torch.cat([b.y for b in parts]).tolist()
        assert len({image.numpy().tobytes() for image in pixels(parts)}) == 40
    assert torch.equal(pixels(first), pixels(again))
    assert not torch.equal(pixels(first), pixels(second))


def test_crops_and_flips_do_not_depend_on_the_batch_size() -> None:
    source = split()
    found = [pixels(epoch(source, Recipe(batch_size=size, crop_padding=2))) for size in (5, 8, 40)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], pixels(epoch(source, PLAIN)))


def test_all_crops_and_flips_occur_and_nothing_else() -> None:
    n = 200
    x = np.tile(np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4), (n, 1, 1, 1))
    source = load_data(((x, np.arange(n) % 2), (x, np.arange(n) % 2))).train
    padded = np.pad(x[0, 0], 1)
    allowed = {(flip, i, j): padded[i : i + 4, j : j + 4][:, ::flip].tobytes() for flip in (1, -1) for i in range(3) for j in range(3)}
    assert {image.numpy().tobytes() for image in pixels(epoch(source, Recipe(crop_padding=1)))} == set(allowed.values())
    assert {image.numpy().tobytes() for image in pixels(epoch(source, Recipe(crop_padding=0)))} == {allowed[1, 1, 1], allowed[-1, 1, 1]}


@pytest.mark.parametrize("mix", [{}, {"mixup": 0.4}, {"cutmix": 1.0}])
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_batches_of_one(mix: dict[str, Any], count: int) -> None:
    """Batch by batch the parts of all processes are the whole, in order."""
    source, recipe = split(38), Recipe(batch_size=16, crop_padding=1, **mix)
    whole = epoch(source, recipe)
    parts = [epoch(source, recipe, index=i, count=count) for i in range(count)]
    assert [b.images for b in whole] == [16, 16, 6]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([p[step].x for p in parts]), batch.x)
        assert torch.equal(torch.cat([p[step].partner for p in parts]), batch.partner)
        assert torch.equal(torch.cat([p[step].share for p in parts]), batch.share)
        assert min(len(p[step].x) for p in parts) >= 2


@pytest.mark.parametrize(("images", "count", "steps"), [(16, 1, 1), (17, 1, 1), (18, 1, 2), (19, 2, 1), (20, 2, 2), (2, 1, 1)])
def test_a_last_batch_that_is_too_small_is_left_out(images: int, count: int, steps: int) -> None:
    recipe = Recipe(batch_size=16)
    assert steps_in(images, recipe, count) == steps
    assert len(epoch(split(images), recipe, count=count)) == steps


def test_mixup_is_a_weighted_mean_of_pairs() -> None:
    source, recipe = split(11), Recipe(batch_size=11, flip=False, crop_padding=0, mixup=1.0)
    (plain,), (mixed,) = epoch(source, Recipe(batch_size=11, flip=False, crop_padding=0)), epoch(source, recipe)
    assert torch.equal(plain.y, mixed.y)
    share = float(mixed.share[0])
    assert 0 < share < 1
    pairs = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6, 9, 8])
    assert torch.allclose(mixed.x[:10], share * plain.x[:10] + (1 - share) * plain.x[pairs], atol=1e-6)
    assert torch.equal(mixed.partner[:10], plain.y[pairs])
    assert (float(mixed.share[10]), torch.equal(mixed.x[10], plain.x[10])) == (1.0, True)


def test_cutmix_replaces_a_box_and_counts_its_pixels() -> None:
    source, recipe = split(40), Recipe(batch_size=8, flip=False, crop_padding=0, cutmix=1.0)
    boxes = 0
    for plain, mixed in zip(epoch(source, PLAIN), epoch(source, recipe), strict=True):
        partner = plain.x.view(4, 2, 1, 8, 8).flip(1).reshape(8, 1, 8, 8)
        other = mixed.x != plain.x
        assert torch.equal(mixed.x[other], partner[other])
        changed = other[0, 0]
        rows, columns = changed.any(1).sum(), changed.any(0).sum()
        assert int(changed.sum()) == int(rows * columns)
        assert float(mixed.share[0]) == pytest.approx(1 - float(changed.float().mean()))
        boxes += int(changed.any())
    assert boxes >= 3


def test_both_kinds_of_mixing_take_turns() -> None:
    source, recipe = split(400), Recipe(batch_size=8, flip=False, crop_padding=0, mixup=1.0, cutmix=1.0)
    plain = Recipe(batch_size=8, flip=False, crop_padding=0)
    kept = [float((a.x == b.x).float().mean()) for a, b in zip(epoch(source, plain), epoch(source, recipe), strict=True)]
    whole = sum(k < 1e-3 for k in kept)  # every pixel changed: mixup, or a box of the whole image
    assert 10 <= whole <= 40
    assert sum(k > 0.02 for k in kept) >= 5
