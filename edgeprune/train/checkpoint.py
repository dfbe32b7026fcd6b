"""Checkpoints of a training: one file per finished epoch, without pickle; only those with our key count, only the newest is kept.

A file holds tensors and the curve so far. The schedule, the order of the data and everything random follow from the seed and the
epoch's number, so nothing else is needed to go on exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from edgeprune.run import write_atomic
from edgeprune.train import Epoch


@dataclass(frozen=True)
class Checkpoints:
    """Those in a folder; `key` names the training they belong to."""

    folder: Path
    key: str

    def save(self, tensors: Mapping[str, Tensor], curve: tuple[Epoch, ...]) -> None:
        """Writes one file, then removes the older ones: with a full disk the last good one stays. Errors as for write_atomic."""
        self.folder.mkdir(parents=True, exist_ok=True)
        header = {"key": self.key, "curve": json.dumps([asdict(e) for e in curve])}
        plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        path = self.folder / f"epoch-{len(curve):04d}.safetensors"
        write_atomic(path, to_bytes(plain, metadata=header))
        for old in self.folder.glob("epoch-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)

    def newest(self) -> tuple[dict[str, Tensor], tuple[Epoch, ...]] | None:
        """The tensors and the curve to go on from; None where nothing of this key can be read."""
        for path in sorted(self.folder.glob("epoch-*.safetensors"), reverse=True):
            try:
                with safe_open(path, framework="pt") as file:
                    header = file.metadata() or {}
                    if header.get("key") != self.key:
                        continue
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            except (SafetensorError, OSError):
                continue
            return tensors, tuple(Epoch(**e) for e in json.loads(header["curve"]))
        return None
