"""EfficientNet-Lite0 with its published weights, and 1,000 ImageNet images to compare its versions on.

The images (one per class, 256x256, the file name starts with the class number) are not ImageNet's validation set: they serve to see
differences between versions of one network, not to state an accuracy. Weights and images are read from EDGEPRUNE_DATA.
"""

from __future__ import annotations

import io
import tarfile
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from benchmarks.cifar10 import data_folder
from benchmarks.graph import library_model

SIDE = 224
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3


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
