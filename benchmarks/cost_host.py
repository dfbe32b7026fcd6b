"""Small networks measured on this machine with ONNX Runtime: the first guess of host-ort, until the tool measures for itself.

Every network is a chain of one kernel kind with elementwise kernels between, so that the kinds can be told apart.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from benchmarks.cost_tables import Layer, Row

OPSET, IR_VERSION = 17, 9
WARMUPS, RUNS, PASSES = 5, 30, 4

# (kind, channels, side, depth): from one cifar-sized block to a large stage.
CHAINS = (
    *(("conv3x3", c, s, d) for c, s, d in ((16, 32, 12), (32, 16, 12), (64, 8, 12), (64, 56, 2), (128, 28, 2), (256, 14, 2), (48, 20, 6))),
    *(("conv1x1", c, s, d) for c, s, d in ((32, 32, 8), (64, 16, 10), (128, 56, 2), (256, 28, 3), (512, 14, 4), (96, 20, 6))),
    *(("conv_other", c, s, d) for c, s, d in ((16, 32, 6), (64, 16, 4), (96, 28, 2))),
    *(("depthwise", c, s, d) for c, s, d in ((32, 32, 8), (96, 56, 3), (256, 14, 8), (576, 7, 8))),
    *(("grouped", c, s, d) for c, s, d in ((64, 28, 4), (256, 14, 4))),
    *(("linear", c, 1, d) for c, d in ((64, 6), (256, 4), (1024, 3))),
    *(("elementwise", c, s, d) for c, s, d in ((16, 32, 10), (64, 56, 8), (128, 28, 8))),
    *(("pool", c, s, d) for c, s, d in ((16, 32, 8), (64, 56, 4))),
)


def host_rows(threads: int) -> list[Row]:
    """Milliseconds of every chain on this machine: the median of its runs, the best of PASSES passes. Takes about a minute."""
    best = [math.inf] * len(CHAINS)
    for _ in range(PASSES):
        # Passes lie apart in time, so that other work on the machine does not slow the same chain in all of them.
        best = [min(known, _measure(*_chain(*chain), threads=threads)) for known, chain in zip(best, CHAINS, strict=True)]
    return [
        Row(f"{kind}-{channels}x{side}x{depth}", f"{kind}-{channels}", latency_ms, tuple(_layers(kind, channels, side) * depth))
        for latency_ms, (kind, channels, side, depth) in zip(best, CHAINS, strict=True)
    ]


def _kernel(kind: str, channels: int) -> tuple[int, int]:
    """(kernel side, groups)."""
    return {"conv1x1": 1, "conv_other": 5}.get(kind, 3), {"depthwise": channels, "grouped": 8}.get(kind, 1)


def _layers(kind: str, channels: int, side: int) -> list[Layer]:
    """One link of the chain: the kernel and an add."""
    elements = channels * side * side
    add = Layer("elementwise", 0, 2 * elements, elements, 0)
    if kind in ("elementwise", "pool"):
        return [Layer(kind, 0, elements, elements, 0), add]
    if kind == "linear":
        return [Layer(kind, channels * channels, channels, channels, channels * channels), add]
    k, groups = _kernel(kind, channels)
    weights = channels * channels // groups * k * k
    return [Layer(kind, side * side * weights, elements, elements, weights), add]


def _chain(kind: str, channels: int, side: int, depth: int) -> tuple[bytes, Sequence[int]]:
    shape = [1, channels] if kind == "linear" else [1, channels, side, side]
    rng, nodes, weights, last = np.random.default_rng(0), [], [], "x"
    for link in range(depth):
        middle, new = f"m{link}", f"y{link}"
        if kind == "elementwise":
            nodes.append(helper.make_node("Sigmoid", [last], [middle]))
        elif kind == "pool":
            nodes.append(helper.make_node("AveragePool", [last], [middle], kernel_shape=[3, 3], pads=[1] * 4))
        else:
            k, groups = _kernel(kind, channels)
            size = [channels, channels] if kind == "linear" else [channels, channels // groups, k, k]
            values = (rng.standard_normal(size) / np.sqrt(np.prod(size[1:]))).astype(np.float32)
            weights.append(onnx.numpy_helper.from_array(values, f"w{link}"))
            attributes: dict[str, Any] = {} if kind == "linear" else {"kernel_shape": [k, k], "pads": [k // 2] * 4, "group": groups}
            nodes.append(helper.make_node("Gemm" if kind == "linear" else "Conv", [last, f"w{link}"], [middle], **attributes))
        nodes.append(helper.make_node("Add", [middle, last], [new]))
        last = new
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return model.SerializeToString(), shape


def _measure(model: bytes, shape: Sequence[int], *, threads: int) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    for _ in range(WARMUPS):
        session.run(None, feed)
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)
