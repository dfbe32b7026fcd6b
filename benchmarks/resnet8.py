"""MLPerf Tiny's ResNet-8 for CIFAR-10 with its published weights, and what its own float and int8 files reach.

The weights are read from the float .tflite file in EDGEPRUNE_DATA; its batch norms are folded already. Images are fed as they are, 0 to
255. The files are Apache-2.0, of github.com/mlcommons/tiny.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cifar10 import data_folder
from edgeprune.data import Split
from edgeprune.export.flatbuffer import unpacked

MEAN, STD = (0.0,) * 3, (1 / 255,) * 3
FLOAT, INT8 = "mlperf_tiny_pretrainedResnet.tflite", "mlperf_tiny_pretrainedResnet_quant.tflite"


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the width doubles."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1 if self.stride == 1 else 0)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, self.stride) if self.stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        padded = x if self.stride == 1 else functional.pad(x, (0, 1, 0, 1))  # TensorFlow's SAME of a stride of two
        return functional.relu(self.conv2(functional.relu(self.conv1(padded))) + self.shortcut(x))


class ResNet8(nn.Module):
    """A stem, blocks of 16, 32 and 64 channels, and a classifier; logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(16, 16), Block(16, 32), Block(32, 64))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) -> (n, 10)."""
        made: Tensor = self.fc(self.blocks(functional.relu(self.stem(x))).mean(dim=(2, 3)))
        return made


def trained() -> nn.Module:
    """With the published weights, matched by shape; the two layers of one shape run in the order in which both have them."""
    model = unpacked((data_folder() / "weights" / FLOAT).read_bytes())
    graph = model.subgraphs[0]

    def values(index: int) -> NDArray[np.float32]:
        tensor = graph.tensors[index]
        return np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.float32).reshape(tensor.shape)

    found: dict[tuple[int, ...], list[tuple[NDArray[Any], NDArray[Any]]]] = {}
    for operator in graph.operators:
        if len(operator.inputs) == 3:  # convolutions and the classifier: input, weight, bias
            weight = values(operator.inputs[1])
            weight = weight.transpose(0, 3, 1, 2) if weight.ndim == 4 else weight
            found.setdefault(weight.shape, []).append((weight.copy(), values(operator.inputs[2]).copy()))
    made = ResNet8().eval()
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight, bias = found[tuple(layer.weight.shape)].pop(0)
            layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return made


def published(split: Split) -> dict[str, Any]:
    """A row of the int8 table for the files as MLPerf Tiny ships them."""
    files = [data_folder() / "weights" / name for name in (FLOAT, INT8)]
    right = [_accuracy(file.read_bytes(), split) for file in files]
    sizes = [file.stat().st_size for file in files]
    return {
        "network": "resnet8, as published",
        "format": "tflite",
        "images": len(split),
        "fp32": right[0],
        "int8": right[1],
        "bytes": sizes,
        "transfer_bytes": None,
    }


def _accuracy(content: bytes, split: Split) -> float:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (takes,), (gives,) = interpreter.get_input_details(), interpreter.get_output_details()
    scale, zero = takes["quantization"]
    right = 0
    for images, labels in split.batches(100):
        for image, label in zip(images.permute(0, 2, 3, 1).numpy(), labels.numpy(), strict=True):
            fed = image if takes["dtype"] is np.float32 else np.clip(np.rint(image / scale) + zero, -128, 127)
            interpreter.set_tensor(takes["index"], fed[None].astype(takes["dtype"]))
            interpreter.invoke()
            right += int(interpreter.get_tensor(gives["index"]).argmax() == label)
    return right / len(split)
