"""EfficientNet-Lite0 with its published weights, and 1,000 ImageNet images to compare its versions on.

    python -m benchmarks.imagenet                  # without 20% and 30% of its MACs, recovered without training

The images (one per class, 256x256, the file name starts with the class number) are not ImageNet's validation set: they serve to see
differences between versions of one network, not to state an accuracy. Weights and images are read from EDGEPRUNE_DATA.
The benchmark chooses channels and refits on every second image, without labels, and evaluates on these (`seen`) and on the others
(`new`), whose classes calibration has never seen: one image per class is all there is. Widths are multiples of 8. Writes imagenet.json
and imagenet.md into benchmarks/results, row by row.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import tarfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import edgeprune as ep
from benchmarks.cifar10 import data_folder
from benchmarks.graph import library_model
from benchmarks.revision import git_revision
from edgeprune.data import Augment, Data, load_data
from edgeprune.export.fold import fold_batchnorm
from edgeprune.run import write_atomic
from edgeprune.train.evaluate import evaluate
from edgeprune.train.reconstruct import reconstruct

SIDE = 224
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3
RESULTS = Path(__file__).parent / "results"
REMOVED = (20, 30)  # percent of the MACs
SCORING_IMAGES = 128
ROUND_TO = 8


@cache
def images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The centres of all images in the order of their classes: uint8 (1000, 224, 224, 3), int64 (1000,)."""
    found = []
    with tarfile.open(data_folder() / "imagenet" / "imagenet_sample1000_256px.tar") as archive:
        for member in archive.getmembers():
            name = member.name.rpartition("/")[2]
            if (file := archive.extractfile(member) if member.isfile() else None) is not None:
                with Image.open(io.BytesIO(file.read())) as image:
                    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
                    pixels = np.asarray(image.convert("RGB").crop((left, top, left + SIDE, top + SIDE)))
                found.append((int("".join(c for c in name.split("_")[0] if c.isdigit())), pixels))
    found.sort(key=lambda entry: entry[0])
    return np.stack([pixels for _, pixels in found]), np.array([label for label, _ in found], np.int64)


def efficientnet_lite0() -> nn.Module:
    """Timm's network of that name with the published weights, whose tensors come in the same order under other names."""
    model: nn.Module = library_model("timm:tf_efficientnet_lite0")
    path = data_folder() / "weights" / "efficientnet-lite0-57934424.pth"
    published = list(torch.load(path, map_location="cpu", weights_only=True).values())
    own = model.state_dict()
    if [v.shape for v in published] != [v.shape for v in own.values()]:
        raise ValueError(f"the tensors in {path} do not come in the order of timm's tf_efficientnet_lite0.")
    model.load_state_dict(dict(zip(own, published, strict=True)))
    return model.eval()


def halves() -> Data:
    """Every second image to calibrate on (`train`), the others to judge by (`val`)."""
    x, y = images()
    return load_data(((x[::2], y[::2]), (x[1::2], y[1::2])), mean=MEAN, std=STD)


def measure(model: nn.Module, data: Data, budgets: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row for the dense network and one per budget: accuracy in percent on the images seen and on new ones."""
    example = next(data.val.batches(1))[0]
    graph = ep.trace(model, example)
    rows = [{"removed": 0, "macs_share": 1.0, "params_share": 1.0, "accuracy": {"pruned": accuracies(model, data, example)}}]
    scoring = list(data.train.batches(32, shuffle_seed=0, limit=SCORING_IMAGES))
    scores = ep.score(graph, model, "reconstruction", data=scoring)
    for removed in budgets:
        plan = ep.allocate(graph, scores, ep.Budget(macs=1 - removed / 100), method="knapsack", round_to=ROUND_TO)
        small = ep.slim(model, graph, plan)
        started = time.process_time()
        fitted = reconstruct(small, model, graph, plan, data.train, augment=Augment(flip=True))
        seconds = round(time.process_time() - started, 1)
        slimmed = ep.trace(small, example)
        found = {name: accuracies(m, data, example) for name, m in (("pruned", small), ("reconstructed", fitted))}
        shares = {"macs_share": round(slimmed.macs / graph.macs, 4), "params_share": round(slimmed.params / graph.params, 4)}
        rows.append({"removed": removed, **shares, "accuracy": found, "reconstruction_cpu_seconds": seconds})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def accuracies(model: nn.Module, data: Data, example: torch.Tensor) -> dict[str, float]:
    """Top-1 in percent: {"seen": on the calibration images, "new": on the others}."""
    fast = fold_batchnorm(model, example)
    return {name: round(100 * evaluate(fast, part).accuracy, 2) for name, part in (("seen", data.train), ("new", data.val))}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = ["MACs", "params", "right after pruning: seen", "new", "after reconstruction: seen", "new"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows:
        change = [f"{100 * (r[share] - 1):+.1f}%" if r["removed"] else "dense" for share in ("macs_share", "params_share")]
        steps = [r["accuracy"].get(step) for step in ("pruned", "reconstructed")]
        cells = [f"{step[part]:.1f}" if step else "-" for step in steps for part in ("seen", "new")]
        lines.append(f"| {' | '.join(change + cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--removed", type=int, nargs="*", default=REMOVED, help="percent of the MACs")
    rows = measure(efficientnet_lite0(), halves(), tuple(parser.parse_args().removed))
    machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "torch": torch.__version__, "git": git_revision()}
    content = {"network": "EfficientNet-Lite0", "machine": machine, "round_to": ROUND_TO, "scoring": SCORING_IMAGES, "rows": rows}
    write_atomic(RESULTS / "imagenet.json", (json.dumps(content, indent=2) + "\n").encode())
    write_atomic(RESULTS / "imagenet.md", table(rows).encode())
    print(table(rows))


if __name__ == "__main__":
    main()
