"""Image files, decoded on a few threads when they are read. Used by sources.py only."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from edgeprune.errors import DataError

THREADS = min(8, os.cpu_count() or 1)
CHECKED_FILES = 20_000  # a few seconds
SAMPLES = 64  # images whose content enters the fingerprint


@dataclass(frozen=True, eq=False)
class Files:
    """Image files, decoded when read: shorter side resized, centre cropped, RGB or grey."""

    name: str
    root: Path
    paths: tuple[Path, ...]
    shape: tuple[int, ...]
    preprocessed: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, chunks: Sequence[NDArray[np.int64]]) -> Iterator[NDArray[Any]]:
        """Decodes on a few threads, one batch ahead of the reader."""
        pool = ThreadPoolExecutor(THREADS)
        ahead: deque[list[Any]] = deque()
        try:
            for chunk in chunks:
                ahead.append([pool.submit(self._decode, self.paths[i]) for i in chunk])
                if len(ahead) > 1:
                    yield np.stack([image.result() for image in ahead.popleft()])
            for images in ahead:
                yield np.stack([image.result() for image in images])
        finally:
            pool.shutdown(cancel_futures=True)

    def describe(self) -> Iterator[bytes]:
        """Every name and size, the content of some files."""
        for path in self.paths:
            yield f"{path.relative_to(self.root).as_posix()} {path.stat().st_size}".encode()
        for i in spread(len(self)):
            yield self.paths[i].read_bytes()

    def check(self) -> None:
        """Raises DataError for the first file whose header is no image's: known now, not hours into a run."""
        with ThreadPoolExecutor(THREADS) as pool:
            deque(pool.map(_look_at, self.paths[:CHECKED_FILES]), maxlen=0)

    def _decode(self, path: Path) -> NDArray[np.uint8]:
        channels, height, width = self.shape
        with _opened(path) as file:
            # Photos of phones lie on their side until their EXIF orientation is applied.
            image = ImageOps.exif_transpose(file).convert("RGB" if channels == 3 else "L")
        scale = max(height / image.height, width / image.width)
        large = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        if large != image.size:
            image = image.resize(large, Image.Resampling.BILINEAR)
        left, top = (large[0] - width) // 2, (large[1] - height) // 2
        return np.asarray(image.crop((left, top, left + width, top + height))).reshape(height, width, channels)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"the image {path} cannot be read ({error}): repair or remove it.") from error


def _look_at(path: Path) -> None:
    with _opened(path) as file:
        file.verify()


def spread(n: int) -> NDArray[np.int64]:
    """At most SAMPLES numbers below n, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, SAMPLES)).astype(np.int64))
