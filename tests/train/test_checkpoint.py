"""Checkpoints: the newest of a key, whole or not at all, and one good one left when the disk is full."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from edgeprune.errors import EdgepruneError
from edgeprune.train import Epoch
from edgeprune.train.checkpoint import Checkpoints


def curve(epochs: int) -> tuple[Epoch, ...]:
    return tuple(Epoch(epoch=n, train_loss=1 / n, val_loss=None, val_accuracy=0.5, lr=0.1, seconds=1.0) for n in range(1, epochs + 1))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_comes_back_and_is_the_only_one(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "epochs", "k")
    assert store.newest() is None
    for epochs in (1, 2):
        store.save({"work/a": torch.full((2, 3), float(epochs)), "step/a": torch.tensor(7)}, curve(epochs))
    assert names(tmp_path / "epochs") == ["epoch-0002.safetensors"]
    found = store.newest()
    assert found is not None
    tensors, epochs_done = found
    assert epochs_done == curve(2)
    assert torch.equal(tensors["work/a"], torch.full((2, 3), 2.0))
    assert int(tensors["step/a"]) == 7


def test_another_key_and_a_damaged_file_are_passed_over(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "k").save({"a": torch.zeros(3)}, curve(1))
    (tmp_path / "epoch-0002.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert Checkpoints(tmp_path, "other").newest() is None
    found = Checkpoints(tmp_path, "k").newest()
    assert found is not None
    assert len(found[1]) == 1


def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path, "k")
    store.save({"a": torch.zeros(3)}, curve(1))

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EdgepruneError, match=r"no space left.*--resume"):
        store.save({"a": torch.ones(3)}, curve(2))
    assert names(tmp_path) == ["epoch-0001.safetensors"]
    found = store.newest()
    assert found is not None
    assert torch.equal(found[0]["a"], torch.zeros(3))
