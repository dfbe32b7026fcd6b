"""CIFAR-10 as arrays, for `--data benchmarks.cifar10:datasets`.

Reads lossless WebP sheets (25 rows x 40 columns of 32x32 tiles, in the original order) from EDGEPRUNE_DATA/cifar10; without that
variable, from ../shared/data beside the repository. Data: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune.errors import DataError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]


def data_folder() -> Path:
    """The folder of the shared benchmark inputs (it may be absent)."""
    return Path(os.environ.get("EDGEPRUNE_DATA", Path(__file__).parents[2] / "shared" / "data"))


@cache
def datasets() -> tuple[Labelled, Labelled]:
    """((x_train, y_train), (x_test, y_test)): uint8 (n, 32, 32, 3) and int64 (n,), 50,000 and 10,000 images.

    Decoding takes a few CPU-seconds; the arrays are kept. Raises DataError where the sheets are absent.
    """
    return _read("train", 50), test_images()


@cache
def test_images(sheets: int = 10) -> Labelled:
    """The first `sheets` thousand of the 10,000 test images: uint8 (n, 32, 32, 3), int64 (n,)."""
    return _read("test", sheets)


def _read(part: str, sheets: int) -> Labelled:
    folder = data_folder() / "cifar10"
    if not (folder / "labels.npz").is_file():
        raise DataError(f"CIFAR-10 is not in {folder}: set EDGEPRUNE_DATA to the folder that holds cifar10/ (WebP sheets and labels.npz).")
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        images = np.concatenate(list(pool.map(_sheet, (folder / f"{part}_{i:02d}.webp" for i in range(sheets)))))
    with np.load(folder / "labels.npz", allow_pickle=False) as file:
        labels = file[f"{part}_labels"].astype(np.int64)[: len(images)]
    return images, labels


def _sheet(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels.reshape(25, 32, 40, 32, 3).swapaxes(1, 2).reshape(1000, 32, 32, 3)
