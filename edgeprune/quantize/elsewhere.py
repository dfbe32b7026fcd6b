"""What a mixed plan for another device can know: fp32 times from its card, and its own timings where a board is attached."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from edgeprune.device.card import Device
from edgeprune.device.cost import predict_graph
from edgeprune.device.measure import QUICK, measure
from edgeprune.graph.trace import trace

Ratio = Callable[[onnx.ModelProto, onnx.ModelProto], float]


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """A device that is not this machine.

    layer_ms: what its card says each layer takes in fp32, empty where the card cannot predict. ratio: how much longer the first of two
    networks takes there than the second, by measurement; None where no board is attached.
    """

    name: str
    layer_ms: Mapping[str, float]
    ratio: Ratio | None = None

    @property
    def basis(self) -> str:
        """On what a plan for it rests, in words."""
        there = f"fp32 predicted for {self.name}; int8 over fp32 of every layer as on this machine: an assumption for {self.name}"
        return f"{there}; repaired by timings there" if self.ratio else f"{there}, not measured"


def elsewhere(device: Device, model: nn.Module, example_inputs: Sequence[Any]) -> Elsewhere | None:
    """What is known of `model` on the device; None for this machine, which is timed."""
    if device.attached and device.host in ("", "local"):
        return None
    layers = predict_graph(trace(model, example_inputs), None, device).per_layer if device.predicts else ()
    return Elsewhere(device.profile, {layer.name: layer.latency_ms for layer in layers}, _timed(device) if device.attached else None)


def _timed(device: Device) -> Ratio:
    def ratio(one: onnx.ModelProto, other: onnx.ModelProto) -> float:
        with tempfile.TemporaryDirectory() as folder:
            taken = []
            for number, network in enumerate((one, other)):
                file = Path(folder) / f"{number}.onnx"
                file.write_bytes(network.SerializeToString())
                taken.append(measure(file, device, **QUICK).latency_ms)
        return taken[0] / taken[1]

    return ratio
