"""What users have (image folders, .npz, a function, datasets) as batches and deterministic splits.

Images stay as they came (uint8 arrays in memory, files on disk) and become normalised float tensors one batch at a time, on any device.
Everything random takes a seed. Checks happen at loading where they are cheap, at the first decode otherwise; every failure is one
DataError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.errors import DataError, UsageError
from edgeprune.sources import Labels, Source, digest, read_folder, read_npz, read_object, read_parts

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VAL_SHARE = 0.2  # of a source that comes in one piece
BATCH_PIXELS = 1 << 20  # the maps of more at a time fill gigabytes and no cache: 1,024 images of 32x32 pixels, 20 of 224x224


def at_once(most: int, size: Sequence[int]) -> int:
    """How many images of this size a network is to look at together: `most`, fewer where they are large."""
    return max(1, min(most, BATCH_PIXELS // int(np.prod(size))))


@dataclass(frozen=True)
class Preprocessing:
    """(x / 255 - mean) / std per channel, after resizing the shorter side and cropping the centre to `size` (height, width).

    mean and std are None for data that came as floats: these are taken as already preprocessed.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for run.json and the metadata of artifacts."""
        return {"mean": self.mean and list(self.mean), "std": self.std and list(self.std), "size": list(self.size)}


@dataclass(frozen=True)
class Augment:
    """Random crops after zero padding of `crop_padding` pixels, and random horizontal flips."""

    crop_padding: int = 0
    flip: bool = False

    def draw(self, n: int, generator: torch.Generator) -> Changes:
        """What happens to each of `n` images, so that an image gets the same whatever the batch size."""
        offsets = torch.randint(0, 2 * self.crop_padding + 1, (n, 2), generator=generator)
        flips = torch.rand(n, generator=generator) < (0.5 if self.flip else 0.0)
        return Changes(self.crop_padding, offsets, flips)


@dataclass(frozen=True, eq=False)
class Changes:
    """The crop offsets (n, 2) and flips (n,) of one pass over the data."""

    padding: int
    offsets: Tensor
    flips: Tensor

    def apply(self, x: Tensor, part: slice) -> Tensor:
        """Crops and flips a batch (n, c, h, w) on its device: one gather of rows and columns."""
        n, _, height, width = x.shape
        offsets, flips = self.offsets[part].to(x.device), self.flips[part].to(x.device)
        columns = torch.arange(width, device=x.device).expand(n, width)
        columns = torch.where(flips[:, None], width - 1 - columns, columns) + offsets[:, 1:]
        rows = torch.arange(height, device=x.device) + offsets[:, :1]
        padded = torch.nn.functional.pad(x, (self.padding,) * 4)
        images = torch.arange(n, device=x.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, eq=False)
class Split:
    """Some images of a source, in a fixed order: `indices` (n,) into the source and its label array."""

    source: Source
    all_labels: Labels | None
    indices: NDArray[np.int64]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Labels:
        """Class numbers (n,) int64; raises DataError for images without labels."""
        if self.all_labels is None:
            raise DataError(
                f"{self.source.name} has no labels, which accuracy, fine-tuning and this criterion need: give class folders, or y arrays "
                "beside the x arrays."
            )
        return self.all_labels[self.indices]

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return self.all_labels is not None

    def batches(
        self, batch_size: int, *, shuffle_seed: int | None = None, limit: int | None = None, augment: Augment | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (float32 images (n, channels, height, width) normalised, int64 labels (n,)); -1 stands for no label.

        In order without `shuffle_seed`; the first `limit` images of that order. The seed also drives `augment`. Raises DataError for
        an empty split and for images that cannot be read.
        """
        generator = torch.Generator().manual_seed(shuffle_seed or 0)
        order = np.arange(len(self)) if shuffle_seed is None else self.shuffled(generator)
        order = order[:limit]
        changes = (augment or Augment()).draw(len(order), generator)
        starts = range(0, len(order), batch_size)
        for start, (raw, labels) in zip(starts, self.raw([order[i : i + batch_size] for i in starts]), strict=True):
            x = normalised(torch.from_numpy(raw), self.preprocessing)
            yield (changes.apply(x, slice(start, start + len(x))) if augment else x), labels

    def at_once(self, most: int) -> int:
        """How many of these images a network is to look at together."""
        return at_once(most, self.preprocessing.size)

    def shuffled(self, generator: torch.Generator) -> NDArray[np.int64]:
        """The positions of this split in a random order, (len,)."""
        order: NDArray[np.int64] = torch.randperm(len(self), generator=generator).numpy()
        return order

    def raw(self, chunks: Sequence[NDArray[np.int64]]) -> Iterator[tuple[NDArray[Any], Tensor]]:
        """For every chunk of positions the images as they came (see `normalised`) and their int64 labels (n,), -1 without.

        Image files are decoded ahead of the reader. Raises DataError for an empty split and for images that cannot be read.
        """
        if not len(self):
            raise DataError(f"{self.source.name} has no images for this part (train or val): give both, or one part to be split.")
        chosen = [self.indices[chunk] for chunk in chunks]
        for raw, where in zip(self.source.read(chosen), chosen, strict=True):
            y = np.full(len(where), -1) if self.all_labels is None else self.all_labels[where]
            yield raw, torch.from_numpy(y.astype(np.int64))

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Split:
        """The images at these positions of this split, in this order."""
        return replace(self, indices=self.indices[np.asarray(indices, dtype=np.int64)])

    def first(self, n: int) -> Tensor:
        """The first n images, prepared, (n, channels, height, width); all where there are fewer."""
        return next(self.batches(n, limit=n))[0]

    def hold_out(self, n: int, seed: int) -> tuple[Split, Split]:
        """(rest, held): `held` has n images, as even over the classes as they allow; both keep their order.

        The same seed gives the same split. Raises DataError unless 0 < n < len.
        """
        if not 0 < n < len(self):
            raise DataError(f"cannot set {n} of {len(self)} images of {self.source.name} aside: at least one must be on either side.")
        rank = _rank_in_class(self._classes(), seed)
        order = np.argsort(rank, kind="stable")  # the first of every class, then the second of every class …
        return self._part(order[n:]), self._part(order[:n])

    def hold_out_tenth(self, seed: int) -> tuple[Split, Split | None]:
        """(rest, held): a tenth, at most 2,000 images, to judge epochs by; all and None of fewer than ten."""
        held = min(2000, len(self) // 10)
        return self.hold_out(held, seed) if held else (self, None)

    def split_share(self, share: float, seed: int) -> tuple[Split, Split]:
        """(rest, held): `held` has this share of every class, at least one of every class with two; deterministic."""
        classes = self._classes()
        count = np.bincount(classes)[classes]
        quota = np.where(count > 1, np.maximum(1, np.round(count * share)), 0)
        held = _rank_in_class(classes, seed) < quota
        return self._part(np.flatnonzero(~held)), self._part(np.flatnonzero(held))

    def _classes(self) -> Labels:
        return self.labels if self.labelled else np.zeros(len(self), np.int64)

    def _part(self, positions: NDArray[np.int64]) -> Split:
        return self.subset(np.sort(positions))


@dataclass(frozen=True, eq=False)
class Data:
    """Images to train on and images to judge by; `fingerprint` changes when the source, its preprocessing or the split does.

    `train` may be empty (enough to evaluate). `classes` names the labels where the source does.
    """

    train: Split
    val: Split
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing
    fingerprint: str = field(repr=False)

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one image as the model sees it, (1, channels, height, width)."""
        x, _ = next(self.val.batches(1, limit=1))
        return tuple(x.shape)

    def check(self, *, classes: int) -> None:
        """Raises DataError unless every label fits a model with this many outputs."""
        for split in (self.train, self.val):
            if split.labelled and len(split) and (largest := int(split.labels.max())) >= classes:
                raise DataError(
                    f"{split.source.name} has the label {largest} but the model has {classes} outputs (labels 0 to {classes - 1}): "
                    "give data with the model's classes, numbered as in its training."
                )


def image_facts(data: Data | None) -> dict[str, Any]:
    """What an artifact says of the images it takes: their preprocessing, and the names of the classes where they have some."""
    if data is None:
        return {"preprocessing": None}
    return {"preprocessing": data.preprocessing.to_json()} | ({"labels": list(data.classes)} if data.classes else {})


def load_data(
    spec: object, *, size: int | tuple[int, int] | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, seed: int = 0,
) -> Data:  # fmt: skip
    """The training and validation images of a data source, which may be one of these.

    - a folder with train/ and val/ (also valid/, validation/, test/), each with one folder per class, or one folder of class folders,
      split 80/20 in every class; a folder of images without class folders gives images without labels;
    - an .npz with x_train, y_train, x_val, y_val (or only x_val, y_val): uint8 (n, h, w[, channels]) or float (n, channels, h, w);
    - "pkg.mod:function", a function that returns (train, val), each (x, y) arrays or tensors, or a Dataset of (image, label);
    - from Python, such a pair itself, or an iterable of (x, y) batches, which is split 80/20.

    `size` (height, width; 224 if not given) is for files: the shorter side is resized, the centre cropped. `mean` and `std` are for
    8-bit images, per channel, on the scale 0…1: by default ImageNet's for three channels, 0.5 otherwise; with one mean, files are read
    as grey. Floats are taken as already preprocessed. Raises DataError for what cannot be read or makes no sense, UsageError for
    options that do not fit.
    """
    if (mean is None) != (std is None):
        raise UsageError("mean and std belong together: give both or neither.")
    shape = (size, size) if isinstance(size, int) else size
    train, val, classes = _read(spec, shape, channels=1 if mean is not None and len(mean) == 1 else 3)
    known = val or train
    if known is None:
        raise DataError(f"{spec} holds neither training nor validation images.")
    preprocessing = _preprocessing(known[0], shape, mean, std)
    whole = [_whole(part, preprocessing) if part else None for part in (train, val)]
    train_split, val_split = whole
    if val_split is None and train_split is not None:
        train_split, val_split = train_split.split_share(VAL_SHARE, seed)
    if val_split is None or not len(val_split):
        raise DataError(f"{known[0].name} is too small to set validation images aside: give at least two images of a class, or a val part.")
    if train_split is None:
        train_split = val_split.subset([])
    elif train_split.source.shape != val_split.source.shape:
        raise DataError(
            f"the training images of {known[0].name} are {train_split.source.shape}, the validation images {val_split.source.shape}."
        )
    _check_classes([split for split in (train_split, val_split) if len(split)], known[0].name)
    fingerprint = digest([part for part in (train, val) if part], [preprocessing.to_json(), seed, classes])
    return Data(train_split, val_split, classes, preprocessing, fingerprint)


def _read(spec: object, size: tuple[int, int] | None, channels: int) -> Any:
    """(train, val, classes); a part is (Source, labels or None), or None where it is absent."""
    if not isinstance(spec, str | Path):
        return read_parts(spec, "the data given from Python")
    path = Path(spec)
    if path.is_dir():
        return read_folder(path, size or (224, 224), channels)
    if path.suffix == ".npz":
        return read_npz(path)
    if ":" in str(spec) and not path.exists():
        return read_object(str(spec))
    state = "is neither a folder nor an .npz file" if path.exists() else "does not exist"
    raise DataError(f"the data {str(spec)!r} {state}: give a folder of class folders, an .npz file, or pkg.mod:function.")


def _whole(part: tuple[Source, Labels | None], preprocessing: Preprocessing) -> Split:
    source, labels = part
    return Split(source, labels, np.arange(len(source)), preprocessing)


def _preprocessing(
    source: Source, size: tuple[int, int] | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Preprocessing:
    channels, height, width = source.shape
    if size is not None and size != (height, width):
        raise DataError(f"{source.name} has images of {height}x{width}, not {size[0]}x{size[1]}: only image files are resized.")
    if source.preprocessed:
        if mean is not None:
            raise UsageError(f"mean and std are for 8-bit images, and {source.name} holds floats, which count as already preprocessed.")
        return Preprocessing(None, None, (height, width))
    if mean is None or std is None:
        three = channels == 3
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if three else ((0.5,) * channels, (0.5,) * channels)
    if len(mean) != channels or len(std) != channels or not all(s > 0 for s in std):
        raise UsageError(f"mean {tuple(mean)} and std {tuple(std)} must have {channels} values, std above 0, for {source.name}.")
    return Preprocessing(tuple(map(float, mean)), tuple(map(float, std)), (height, width))


def _check_classes(splits: Sequence[Split], name: str) -> None:
    if len({split.labelled for split in splits}) > 1:
        raise DataError(f"one part of {name} has labels and the other has none: give labels for both, or for neither.")
    if splits[0].labelled and len(found := np.unique(np.concatenate([split.labels for split in splits]))) < 2:
        raise DataError(f"{name} has only one class (label {found[0]}): accuracy means nothing there. Give at least two classes.")


def _rank_in_class(classes: Labels, seed: int) -> NDArray[np.int64]:
    """For every image its place (0, 1, …) in a random order of its own class."""
    shuffled = np.random.default_rng(seed).permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    counts = np.bincount(classes)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.empty(len(classes), np.int64)
    rank[by_class] = np.arange(len(classes)) - first
    return rank


def normalised(raw: Tensor, preprocessing: Preprocessing) -> Tensor:
    """A batch of uint8 (n, h, w, c) or float (n, c, h, w) as new float32 (n, c, h, w), on the device where it lies."""
    if preprocessing.mean is None or preprocessing.std is None:
        return raw.to(torch.float32, copy=True)
    x = raw.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(v, device=raw.device).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return x.div_(255).sub_(mean).div_(std)
