"""How large a quantized file becomes, before there is one: what a size budget allows the pruning that comes first. No torch here.

Constants of the files export writes (ResNet-20, ResNet-56 and EfficientNet-Lite0 in int8 lie 2 to 6 % below what they give).
"""

from __future__ import annotations

from edgeprune.device.kernels import FILE_BYTES, FLOAT_BYTES, KERNEL_FILE_BYTES, kernels
from edgeprune.graph import ChannelGraph

WEIGHT_BYTES = {"none": 4.0, "int8": 1.0, "mixed": 2.0}  # at most: a mixed plan can store its float layers in 16 bits
CHANNEL_BYTES = 17  # beside a channel's weights: two scales, two zero points, a bias
LAYER_BYTES, KERNEL_BYTES = 1100, 400  # the nodes and names around a layer, and around a kernel without weights


def float32_limit(size_bytes: float, way: str, graph: ChannelGraph) -> float:
    """How large a float32 file may be whose form, quantized in this way, has at most `size_bytes`; from below, 1 at least.

    Channels are counted as in the dense network.
    """
    slope, float32_fixed, fixed = _line(way, graph)
    return size_bytes if way == "none" else max(1.0, (size_bytes - fixed) / slope + float32_fixed)


def quantized_size(float32_bytes: float, way: str, graph: ChannelGraph) -> float:
    """The inverse: at most so large is a float32 file of this size when it is quantized in this way."""
    slope, float32_fixed, fixed = _line(way, graph)
    return float32_bytes if way == "none" else (float32_bytes - float32_fixed) * slope + fixed


def _line(way: str, graph: ChannelGraph) -> tuple[float, float, float]:
    """Bytes in the quantized file for one in the float32 file, and what surrounds the weights in the float32 and the quantized one."""
    made = kernels(graph)
    dense = made.at(graph.dense_widths[None])
    layers = dense.weight_elements[0] > 0
    fixed = FILE_BYTES + CHANNEL_BYTES * dense.channels[0, layers].sum() + LAYER_BYTES * layers.sum() + KERNEL_BYTES * (~layers).sum()
    return WEIGHT_BYTES[way] / FLOAT_BYTES, FILE_BYTES + KERNEL_FILE_BYTES * len(made.names), float(fixed)
