"""Where images come from: arrays in memory, files decoded on the way, datasets of the user. Used by data.py only.

A source gives raw images: uint8 (n, height, width, channels), or float32 (n, channels, height, width) that count as preprocessed.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from tokenize import TokenError
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune.errors import DataError
from edgeprune.images import Files, spread
from edgeprune.load import resolve, user_code

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VAL_NAMES = ("val", "valid", "validation", "test")

Labels = NDArray[np.int64]
Chunks = Sequence[NDArray[np.int64]]


class Source(Protocol):
    """Images by number."""

    @property
    def name(self) -> str:
        """What errors call the images."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of every image."""
        ...

    @property
    def preprocessed(self) -> bool:
        """Whether the images are floats, which are used as they are."""
        ...

    def __len__(self) -> int: ...

    def read(self, chunks: Chunks) -> Iterator[NDArray[Any]]:
        """One raw batch for every chunk of numbers."""
        ...

    def describe(self) -> Iterator[bytes]:
        """Bytes that change when the source does: names, sizes, the content of a few images."""
        ...


Part = tuple[Source, Labels | None]
Parts = tuple[Part | None, Part | None, tuple[str, ...] | None]


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images in memory, as they came."""

    name: str
    x: NDArray[Any]

    @property
    def preprocessed(self) -> bool:
        """Floats count as preprocessed."""
        return self.x.dtype != np.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        shape = self.x.shape[1:]
        return tuple(shape) if self.preprocessed else (shape[2], shape[0], shape[1])

    def __len__(self) -> int:
        return len(self.x)

    def read(self, chunks: Chunks) -> Iterator[NDArray[Any]]:
        """One copy per chunk."""
        return (self.x[chunk] for chunk in chunks)

    def describe(self) -> Iterator[bytes]:
        """Type, shape and every so-many-th image."""
        yield f"{self.x.dtype} {self.x.shape}".encode()
        yield np.ascontiguousarray(self.x[spread(len(self))]).tobytes()


@dataclass(frozen=True, eq=False)
class Items:
    """A map-style dataset of (image, label); images are Pillow images, uint8 or float arrays or tensors."""

    name: str
    dataset: Any
    shape: tuple[int, ...]
    preprocessed: bool

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, chunks: Chunks) -> Iterator[NDArray[Any]]:
        """Asks the dataset for one image after the other."""
        return (np.stack([self._image(int(i)) for i in chunk]) for chunk in chunks)

    def describe(self) -> Iterator[bytes]:
        """The length and some images."""
        yield f"{type(self.dataset).__qualname__} {len(self)}".encode()
        for i in spread(len(self)):
            yield np.ascontiguousarray(self._image(int(i))).tobytes()

    def _image(self, i: int) -> NDArray[Any]:
        with user_code(f"image {i} of {self.name}", DataError):
            image = self.dataset[i][0]
        raw = _raw_image(image, self.name)
        shape = raw.shape if self.preprocessed else (raw.shape[2], *raw.shape[:2])
        if shape != self.shape or (raw.dtype != np.uint8) != self.preprocessed:
            raise DataError(f"image {i} of {self.name} is {raw.dtype} {shape}, the first one {self.shape}: images must all be alike.")
        _check_finite(raw, f"image {i} of {self.name}")
        return raw


def read_folder(root: Path, size: tuple[int, int], channels: int) -> Parts:
    """The parts of an image folder: train/ and val/ folders of classes, one folder of classes, or images without classes."""
    train, val = root / "train", next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    if not train.is_dir() and val is None:
        names = _class_names([root])
        return _folder_part(root, names, size, channels), None, names or None
    folders = [folder for folder in (train, val) if folder is not None and folder.is_dir()]
    names = _class_names(folders)
    parts = {folder: _folder_part(folder, names, size, channels) for folder in folders}
    if train in parts and val in parts and (extra := set(_class_names([val])) - set(_class_names([train]))):
        raise DataError(f"{val} has the class {min(extra)!r}, which {train} has not: both must name the same classes.")
    return parts.get(train), parts.get(val) if val else None, names or None


# What zipfile and numpy raise on bytes that are no archive of arrays (RuntimeError: encrypted, or a compression nobody has; TokenError:
# a header that is no Python literal).
_DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    KeyError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    TokenError,
)


def read_npz(path: Path) -> Parts:
    """The arrays x_train, y_train, x_val, y_val (and classes, names) of an .npz file; nothing pickled is read."""
    try:
        # opened here: numpy leaves a file open that turns out to be damaged
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in ("x_train", "y_train", "x_val", "y_val", "classes")}
            found = list(file.files)
    except _DAMAGED as error:
        reason = (
            "it holds Python objects, which are not read because that executes code" if "pickle" in str(error) else shorten(str(error), 200)
        )
        raise DataError(f"{path} cannot be read ({reason}): save plain arrays with numpy.savez(path, x_train=…, y_train=…).") from error
    parts = [
        _array_part(arrays[f"x_{p}"], arrays.get(f"y_{p}"), f"x_{p} of {path}") if f"x_{p}" in arrays else None for p in ("train", "val")
    ]
    if parts == [None, None]:
        raise DataError(f"{path} has the arrays {', '.join(found) or '(none)'}: name them x_train, y_train, x_val, y_val.")
    classes = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays else None
    return parts[0], parts[1], classes


def read_object(spec: str) -> Parts:
    """What the function behind pkg.mod:function returns."""
    function = resolve(spec, DataError)
    if not callable(function):
        raise DataError(f"{spec} is not a function: give one that returns (train, val).")
    with user_code(f"{spec}()", DataError):
        result = function()
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise DataError(f"{spec}() returned {type(result).__name__}, not a pair (train, val) of (x, y) arrays or datasets.")
    return read_parts((result[0], result[1]), f"{spec}()")


def read_parts(value: object, name: str) -> Parts:
    """A pair (train, val) of parts, or one part: (x, y) inside a pair, a dataset of (image, label), or (x, y) batches."""
    if isinstance(value, tuple) and len(value) == 2 and not _is_array(value[0]):
        return _any_part(value[0], f"train of {name}"), _any_part(value[1], f"val of {name}"), _dataset_classes(value[0])
    return _any_part(value, name), None, _dataset_classes(value)


def digest(parts: Iterable[Part], extra: Any) -> str:
    """SHA-256 over what the parts say of themselves, their labels and `extra` (JSON)."""
    total = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for source, labels in parts:
        for piece in source.describe():
            total.update(hashlib.sha256(piece).digest())
        total.update(b"none" if labels is None else labels.tobytes())
    return total.hexdigest()


def _class_names(folders: Sequence[Path]) -> tuple[str, ...]:
    return tuple(
        sorted({entry.name for folder in folders for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")})
    )


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith("."))


def _folder_part(folder: Path, names: Sequence[str], size: tuple[int, int], channels: int) -> Part:
    found = [(path, label) for label, name in enumerate(names) for path in _images_in(folder / name)] if names else []
    paths = tuple(path for path, _ in found) if names else tuple(_images_in(folder))
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)}): give a folder with one folder of images per class.")
    labels = np.array([label for _, label in found], np.int64) if names else None
    filled = {label for _, label in found}
    if empty := [folder / name for label, name in enumerate(names) if label not in filled and (folder / name).is_dir()]:
        raise DataError(f"the class folder {empty[0]} holds no images: fill or remove it.")
    files = Files(f"the folder {folder}", folder, paths, (channels, *size))
    files.check()
    return files, labels


def _any_part(value: Any, name: str) -> Part | None:
    if value is None:
        return None
    if _is_pair(value):
        return _array_part(_to_numpy(value[0]), None if value[1] is None else _to_numpy(value[1]), name)
    if isinstance(value, str | dict) or _is_array(value) or not (isinstance(value, Iterable) or hasattr(value, "__getitem__")):
        raise DataError(f"{name} is {type(value).__name__}: give (x, y) arrays, a dataset of (image, label), or batches of (x, y).")
    if hasattr(value, "__getitem__") and hasattr(value, "__len__") and len(value) and not _is_batch(value[0]):
        return _dataset_part(value, name)
    return _batches_part(value, name)


def _dataset_part(dataset: Any, name: str) -> Part:
    with user_code(f"image 0 of {name}", DataError):
        first = dataset[0]
    if not isinstance(first, tuple | list) or len(first) != 2:
        raise DataError(f"an item of {name} is {type(first).__name__}, not (image, label).")
    raw = _raw_image(first[0], name)
    floats = raw.dtype != np.uint8
    shape = raw.shape if floats else (raw.shape[2], *raw.shape[:2])
    labels = getattr(dataset, "targets", None) if getattr(dataset, "target_transform", None) is None else None
    if labels is None or len(labels) != len(dataset):
        with user_code(f"the labels of {name}", DataError):
            labels = [dataset[i][1] for i in range(len(dataset))]
    return Items(name, dataset, shape, floats), _check_labels(_to_numpy(labels), len(dataset), name)


def _batches_part(batches: Iterable[Any], name: str) -> Part:
    xs, ys = [], []
    with user_code(f"the batches of {name}", DataError):
        for x, y in batches:
            xs.append(_to_numpy(x))
            ys.append(_to_numpy(y))
    if not xs:
        raise DataError(f"{name} gave no batches: an iterator that was used up before, or an empty dataset.")
    if len({x.shape[1:] for x in xs}) > 1:
        raise DataError(f"the batches of {name} hold images of different shapes ({xs[0].shape[1:]} and others): resize them to one.")
    return _array_part(np.concatenate(xs), np.concatenate(ys), name)


def _array_part(x: NDArray[Any], y: NDArray[Any] | None, name: str) -> Part:
    if x.dtype == np.uint8 and x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4:
        raise DataError(
            f"{name} has the shape {x.shape}: images are uint8 (n, height, width, channels) or float (n, channels, height, width)."
        )
    if not len(x):
        raise DataError(f"{name} is empty: give at least one image, or leave it out.")
    floats = np.issubdtype(x.dtype, np.floating)
    if x.dtype != np.uint8 and not floats:
        raise DataError(f"{name} has the type {x.dtype}: images are uint8 (0…255) or float (already preprocessed).")
    last, first = (1, 3) if floats else (3, 1)
    if x.shape[last] > 4 and x.shape[first] in (1, 3):
        raise DataError(
            f"{name} has the shape {x.shape}: uint8 images are (n, height, width, channels), floats (n, channels, height, width)."
        )
    if floats:
        x = x.astype(np.float32, copy=False)
        _check_finite(x, name)
    return Arrays(name, x), None if y is None else _check_labels(y, len(x), name)


def _check_labels(y: NDArray[Any], n: int, name: str) -> Labels:
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"the labels of {name} are {y.dtype} {y.shape}: they must be integer class numbers, (n,).")
    if len(y) != n:
        raise DataError(f"{name} has {n} images but {len(y)} labels.")
    if len(y) and y.min() < 0:
        raise DataError(f"{name} has the label {y.min()}: labels are class numbers from 0.")
    return y.astype(np.int64)


def _check_finite(x: NDArray[Any], name: str) -> None:
    if x.dtype != np.uint8 and not np.isfinite(x).all():
        raise DataError(f"{name} holds NaN or infinite values ({int((~np.isfinite(x)).sum())} of {x.size}): repair the preprocessing.")


def _raw_image(image: Any, name: str) -> NDArray[Any]:
    """One image of a dataset as uint8 (h, w, c) or float32 (c, h, w)."""
    tensor = isinstance(image, torch.Tensor)
    raw = _to_numpy(image)
    if raw.ndim == 2 and raw.dtype == np.uint8:
        raw, tensor = raw[..., None], False
    if raw.ndim != 3 or not (raw.dtype == np.uint8 or np.issubdtype(raw.dtype, np.floating)):
        raise DataError(f"an image of {name} is {type(image).__name__} {raw.dtype} {raw.shape}: give uint8 (h, w, c) or float (c, h, w).")
    if raw.dtype != np.uint8:
        return raw.astype(np.float32, copy=False)
    return raw.transpose(1, 2, 0) if tensor else raw  # uint8 tensors are (c, h, w) by torch's convention


def _dataset_classes(dataset: Any) -> tuple[str, ...] | None:
    names = getattr(dataset, "classes", None)
    return tuple(str(name) for name in names) if isinstance(names, list | tuple) else None


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray | torch.Tensor)


def _is_pair(value: Any) -> bool:
    """Whether this is (x array, y array, list of numbers or None)."""
    if not (isinstance(value, tuple | list) and len(value) == 2 and _is_array(value[0])):
        return False
    return value[1] is None or _is_array(value[1]) or np.ndim(value[1]) == 1


def _is_batch(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and _is_array(item[0]) and item[0].ndim == 4


def _to_numpy(value: Any) -> NDArray[Any]:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    array: NDArray[Any] = np.asarray(value)
    if array.dtype == object:
        raise DataError("the data holds Python objects where numbers are needed: images of one part must have one shape.")
    return array
