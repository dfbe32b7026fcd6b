"""Does data loading keep up with training? Images per CPU-second of fine-tuning against bare forward + backward, and memory formats.

    python -m benchmarks.training                  # every case below
    python -m benchmarks.training cifar-resnet20   # one

A round measures, one after the other in one process with one thread, so that whatever else the machine does meets all alike: forward
and backward of one fixed batch, in both memory formats, and the steps of `finetune` from reading and augmenting the images to the
optimizer (between two calls of its progress report, without distillation). Figures are medians of the rounds; CPU-seconds of all
threads, so decoding counts in full although it would overlap on a machine with idle cores. Exit code 1 where fine-tuning falls below
LEAST of bare forward + backward (in the memory format that fine-tuning uses). The JPEG case reads EDGEPRUNE_DATA.
Writes benchmarks/results/training.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cifar10 import data_folder
from benchmarks.graph import library_model
from benchmarks.networks import resnet
from edgeprune.data import Data, load_data
from edgeprune.train import Recipe
from edgeprune.train.finetune import finetune

LEAST = 0.85
ROUNDS = 3
RESULTS = Path(__file__).parent / "results"


def cifar(folder: Path, images: int) -> Data:
    """Noise of CIFAR's size, in memory."""
    x = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    y = np.arange(images) % 10
    return load_data(((x, y), (x[:20], y[:20])))


def photos(folder: Path, images: int, val: int = 20) -> Data:
    """Real photos as JPEG files of 256x256 pixels (EDGEPRUNE_DATA/imagenet), decoded and resized to 224x224 on the way.

    Classes are made up: only the files matter here.
    """
    with tarfile.open(data_folder() / "imagenet" / "imagenet_sample1000_256px.tar") as archive:
        members = [m for m in archive.getmembers() if m.isfile()][: images + val]
        for n, member in enumerate(members):
            file = folder / ("train" if n < images else "val") / f"class{n % 10}" / f"{n}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(cast("IO[bytes]", archive.extractfile(member)).read())
    return load_data(folder, size=224)


def mobilenet() -> nn.Module:
    """MobileNetV3-Small of timm, random weights: hardly any arithmetic for the size of its images, the hardest case."""
    model: nn.Module = library_model("timm:mobilenetv3_small_100")
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Path, int], Data], int, int]] = {
    "cifar-resnet20": (lambda: resnet(20), cifar, 128, 6),
    "jpeg-mobilenetv3-small": (mobilenet, photos, 32, 4),
}
"""Name -> network, data, batch size, steps of a round."""


def bare(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], layout: torch.memory_format, steps: int) -> float:
    """CPU-seconds of one forward and backward of a batch."""
    convert: Any = model.to
    convert(memory_format=layout).train()
    x, y = batch[0].contiguous(memory_format=layout), batch[1]
    started = 0.0
    for step in range(steps + 1):
        if step == 1:
            started = time.process_time()
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
    return (time.process_time() - started) / steps


def tuned(model: nn.Module, data: Data, batch_size: int, steps: int) -> float:
    """CPU-seconds of one step of fine-tuning, from the end of the first to the end of the last but one (the last may be smaller)."""
    at: list[float] = []
    recipe = Recipe(epochs=1, lr=1e-4, batch_size=batch_size, precision="fp32")
    finetune(model, None, data.train, None, recipe, progress=lambda what, done, total: at.append(time.process_time()))
    return (at[steps] - at[0]) / steps


def measured(name: str) -> dict[str, Any]:
    """The figures of one case."""
    build, source, batch_size, steps = CASES[name]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = source(Path(folder), batch_size * (steps + 2))
        model, batch = build(), next(iter(data.train.batches(batch_size)))
        rounds = [
            (
                bare(model, batch, torch.channels_last, steps),
                tuned(model, data, batch_size, steps),
                bare(model, batch, torch.contiguous_format, steps),
            )
            for _ in range(ROUNDS)
        ]
    last, full, contiguous = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "case": name,
        "batch_size": batch_size,
        "rounds": ROUNDS,
        "bare_images_per_s": round(batch_size / last, 1),
        "finetune_images_per_s": round(batch_size / full, 1),
        "share": round(statistics.median(a / b for a, b, _ in rounds), 3),
        "contiguous_images_per_s": round(batch_size / contiguous, 1),
        "channels_last_speedup": round(statistics.median(c / a for a, _, c in rounds), 3),
    }


def main() -> None:
    """Measure, print, write JSON; exit code 1 where loading starves training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    chosen = parser.parse_args().cases or list(CASES)
    file = RESULTS / "training.json"
    rows = {r["case"]: r for r in json.loads(file.read_text())["rows"]} if file.exists() else {}
    for name in chosen:
        rows[name] = row = measured(name)
        print(json.dumps(row, indent=2))
        machine = {"cpu_count": os.cpu_count(), "threads": 1, "platform": platform.platform(), "torch": torch.__version__}
        file.write_text(json.dumps({"machine": machine, "least": LEAST, "rows": list(rows.values())}, indent=2) + "\n")
    sys.exit(any(rows[name]["share"] < LEAST for name in chosen))


if __name__ == "__main__":
    main()
