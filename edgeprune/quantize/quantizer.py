"""The quantizer that `export(…, quantizer=)` takes: calibrates on real images, decides what is asked to be decided, writes the file.

For ONNX, variants of the network (as it is; biases corrected; ranges equalised and biases corrected) are all written and the one whose
outputs are closest to the fp32 network's on calibration images is kept, so that neither step is applied where it does harm. The
decisions are on record in `facts`. TFLite files are made by litert-quantizer from the same ranges' images (tflite.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeprune.data import Split
from edgeprune.errors import UsageError
from edgeprune.export import Draft
from edgeprune.quantize.bits import WEIGHT_BITS, BitPlan, Method
from edgeprune.quantize.calibrate import Batch, Means, Ranges, observe, runner
from edgeprune.quantize.network import Network
from edgeprune.quantize.preparation import corrected, equalized
from edgeprune.quantize.qdq import observed_tensors, write_qdq

LEAST_SQNR_DB = 6.0  # on the parity samples: less is noise, not a network
VARIANTS = ("plain", "bias", "equalized")
_BATCH = 32
_JUDGED = 128  # images that choose between variants

Plans = Callable[[onnx.ModelProto, Callable[[BitPlan], onnx.ModelProto], "CalibrationImages"], BitPlan]


@dataclass(frozen=True, eq=False)
class CalibrationImages:
    """Some images of a split, read again for every pass: (images float32 (n, c, h, w), labels), the same in every pass."""

    split: Split
    limit: int = 256
    seed: int = 0

    def __len__(self) -> int:
        return min(self.limit, len(self.split))

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """As NumPy arrays, at most `limit` images."""
        for images, labels in self.split.batches(_BATCH, shuffle_seed=self.seed, limit=min(self.limit, limit or self.limit)):
            yield images.numpy(), labels.numpy()

    @cached_property
    def sha256(self) -> str:
        """Hash of the images as the network is fed them."""
        digest = hashlib.sha256()
        for images, _ in self.batches():
            digest.update(np.ascontiguousarray(images).tobytes())
        return digest.hexdigest()


@dataclass(eq=False)
class BitQuantizer:
    """A Quantizer (see edgeprune.export). `plan`: what to write; None: every layer int8; a function chooses one for the network.

    `method`: of calibration; `variants`: which preparations may be tried. After a call `chosen` holds the plan that was written and
    `facts` how it was come to.
    """

    images: CalibrationImages
    plan: BitPlan | Plans | None = None
    method: Method = "minmax"
    variants: tuple[str, ...] = VARIANTS
    least_sqnr_db: float = LEAST_SQNR_DB
    chosen: BitPlan = field(default_factory=lambda: BitPlan({}), init=False)
    facts: dict[str, Any] = field(default_factory=dict, init=False)
    bits: Mapping[str, int | float] = field(default_factory=dict, init=False)

    def __call__(self, draft: Draft) -> bytes:
        """The quantized file. Raises UsageError for a format that cannot be quantized, DataError for unusable images."""
        if draft.format == "onnx":
            content, self.chosen = self._onnx(draft)
        elif draft.format == "tflite":
            content, self.chosen = self._tflite(draft)
        else:
            raise UsageError(f"artifacts of the format {draft.format!r} cannot be quantized; use onnx or tflite, or --quantize none.")
        self.bits = {name: self._mean_bits(name) for name in draft.layers}
        return content

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Into the artifact: how it was quantized, its bit plan, and on which images it was calibrated."""
        return {
            "quantize": "int8" if set(self.bits.values()) <= {8} else "mixed",
            "bitplan": json.dumps(self.chosen.to_json(), sort_keys=True),
            "bitplan_sha256": self.chosen.sha256,
            "calibration_method": self.method,
            "calibration_images": len(self.images),
            "calibration_sha256": self.images.sha256,
        }

    def _mean_bits(self, layer: str) -> float:
        bits = self.chosen.channels.get(layer)
        return float(np.mean(bits)) if bits else WEIGHT_BITS[self.chosen.precision(layer)]

    def _onnx(self, draft: Draft) -> tuple[bytes, BitPlan]:
        proto = onnx.load_model_from_string(draft.content)
        ranges: dict[int, Any] = {}

        def write(network: onnx.ModelProto, plan: BitPlan, *, bias: bool) -> onnx.ModelProto:
            if id(network) not in ranges:
                ranges[id(network)] = self._calibrated(network)
            found, means = ranges[id(network)]
            return write_qdq(corrected(network, plan, means) if bias else network, plan, found)

        plan = self.plan or BitPlan(dict.fromkeys(Network(proto).layers, "int8"))
        if not isinstance(plan, BitPlan):
            plan = plan(proto, lambda tried: write(proto, tried, bias=True), self.images)
        balanced = equalized(proto) if "equalized" in self.variants else proto
        made: dict[str, Callable[[], Any]] = {
            "plain": lambda: write(proto, plan, bias=False),
            "bias": lambda: write(proto, plan, bias=True),
        }
        if balanced is not proto:
            made["equalized"] = lambda: write(balanced, plan, bias=True)
        tried = {name: make() for name, make in made.items() if name in self.variants}
        errors = self._errors(proto, tried) if len(tried) > 1 else dict.fromkeys(tried, 0.0)
        best = min(errors, key=lambda name: errors[name])
        self.facts |= {"variant": best, "sqnr_db": {name: round(-10 * float(np.log10(max(e, 1e-12))), 2) for name, e in errors.items()}}
        return tried[best].SerializeToString(), plan

    def _calibrated(self, proto: onnx.ModelProto) -> tuple[Mapping[str, Any], Mapping[str, NDArray[np.float64]]]:
        """(ranges, mean inputs of the layers) of one network on the calibration images."""
        network = Network(proto)
        ranges, means = Ranges(observed_tensors(network), self.method), Means([layer.input for layer in network.layers.values()])
        observe(proto, self.images.batches(), ranges, means)
        return ranges.found(), means.found()

    def _errors(self, proto: onnx.ModelProto, variants: Mapping[str, onnx.ModelProto]) -> dict[str, float]:
        """Power of each variant's error over that of the fp32 network's outputs, on calibration images."""
        runs = {name: runner(variant) for name, variant in variants.items()}
        reference, power = runner(proto), 0.0
        errors = dict.fromkeys(variants, 0.0)
        for images, _ in self.images.batches(_JUDGED):
            for start in range(0, len(images), _BATCH):
                expected = reference(images[start : start + _BATCH])
                power += float(np.square(expected).sum())
                for name, run in runs.items():
                    errors[name] += float(np.square(run(images[start : start + _BATCH]) - expected).sum())
        return {name: error / max(power, 1e-30) for name, error in errors.items()}

    def _tflite(self, draft: Draft) -> tuple[bytes, BitPlan]:
        from edgeprune.quantize.tflite import quantized

        if self.method != "minmax":
            raise UsageError(f"TFLite artifacts are calibrated by minmax, not by {self.method}: use the format onnx alone, or minmax.")
        plan = self.plan or BitPlan(dict.fromkeys(draft.layers, "int8"))
        if not isinstance(plan, BitPlan) and self.bits:
            plan = self.chosen  # for the ONNX file just before
        if not isinstance(plan, BitPlan):
            raise UsageError(
                "mixed precision is chosen by measuring ONNX files: put onnx before tflite in --format, or use --quantize int8."
            )
        batches = (draft.as_fed(images) for images, _ in self.images.batches())
        return quantized(draft.content, draft.layers, plan, batches), plan
