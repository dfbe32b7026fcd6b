"""int8 TFLite files by litert-quantizer: full-integer inside, float32 at both ends, ranges the union over all images.

litert-quantizer's own calibration is a moving average of the images' ranges, which clips; the union is what it is given here. Layers
that stay fp32 are named to it by the tensors their operations make. It is an extra and is imported only when it works.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import ExportError, UsageError
from edgeprune.export.flatbuffer import unpacked
from edgeprune.export.tflite import silent
from edgeprune.quantize.bits import BitPlan


def quantized(content: bytes, layers: Mapping[str, str], plan: BitPlan, batches: Iterable[NDArray[np.float32]]) -> bytes:
    """The file with the layers of the plan in int8; `layers`: layer -> weight tensor; `batches` as the file is fed, batch first.

    Raises UsageError for precisions that it does not write, ExportError where the quantizer is not installed or fails.
    """
    if plan.channels or (other := sorted({plan.precision(name) for name in layers} - {"int8", "fp32"})):
        what = "bits per channel" if plan.channels else other[0]
        raise UsageError(f"TFLite artifacts are written in int8 and fp32, not with {what}: use the format onnx.")
    try:
        from ai_edge_litert.interpreter import Interpreter
        from litert_quantizer import Quantizer, algorithm_manager, calibrator, qtyping, recipe_manager
        from litert_quantizer.utils import qsv_utils
    except ImportError as error:
        raise ExportError(
            f"quantizing .tflite files needs litert-quantizer, which is an extra ({error}): pip install 'edgeprune[tflite]'."
        ) from error
    operations, nothing = qtyping.TFLOperationName, algorithm_manager.AlgorithmName.NO_QUANTIZE
    recipe = recipe_manager.RecipeManager()
    recipe.add_static_config(".*", operations.ALL_SUPPORTED, 8, 8)
    for end in (operations.INPUT, operations.OUTPUT):
        recipe.add_quantization_config(".*", end, algorithm_key=nothing)
    for name in _made(content, [tensor for layer, tensor in layers.items() if plan.precision(layer) == "fp32"]):
        recipe.add_quantization_config(f"^{re.escape(name)};", operations.ALL_SUPPORTED, algorithm_key=nothing)
    signature, taken = next(iter(Interpreter(model_content=content).get_signature_list().items()))
    feed = taken["inputs"][0]
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), silent(), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            warnings.simplefilter("ignore")
            watch: Any = calibrator.Calibrator(content, num_threads=1, qsv_update_func=qsv_utils.min_max_update)
            for batch in batches:  # a part at a time: it counts what it is given before it reads it
                watch.calibrate({signature: [{feed: batch[i : i + 1]} for i in range(len(batch))]}, recipe)
            made = Quantizer(content, recipe.get_quantization_recipe()).quantize(watch.get_model_qsvs(), enable_progress_report=False)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"litert-quantizer cannot quantize this network: {error}. Use the format onnx, or --quantize none.") from error
    finally:
        logging.disable(previous)
    return bytes(made.quantized_model)


def _made(content: bytes, weights: list[str]) -> list[str]:
    """The tensors made by the operations that read these weights."""
    graph = unpacked(content).subgraphs[0]
    names = [tensor.name.decode() for tensor in graph.tensors]
    return [names[o.outputs[0]] for o in graph.operators if any(i >= 0 and names[i] in weights for i in o.inputs)]
