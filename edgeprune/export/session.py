"""ONNX Runtime on this machine, opened in one way for parity, calibration and timing. Boards have device/agent.py, which stands alone."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime


def session_of(network: bytes | onnx.ModelProto, **options: Any) -> onnxruntime.InferenceSession:
    """A session on the CPU that prints nothing: its errors are exceptions. `options`: attributes of onnxruntime.SessionOptions."""
    chosen = onnxruntime.SessionOptions()
    for name, value in {"log_severity_level": 4, **options}.items():
        setattr(chosen, name, value)
    content = network if isinstance(network, bytes) else network.SerializeToString()
    return onnxruntime.InferenceSession(content, chosen, providers=["CPUExecutionProvider"])
