"""Does the artifact compute on the board what it computes here? Asked before any figure of the board is reported.

Float outputs differ by rounding. Int8 outputs are not bit-equal between x86 and ARM in general: signed x signed products were up to
1.3 % of the outputs' range apart with the same top-1, so quantized artifacts get a wider tolerance, and their accuracy is the board's
to tell: `outputs` evaluates there.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.device.connection import Connection, Local
from edgeprune.errors import ParityError, Unreachable

if TYPE_CHECKING:
    from edgeprune.export import Arrays

FLOAT_TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 0.05
_LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Parity:
    """The largest absolute difference between the outputs there and here, and the same over the largest absolute output here."""

    max_abs: float
    relative: float
    tolerance: float
    samples: int


def outputs(
    board: Connection, artifact: Path, arrays: Mapping[str, NDArray[Any]], *, threads: int = 1
) -> tuple[list[NDArray[Any]], Mapping[str, Any]]:
    """(the artifact's outputs for all samples, batch first, what the agent says of the artifact); run sample by sample on the board.

    `arrays`: by input name, or in the inputs' order. Raises DeviceError for arrays that do not fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        only = len(arrays) == 1
        file = Path(folder, "inputs.npy" if only else "inputs.npz")
        if only:
            np.save(file, next(iter(arrays.values())))
        else:
            named: dict[str, Any] = dict(arrays)
            np.savez(file, **named)
        pushed, given = board.push(artifact), board.push(file)
        reply = board.ask("evaluate", fresh=True, limit_seconds=_LIMIT_SECONDS, artifact=pushed, arrays=given, threads=threads)
    found = [np.frombuffer(base64.b64decode(o["base64"]), dtype=o["dtype"]).reshape(o["shape"]).copy() for o in reply["outputs"]]
    return found, reply


def runner_on(board: Connection, artifact: Path, *, threads: int = 1) -> Callable[[Arrays], list[NDArray[Any]]]:
    """The artifact as a function of NCHW images, as `load_artifact` gives it here, but run on the board: accuracy is evaluated by it."""
    from edgeprune.export import read_metadata

    last = read_metadata(artifact).get("layout") == "NHWC"

    def run(inputs: Arrays) -> list[NDArray[Any]]:
        arrays = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
        fed = [np.ascontiguousarray(a.transpose(0, 2, 3, 1)) if last and a.ndim == 4 else a for a in arrays]
        return outputs(board, artifact, {str(number): array for number, array in enumerate(fed)}, threads=threads)[0]

    return run


def compared(board: Connection, artifact: Path, arrays: Mapping[str, NDArray[Any]] | None = None) -> tuple[Parity | None, str]:
    """(the outputs there against those here, why there is no comparison); random inputs where none are given.

    Raises ParityError above the tolerance.
    """
    with Local() as here:
        try:
            if arrays is None:
                arrays = _random(
                    here.ask("measure", artifact=str(artifact.resolve()), min_runs=1, min_seconds=0, warmup_runs=0, warmup_seconds=0)
                )
            expected, facts = outputs(here, artifact, arrays)
        except Unreachable as error:
            return None, str(error)
    found, _ = outputs(board, artifact, arrays)
    scale = max(float(np.abs(e).max(initial=0.0)) for e in expected)
    max_abs = max(float(np.abs(f.astype(np.float64) - e).max(initial=0.0)) for f, e in zip(found, expected, strict=True))
    tolerance = QUANTIZED_TOLERANCE if facts["quantized"] else FLOAT_TOLERANCE
    relative = max_abs / scale if scale else max_abs
    if not relative <= tolerance:
        raise ParityError(
            f"{artifact.name} computes something else on {board.where} than here: outputs differ by {max_abs:.3g}, {relative:.2%} of the "
            f"largest (allowed: {tolerance:.2%}). Its figures would mean nothing; try another version of the runtime on the board."
        )
    return Parity(max_abs, relative, tolerance, len(expected[0])), ""


def _random(reply: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(1)
    return {
        name: (random.random((2, *t["shape"][1:])) * (1 if "float" in t["dtype"] else 100)).astype(t["dtype"])
        for name, t in reply["inputs"].items()
    }
