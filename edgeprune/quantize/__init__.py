"""From fp32 to few bits: which layer and which channel gets how many, calibrated on real images, written for the runtimes.

bits.py is the plan; network.py reads an ONNX network; calibrate.py sees its activations; grid.py rounds weights; preparation.py makes
ranges and biases fit; influence.py says what rounding costs, channels.py and mixed.py (for another device: elsewhere.py) decide with it;
qdq.py and tflite.py write the files; quantizer.py is what export() takes; size.py says beforehand how large they become. Nothing heavy
is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeprune.errors import DataError, UsageError
from edgeprune.quantize.bits import METHODS, BitPlan, Precision

if TYPE_CHECKING:
    from edgeprune.data import Data
    from edgeprune.quantize.elsewhere import Elsewhere
    from edgeprune.quantize.quantizer import BitQuantizer

WAYS = ("none", "int8", "mixed")


def check_way(way: str, data: object, method: str = "minmax") -> None:
    """Raises UsageError for what is not one of WAYS or METHODS, DataError where calibration would have no images."""
    if way not in WAYS:
        raise UsageError(f"quantize must be one of {', '.join(WAYS)}, got {way!r}.")
    if method not in METHODS:
        raise UsageError(f"the calibration method must be one of {', '.join(METHODS)}, got {method!r}.")
    if way != "none" and data is None:
        raise DataError(f"quantizing to {way} calibrates on real images: give --data.")


def quantizer_for(
    way: str,
    data: Data | None,
    *,
    threads: int = 1,
    latency_ms: float | None = None,
    size_bytes: float | None = None,
    elsewhere: Elsewhere | None = None,
    method: str = "minmax",
    seed: int = 0,
    images: int = 256,
) -> Any:
    """What `export(…, quantizer=)` takes for a way of WAYS: None for "none". Calibrates on training images, else on validation ones.

    mixed: chosen by timings of this machine with `threads`, or for a device that is `elsewhere`; `latency_ms` and `size_bytes` are the
    budget, without a latency the fastest mix is taken. method: how ranges are calibrated, one of METHODS (TFLite files: only minmax).
    """
    check_way(way, data, method)
    if way == "none" or data is None:
        return None
    from edgeprune.quantize.quantizer import BitQuantizer, CalibrationImages

    split = data.train if len(data.train) else data.val
    calibration = CalibrationImages(split, limit=images, seed=seed)
    known = next(name for name in METHODS if name == method)
    if way == "int8":
        return BitQuantizer(calibration, method=known)
    from edgeprune.quantize.mixed import mixed_plan

    quantizer: BitQuantizer = BitQuantizer(calibration, method=known)

    def choose(proto: Any, write: Any, shown: CalibrationImages) -> BitPlan:
        limits: dict[str, Any] = {"latency_ms": latency_ms, "size_bytes": size_bytes}
        found = mixed_plan(proto, write, shown.batches, threads=threads, elsewhere=elsewhere, **limits)
        quantizer.facts |= {"mixed": dict(found.facts)}
        return found.plan

    quantizer.plan = choose
    return quantizer


__all__ = ["WAYS", "BitPlan", "Precision", "check_way", "quantizer_for"]
