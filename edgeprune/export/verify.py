"""Is a run, or a lone artifact, still what it says? From the files alone: no model code, no data, no network of the user's.

A folder (of `compress` or `export`) holds artifacts.json and samples.safetensors, real inputs with the fp32 network's answers; a lone
file carries the hash of its content and a probe (see parity.py). Every question is one Check; none stops the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes
from torch import Tensor, nn

from edgeprune.errors import ExportError, UsageError
from edgeprune.export import Artifact, Runner, load_artifact, read_metadata
from edgeprune.export.fold import as_args, frozen_copy
from edgeprune.export.parity import answers, judged, probe_again
from edgeprune.report import exact
from edgeprune.run import hash_file, write_atomic, write_json

ARTIFACTS, SAMPLES = "artifacts.json", "samples.safetensors"
PARITY_SAMPLES = 32  # images that a new artifact is compared on
KEPT_SAMPLES = 4  # of them, to compare it on again
FP32_LIMIT = 1e-3  # relative; other machines round otherwise, a wrong network is off by far more
SLACK_DB = 1.0  # what another machine's int8 kernels may cost

GATE, BROKEN, UNREADABLE = 1, 5, 6  # exit codes: a limit missed; an artifact damaged or wrong; the run's own files damaged


@dataclass(frozen=True)
class Check:
    """One question and its answer; `exit_code` is what the command line ends with if it failed."""

    name: str
    passed: bool
    found: str
    exit_code: int = GATE


def keep_samples(folder: Path, model: nn.Module, samples: Tensor | Sequence[Tensor]) -> Path:
    """Write the first inputs of `samples` and the network's answers beside the artifacts; returns the file."""
    inputs = [s.detach().cpu()[:KEPT_SAMPLES] for s in as_args(samples)]
    outputs = answers(frozen_copy(model).cpu(), inputs)
    arrays = {f"input_{i}": t.contiguous().numpy() for i, t in enumerate(inputs)}
    arrays |= {f"output_{i}": o.copy() for i, o in enumerate(outputs)}
    write_atomic(folder / SAMPLES, to_bytes(arrays))
    return folder / SAMPLES


def write_list(folder: Path, artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Write artifacts.json, paths relative to the folder, and return what it holds."""
    listed = [a.to_json() | {"path": a.path.name} for a in artifacts]
    write_json(folder / ARTIFACTS, listed)
    return listed


def verify(path: str | Path) -> tuple[Check, ...]:
    """Every check of a folder or of a lone artifact, failed ones included.

    Raises UsageError for what is neither, ExportError where the runtime that a file needs is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return tuple(_folder(path))
    if not path.is_file():
        raise UsageError(f"there is nothing to verify at {path}: give a run folder or an artifact.")
    return tuple(_lone(path))


def _lone(path: Path) -> Iterator[Check]:
    run = _loaded(path)
    yield Check(
        f"{path.name}: content", not isinstance(run, str), run if isinstance(run, str) else "readable, and as it was written", BROKEN
    )
    if isinstance(run, str):
        return
    metadata = read_metadata(path)
    if "content_sha256" not in metadata:
        yield Check(f"{path.name}: hash", False, "the file carries no hash of its content: edgeprune did not write it")
        return
    yield from _probe(path, metadata, run)


def _probe(path: Path, metadata: Mapping[str, str], run: Runner) -> Iterator[Check]:
    try:
        answer = probe_again(metadata, run)
    except (ExportError, ValueError, LookupError) as error:
        yield Check(f"{path.name}: probe", False, f"the probe it carries cannot be asked again: {error}", BROKEN)
        return
    if answer is not None:
        now, then = answer
        found = f"off the network's outputs for the probe by {now:.3g} of the largest, {then:.3g} when it was written"
        yield Check(f"{path.name}: probe", now <= max(FP32_LIMIT, 1.5 * then), found, BROKEN)


def _folder(folder: Path) -> Iterator[Check]:
    manifest = _json(folder / "run.json")
    listed = _json(folder / ARTIFACTS)
    if listed is None:
        raise UsageError(
            f"{folder} holds no finished run or export ({ARTIFACTS} is not there): give the folder that compress or export printed."
        )
    if isinstance(manifest, dict):
        yield from _answered("run.json", _recorded(folder, manifest))
    try:
        artifacts = [Artifact.from_json(entry | {"path": folder / entry["path"]}) for entry in listed]
    except (TypeError, KeyError) as error:
        yield Check(ARTIFACTS, False, f"cannot be read ({type(error).__name__}: {error})", UNREADABLE)
        return
    for artifact in artifacts:
        yield from _answered(ARTIFACTS, _artifact(artifact, folder / SAMPLES))
    if isinstance(manifest, dict):
        yield from _answered("run.json", _budget(folder, manifest, artifacts))


def _answered(file: str, checks: Iterator[Check]) -> Iterator[Check]:
    """The checks; a failed one more where the file turns out to hold something else than what is written there."""
    try:
        yield from checks
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        yield Check(file, False, f"does not hold what is written there ({type(error).__name__}: {error})", UNREADABLE)


def _recorded(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Check]:
    """The files that the export stage wrote, against the hashes in run.json; artifacts have checks of their own."""
    hashes = manifest.get("stages", {}).get("export", {}).get("sha256", {})
    for name, expected in hashes.items():
        file = folder / name
        if file.suffix not in (".json", ".safetensors"):
            continue
        found = "missing"
        if file.is_file():
            found = (
                "as it was written" if hash_file(file) == expected else f"was changed after it was written: SHA-256 is not {expected[:12]}…"
            )
        yield Check(f"{name}: checksum", found == "as it was written", found, UNREADABLE)
    weights = folder / "model.safetensors"
    if weights.is_file():
        try:
            with safe_open(weights, framework="numpy") as tensors:
                count, recipe = len(tensors.keys()), tensors.metadata() or {}
            found = f"{count} tensors and the recipe of {recipe.get('class', 'no class')}"
            yield Check("model.safetensors", "plan" in recipe, found, UNREADABLE)
        except (SafetensorError, OSError) as error:
            yield Check("model.safetensors", False, f"cannot be read ({error}): truncated or damaged", UNREADABLE)


def _artifact(artifact: Artifact, samples: Path) -> Iterator[Check]:
    path, name = artifact.path, artifact.path.name
    if not path.is_file():
        yield Check(f"{name}: checksum", False, "missing", BROKEN)
        return
    size = path.stat().st_size
    same = hash_file(path) == artifact.sha256
    found = "SHA-256 as recorded" if same else f"is not the file that was written: {size:,} bytes, {artifact.size_bytes:,} recorded; "
    if not same:
        found += "truncated" if size < artifact.size_bytes else "changed" if size == artifact.size_bytes else "grown"
    yield Check(f"{name}: checksum", same, found, BROKEN)
    run = _loaded(path)
    if isinstance(run, str):
        yield Check(f"{name}: content", False, run, BROKEN)
        return
    yield from _answered(samples.name, _parity(artifact, run, samples))
    yield from _probe(path, read_metadata(path), run)
    if artifact.bits:
        yield _bit_plan(artifact)


def _parity(artifact: Artifact, run: Runner, samples: Path) -> Iterator[Check]:
    name = f"{artifact.path.name}: parity"
    try:
        arrays = load_file(samples)
    except (SafetensorError, OSError) as error:
        yield Check(name, False, f"{samples.name} cannot be read: {error}", UNREADABLE)
        return
    inputs = [arrays[f"input_{i}"] for i in range(sum(key.startswith("input_") for key in arrays))]
    expected = [arrays[f"output_{i}"] for i in range(len(arrays) - len(inputs))]
    try:
        parity = judged([(expected, run(inputs))], samples=len(inputs[0]))
    except (ExportError, ValueError) as error:
        yield Check(name, False, f"it does not run on the samples: {error}", BROKEN)
        return
    found = f"{parity.relative:.3g} of the largest output, {parity.sqnr_db:.1f} dB, top-1 agrees on {parity.top1:.0%} of {parity.samples}"
    # a quantized file is judged on fewer samples here than when it was written: half of its decibels are far from any damage
    least = artifact.parity_sqnr_db / 2 - SLACK_DB
    yield Check(name, parity.sqnr_db >= least if artifact.bits else parity.relative <= FP32_LIMIT, found, BROKEN)


def _bit_plan(artifact: Artifact) -> Check:
    """Every layer is stored in a type that its bits allow: 32 as float32, 16 as float16, 8 and fewer as integers."""
    stored = _stored_bits(artifact.path)
    wrong = [layer for layer, bits in artifact.bits.items() if not stored.get(layer) or max(8, stored[layer]) != max(8, bits)]
    found = f"{len(artifact.bits)} layers are stored as planned"
    if wrong:
        found = f"{wrong[0]} is stored in {stored.get(wrong[0], 'no')} bits, planned {artifact.bits[wrong[0]]:g}, and {len(wrong) - 1} more"
    return Check(f"{artifact.path.name}: bit plan", not wrong, found)


def _budget(folder: Path, manifest: Mapping[str, Any], artifacts: Sequence[Artifact]) -> Iterator[Check]:
    """The limits that were asked for: the size from the files themselves, the others from what the run recorded."""
    facts = _json(folder / "result.json")
    recorded = {b["name"]: b for b in facts.get("budgets", ())} if isinstance(facts, dict) else {}
    for name, asked in manifest.get("asked", {}).get("budget", {}).items():
        if asked is None:
            continue
        if name == "size_bytes":
            for artifact in artifacts:
                size = artifact.path.stat().st_size if artifact.path.is_file() else 0
                yield Check(f"budget: {artifact.path.name}", 0 < size <= asked, f"{size:,} bytes, asked for at most {asked:,.0f}")
        elif name not in recorded:
            yield Check(f"budget: {name}", False, f"result.json does not say what was reached; asked for {asked:g}", UNREADABLE)
        else:
            entry = recorded[name]
            met = entry.get("met", True) and entry["reached"] <= entry["asked"]  # a prediction meets nothing where a board is attached
            reached, limit = (exact(entry[side], entry.get("unit")) for side in ("reached", "asked"))
            yield Check(f"budget: {name}", met, f"{reached}, asked for at most {limit} ({entry['basis']} by the run)")


def _json(path: Path) -> Any:
    """What the file holds, None where it is absent. Raises UsageError for one that is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}): nothing in this folder can be verified against it.") from error


def _loaded(path: Path) -> Runner | str:
    """The artifact, or why it cannot be used."""
    try:
        return load_artifact(path)
    except ExportError as error:
        if "pip install" in str(error):  # a missing runtime says nothing about the file
            raise
        return str(error)


def _stored_bits(path: Path) -> dict[str, int]:
    if path.suffix == ".tflite":
        from edgeprune.export.flatbuffer import stored_bits as in_tflite

        return in_tflite(path.read_bytes())
    from edgeprune.export.onnx import stored_bits

    return stored_bits(path)
