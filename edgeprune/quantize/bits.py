"""How many bits every layer gets, and every channel inside a layer: the plain value BitPlan. No torch here.

A layer is a conv or linear, by the name of its module ("layer1.0.conv1"). Its precision is one of
    fp32   weights and arithmetic in float32
    fp16   weights stored in 16 bits, arithmetic in float32: smaller, not faster
    int4   weights stored in 4 bits with a scale per output channel, arithmetic in float32: smaller, not faster
    int8   8-bit weights (a scale per output channel) and 8-bit activations: smaller, and faster where the device has the kernels
Inside an int8 layer, output channels may have fewer bits: their weights lie on a coarser grid, stored as int8 for the same kernels,
so that the file compresses better. No runtime computes faster below 8 bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from edgeprune.errors import UsageError

Precision = Literal["fp32", "fp16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
WEIGHT_BITS: Mapping[Precision, int] = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
CHANNEL_BITS = (2, 3, 4, 6, 8)
Method = Literal["minmax", "percentile", "entropy"]  # of calibration, see calibrate.py
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class BitPlan:
    """`layers[name]` is the precision of a layer; a layer that is not named stays fp32.

    `channels[name]`: the bits of each output channel of an int8 layer, (channels,), each 2 to 8 (those chosen here are of CHANNEL_BITS);
    layers without an entry have 8 everywhere. Raises UsageError for anything else.
    """

    layers: Mapping[str, Precision]
    channels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, precision in self.layers.items():
            if precision not in PRECISIONS:
                raise UsageError(f"the precision of {name} must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        for name, bits in self.channels.items():
            if self.layers.get(name) != "int8":
                raise UsageError(f"the channels of {name} have bits of their own, so the layer must be int8, not {self.precision(name)}.")
            if odd := [b for b in bits if not 2 <= b <= 8]:
                raise UsageError(f"the bits of a channel must be 2 to 8, got {odd[0]!r} in {name}.")

    def precision(self, layer: str) -> Precision:
        """The precision of a layer."""
        return self.layers.get(layer, "fp32")

    def mean_bits(self, weights: Mapping[str, tuple[int, ...]]) -> float:
        """Bits per weight over the layers of `weights`, shapes with the output channels first."""
        bits = total = 0.0
        for name, shape in weights.items():
            per_channel = math.prod(shape[1:])
            widths = self.channels.get(name) or (WEIGHT_BITS[self.precision(name)],) * shape[0]
            bits += per_channel * sum(widths)
            total += per_channel * shape[0]
        return bits / total

    def to_json(self) -> dict[str, Any]:
        """Plain values, for bitplan.json."""
        return {"layers": dict(self.layers), "channels": {name: list(bits) for name, bits in self.channels.items()}}

    @staticmethod
    def from_json(text: Mapping[str, Any]) -> BitPlan:
        """The inverse of `to_json`."""
        return BitPlan(dict(text["layers"]), {str(name): tuple(map(int, bits)) for name, bits in text["channels"].items()})

    @property
    def sha256(self) -> str:
        """Hash of the plan, the same for equal plans; written into artifacts."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
