"""Does the file compute what the network computes? The comparison, the gate, and a probe that travels inside the file.

A file only appears under its name after it passed (`write_checked`). The probe is the network's answer to noise made from a seed:
with it `edgeprune verify` can ask a lone file the same question again, on another machine, without the network.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeprune.errors import EdgepruneError, ExportError, ParityError
from edgeprune.export import Artifact, Quantizer, Runner
from edgeprune.run import TEMPORARY, disk_is_full, hash_file, write_error

PROBE_VALUES = 64  # of every output
MOST_DB = 300.0  # instead of infinity, which JSON has not


@dataclass(frozen=True)
class Parity:
    """How far a file's outputs are from the network's, see Artifact."""

    max_abs: float
    relative: float
    sqnr_db: float
    top1: float
    samples: int


def compare(reference: nn.Module, run: Runner, inputs: Sequence[Tensor], *, batch: int = 0) -> Parity:
    """Both on the same inputs: in batches of `batch`, or (0: any size) all at once and the first sample alone."""
    total = len(inputs[0])
    if batch and total % batch:
        raise ExportError(f"this network exports with a fixed batch of {batch}: give a multiple of that many samples, not {total}.")
    cuts = [slice(i, i + batch) for i in range(0, total, batch)] if batch else [slice(None), slice(0, 1)]
    pairs = []
    for cut in cuts:
        part = [i[cut] for i in inputs]
        pairs.append((answers(reference, part), run([p.numpy() for p in part])))
    return judged(pairs, samples=total)


def answers(network: nn.Module, inputs: Sequence[Tensor]) -> list[NDArray[Any]]:
    """The network's outputs as arrays, in the order in which a file has them."""
    with torch.no_grad():
        return [o.numpy() for o in tree_leaves(network(*(i.clone() for i in inputs)))]


def judged(pairs: Sequence[tuple[Sequence[NDArray[Any]], Sequence[NDArray[Any]]]], *, samples: int) -> Parity:
    """The figures over (expected outputs, outputs) of several batches."""
    differences, largest, powers, agreed = [], [], [], []
    for expected, got in pairs:
        sums = []
        for want, have in zip(expected, got, strict=True):
            if have.shape != want.shape:
                raise ParityError(f"the artifact gives outputs of shape {have.shape}, the network {want.shape}. Nothing was written.")
            wide = want.astype(np.float64)
            error = have - wide
            differences.append(np.abs(error).max(initial=0.0))
            largest.append(np.abs(wide).max(initial=0.0))
            sums.append((np.square(wide).sum(), np.square(error).sum()))
        powers.append(sums)
        agreed.append(_agreement(expected[0], got[0]))
    signal, noise = np.array(powers).sum(axis=0).T
    difference = float(np.max(differences))
    relative = difference / max(float(np.max(largest)), float(np.finfo(np.float32).tiny))
    floor = np.maximum(signal, np.finfo(np.float64).tiny) * 10 ** (-MOST_DB / 10)
    sqnr_db = float(np.min(10 * np.log10(np.maximum(signal, floor) / np.maximum(noise, floor))))
    return Parity(difference, relative, sqnr_db, float(np.mean(agreed)), samples)


def _agreement(expected: NDArray[Any], got: NDArray[Any]) -> float:
    """Share of samples (or pixels) with the same largest channel; 1 where there is no channel axis."""
    if expected.ndim < 2 or not expected.size:
        return 1.0
    return float((expected.argmax(axis=1) == got.argmax(axis=1)).mean())


def accept(parity: Parity, name: str, *, tolerance: float, quantizer: Quantizer | None) -> None:
    """Raises ParityError for an fp32 file above the tolerance, a quantized one below its quantizer's limit; NaN never passes."""
    measured = f"over {parity.samples} inputs the outputs differ by up to {parity.max_abs:.3g}, {parity.relative:.3g} of the largest output"
    if quantizer is not None:
        if not parity.sqnr_db >= quantizer.least_sqnr_db:
            raise ParityError(
                f"quantized {name} is too far from the network: {parity.sqnr_db:.1f} dB signal to error, {measured}; the limit is "
                f"{quantizer.least_sqnr_db:.1f} dB. Nothing was written. Calibrate on more or other images, or keep more layers in fp32."
            )
        return
    if not parity.relative <= tolerance:
        raise ParityError(
            f"{name} does not compute what the network computes: {measured}; the limit is {tolerance:.3g}. Nothing was written. "
            "A network that draws random numbers or whose outputs are not finite cannot pass."
        )


def recorded(parity: Parity, file: Path, path: Path, quantizer: Quantizer | None, **facts: Any) -> Artifact:
    """The Artifact of a `file` that will be called `path`; `facts`: what the format says of it."""
    return Artifact(
        path=path,
        sha256=hash_file(file),
        size_bytes=file.stat().st_size,
        parity_max_abs=parity.max_abs,
        parity_relative=parity.relative,
        parity_sqnr_db=parity.sqnr_db,
        parity_top1=parity.top1,
        samples=parity.samples,
        bits=dict(quantizer.bits) if quantizer else {},
        **facts,
    )


def made_up_inputs(shapes: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """Noise in the network's own layout, the same everywhere."""
    random = np.random.default_rng(0)
    return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]


def probe_of(reference: nn.Module, run: Runner, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """For the metadata: the network's first outputs for made-up inputs of these shapes, and how far the file was from them.

    Empty for inputs that are not float32: noise means nothing to them.
    """
    if any(i.dtype != torch.float32 for i in inputs):
        return {}
    shapes = [list(i.shape) for i in inputs]
    noise = made_up_inputs(shapes)
    expected = answers(reference, [torch.from_numpy(n) for n in noise])
    heads = [e.reshape(-1)[:PROBE_VALUES].astype(np.float64) for e in expected]
    if not all(np.isfinite(h).all() for h in heads):
        return {}
    outputs = [[float(f"{v:.9g}") for v in head] for head in heads]
    return {"shapes": shapes, "outputs": outputs, "relative": _distance(run(list(noise)), outputs)}


def probe_again(metadata: Mapping[str, str], run: Runner) -> tuple[float, float] | None:
    """(how far the file is from the network on the probe it carries, how far it was when it was written); None without a probe."""
    probe = json.loads(metadata.get("probe", "{}"))
    if not probe:
        return None
    return _distance(run(list(made_up_inputs(probe["shapes"]))), probe["outputs"]), float(probe["relative"])


def _distance(got: Sequence[NDArray[Any]], outputs: Sequence[Sequence[float]]) -> float:
    """Largest difference over the largest value, over the stored heads."""
    wanted = [np.array(o) for o in outputs]
    error = max(float(np.abs(g.reshape(-1)[: len(w)] - w).max(initial=0.0)) for g, w in zip(got, wanted, strict=True))
    return error / max(*(float(np.abs(w).max(initial=0.0)) for w in wanted), float(np.finfo(np.float32).tiny))


def texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as files hold it: text as it is, anything else as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def numbered(name: str, count: int) -> list[str]:
    """The names of a file's inputs or outputs: one is input, several are input_0, input_1 and so on."""
    return [name] if count == 1 else [f"{name}_{i}" for i in range(count)]


def write_checked(content: bytes, target: Path, verify: Callable[[Path], Artifact]) -> Artifact:
    """Write beside the target, verify that very file, then rename it; on any failure only the temporary file goes."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # readers go by the suffix; what a killed process leaves is known by the one before it
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=f"{TEMPORARY}{target.suffix}", dir=target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        artifact = verify(temporary)
        temporary.chmod(0o644)  # mkstemp's files are private
        temporary.replace(target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return artifact


def _unwritable(target: Path, error: OSError) -> EdgepruneError:
    if disk_is_full(error):
        return write_error(error, target)
    return ExportError(f"cannot write {target}: {error.strerror}. Choose another output folder.")
