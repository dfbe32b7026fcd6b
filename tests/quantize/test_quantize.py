from __future__ import annotations

import subprocess
import sys

import pytest

from edgeprune.errors import DataError, UsageError
from edgeprune.quantize import check_way, quantizer_for
from tests.quantize.onnx_nets import data


def test_ways() -> None:
    assert quantizer_for("none", None) is None
    assert quantizer_for("int8", data(), images=10).images.limit == 10
    assert callable(quantizer_for("mixed", data()).plan)
    with pytest.raises(UsageError, match="int9"):
        check_way("int9", None)
    with pytest.raises(DataError, match="--data"):
        quantizer_for("mixed", None)


def test_importing_it_is_light() -> None:
    code = "import sys, edgeprune.quantize; sys.exit(bool({'onnx', 'onnxruntime', 'litert_quantizer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
