"""The ONNX artifact: batch norms folded, simplified, checked against the network on real inputs, described by its metadata.

The file carries a hash of its own content, so that damage is noticed when it is loaded, wherever the file has travelled.
"""

from __future__ import annotations

import hashlib
import json
import resource
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim
import psutil
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no stubs
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeprune.errors import ExportError, UnsupportedOp, UsageError
from edgeprune.export import Arrays, Artifact, Draft, Quantizer, Runner
from edgeprune.export.fold import as_args, frozen_copy
from edgeprune.export.parity import accept, compare, numbered, probe_of, recorded, texts, write_checked
from edgeprune.export.prepare import NETWORK_ERRORS, explained, prepared
from edgeprune.export.session import session_of
from edgeprune.graph.running import first_line, forget, quiet_torch, silent_torch
from edgeprune.run import product_version

# onnxruntime's errors share no base class of their own
_RUNTIME_ERRORS = tuple(e for e in vars(ort_state).values() if isinstance(e, type) and issubclass(e, Exception))
_EXPORT_ERRORS = (torch.onnx.OnnxExporterError, *NETWORK_ERRORS)
_CONTENT_HASH = "content_sha256"
_FIRST_USE_BYTES = 96_000_000  # of address space, which stay taken: the smallest network fails with 94 MB, not with 126


class OnnxFormat:
    """The format "onnx", run by onnxruntime."""

    name = "onnx"
    suffix = ".onnx"

    def export(
        self,
        model: nn.Module,
        example_inputs: Tensor | Sequence[Tensor],
        path: Path,
        *,
        samples: Tensor | Sequence[Tensor] | None,
        metadata: Mapping[str, Any] | None,
        tolerance: float,
        quantizer: Quantizer | None,
        reference: nn.Module | None,
        layout: str | None,
    ) -> Artifact:
        """See `edgeprune.export.export`; the opset is what the exporter gives (20 in torch 2.13).

        The batch dimension is dynamic where the network allows it, else that of the example. Inputs are named input (or input_0,
        input_1 …), outputs output. Parity is checked on `samples` as one batch and as the first sample alone. edgeprune_version and
        content_sha256 are added to the metadata. Takes 1 s for a tiny network, 4 s for ResNet-56 on one idle core.
        """
        if layout not in (None, "NCHW"):
            raise UsageError(f"onnx artifacts keep the network's own layout (NCHW), got {layout!r}; NHWC is for tflite.")
        network = prepared(model, example_inputs)
        original = network.original if reference is None else frozen_copy(reference).cpu()
        proto = _simplified(_stripped(_convert(network.lean, network.args)))
        if quantizer is not None:
            layers = _layers(proto, network.lean)
            draft = Draft(format=self.name, content=proto.SerializeToString(), layers=layers, as_fed=lambda array: array)
            proto = onnx.load_model_from_string(quantizer(draft))
        extra = {"layout": "NCHW", "quantize": "none", **(quantizer.metadata if quantizer else {}), **(metadata or {})}
        if probe := probe_of(original, _runner(proto.SerializeToString(), path), network.args):
            extra["probe"] = probe
        _describe(proto, extra)
        fixed_batch = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value  # 0 where it is dynamic
        inputs = network.args if samples is None else tuple(s.detach().cpu() for s in as_args(samples))

        def verify(file: Path) -> Artifact:
            parity = compare(original, self.load(file), inputs, batch=fixed_batch)
            accept(parity, path.name, tolerance=tolerance, quantizer=quantizer)
            opset = next(o.version for o in proto.opset_import if o.domain == "")
            facts = {"format": self.name, "opset": opset, "dynamic_batch": not fixed_batch, "metadata": read_metadata(proto)}
            return recorded(parity, file, path, quantizer, **facts)

        return write_checked(proto.SerializeToString(), path, verify)

    def load(self, path: Path) -> Runner:
        """A function from input arrays to output arrays (onnxruntime, CPU). Raises ExportError for a damaged or unusable file.

        The function raises ExportError for inputs the artifact does not take.
        """
        try:
            content = path.read_bytes()
            proto = onnx.load_model_from_string(content)
            expected = read_metadata(proto).get(_CONTENT_HASH)
            if expected and expected != _content_hash(proto):
                raise ExportError(
                    f"{path} was changed after it was written: its content does not match the hash it carries. Export it again."
                )
        except (DecodeError, OSError) as error:
            raise ExportError(f"{path} is not a usable ONNX file (truncated or damaged?): {first_line(error)}. Export it again.") from error
        return _runner(content, path)


def _runner(content: bytes, path: Path) -> Runner:
    try:
        session = session_of(content)
    except _RUNTIME_ERRORS as error:
        raise ExportError(f"{path} is not a usable ONNX file (truncated or damaged?): {first_line(error)}. Export it again.") from error
    names = [i.name for i in session.get_inputs()]

    def run(inputs: Arrays) -> list[NDArray[Any]]:
        arrays = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
        if len(arrays) != len(names):
            raise ExportError(f"{path} takes {len(names)} input(s) ({', '.join(names)}), got {len(arrays)}.")
        try:
            outputs: list[NDArray[Any]] = session.run(None, dict(zip(names, arrays, strict=True)))
        except _RUNTIME_ERRORS as error:
            raise ExportError(f"{path} does not run on inputs of shape {[a.shape for a in arrays]}: {first_line(error)}.") from error
        return outputs

    return run


def read_metadata(source: str | Path | onnx.ModelProto) -> dict[str, str]:
    """The metadata an artifact carries (preprocessing, labels, plan_sha256, edgeprune_version …), text by key."""
    if isinstance(source, onnx.ModelProto):
        return {p.key: p.value for p in source.metadata_props}
    try:
        return read_metadata(onnx.load_model_from_string(Path(source).read_bytes()))
    except (DecodeError, OSError) as error:
        raise ExportError(f"{source} is not a readable ONNX file: {first_line(error)}.") from error


def stored_bits(path: Path) -> dict[str, int]:
    """In how many bits the weights of every layer are stored, by torch's name of the layer."""
    kinds = onnx.TensorProto
    widths = {kinds.FLOAT: 32, kinds.FLOAT16: 16, kinds.INT8: 8, kinds.UINT8: 8, kinds.INT4: 4, kinds.UINT4: 4}
    graph = onnx.load_model_from_string(path.read_bytes()).graph
    named = [(i.name.partition(".weight"), widths.get(i.data_type, 0)) for i in graph.initializer if i.dims and len(i.dims) > 1]
    return {name: bits for (name, dot, _), bits in named if dot}


def _layers(proto: onnx.ModelProto, model: nn.Module) -> dict[str, str]:
    """Conv and linear layers whose weight is an initializer under its parameter's name, which the exporter keeps."""
    there = {i.name for i in proto.graph.initializer}
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return {
        name: f"{name}.weight".lstrip(".")
        for name, m in model.named_modules()
        if isinstance(m, kinds) and f"{name}.weight".lstrip(".") in there
    }


def _convert(model: nn.Module, args: tuple[Tensor, ...]) -> onnx.ModelProto:
    """The exporter's model, batch dynamic if that works. A batch of 2 is traced because sizes 0 and 1 are taken as constants."""
    if len({len(a) for a in args if a.ndim}) == 1 and all(a.ndim for a in args):
        pairs = tuple(torch.cat([a, a]) if len(a) == 1 else a for a in args)
        try:
            return _export(model, pairs, ({0: torch.export.Dim("batch")},) * len(args))
        except UnsupportedOp:
            raise
        except ExportError:  # a size that depends on the batch: the example's batch is what is left
            pass
    return _export(model, args, None)


@lru_cache  # once per process
def _room_for_the_exporter() -> None:
    """Raises MemoryError where the address space is limited and too little of it is left for the exporter's first use.

    torch's operator tables look at no allocation: they end in a segmentation fault, or in "could not get source code".
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    left = limit - psutil.Process().memory_info().vms
    if limit != resource.RLIM_INFINITY and left < _FIRST_USE_BYTES:
        takes = f"torch's ONNX exporter takes {_FIRST_USE_BYTES / 1e6:.0f} MB"
        raise MemoryError(f"of the address space (ulimit -v) {max(left, 0) / 1e6:.0f} MB are left, {takes}")


def _export(model: nn.Module, args: tuple[Tensor, ...], dynamic: tuple[dict[int, Any], ...] | None) -> onnx.ModelProto:
    _room_for_the_exporter()
    try:
        with torch.no_grad():
            outputs = len(tree_leaves(model(*(a.clone() for a in args))))
        with silent_torch(), quiet_torch():
            # several inputs share the one axis name, which is the point
            warnings.filterwarnings("ignore", message="# The axis name: batch will not be used", category=UserWarning)
            program = torch.onnx.export(
                model,
                args,
                dynamo=True,
                verbose=False,
                dynamic_shapes=dynamic,
                input_names=numbered("input", len(args)),
                output_names=numbered("output", outputs),
            )
    except _EXPORT_ERRORS as error:
        raise explained(error, "ONNX", model, args) from error
    if program is None:
        raise ExportError("the exporter gave no ONNX program for this model.")
    proto: onnx.ModelProto = program.model_proto
    if program.exported_program is not None:
        forget(program.exported_program.graph)
    return proto


def _stripped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without the exporter's notes (module paths, stack traces): 200 KB in MobileNetV2, and paths of this machine."""
    for part in (
        proto,
        proto.graph,
        *proto.graph.node,
        *proto.graph.initializer,
        *proto.graph.value_info,
        *proto.graph.input,
        *proto.graph.output,
    ):
        del part.metadata_props[:]
        part.doc_string = ""
    return proto


def _simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxsim gives, or the model as it was where onnxsim cannot handle it: that costs tidiness, not correctness."""
    try:
        with silent_torch():
            simple, same = onnxsim.simplify(proto)
    except (RuntimeError, ValueError, onnx.checker.ValidationError):
        return proto
    return simple if same else proto


def _describe(proto: onnx.ModelProto, metadata: Mapping[str, Any]) -> None:
    """Check the model, then write the metadata and the hash of the graph into it."""
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported model is not valid ONNX: {first_line(error)}.") from error
    proto.producer_name, proto.producer_version = "edgeprune", product_version()
    onnx.helper.set_model_props(proto, texts(metadata) | {"edgeprune_version": product_version()})
    onnx.helper.set_model_props(proto, read_metadata(proto) | {_CONTENT_HASH: _content_hash(proto)})


def _content_hash(proto: onnx.ModelProto) -> str:
    """Of the graph and the metadata, less the hash itself."""
    digest = hashlib.sha256(proto.graph.SerializeToString(deterministic=True))
    digest.update(json.dumps({k: v for k, v in read_metadata(proto).items() if k != _CONTENT_HASH}, sort_keys=True).encode())
    return digest.hexdigest()
