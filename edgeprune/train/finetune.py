"""Fine-tuning with distillation, resumable after a crash at any moment.

Everything random in an epoch follows from (seed, epoch), so a checkpoint needs only weights, momentum and the epoch's number, and
a resumed run ends with the same weights as one that was never interrupted (on the same machine and number of threads).
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.data import Augment, Split
from edgeprune.errors import DataError, GateError
from edgeprune.graph.running import evaluating
from edgeprune.graph.slim import named_tensors
from edgeprune.run import write_atomic
from edgeprune.train import Epoch, Progress, Recipe, silent
from edgeprune.train.evaluate import evaluate, logits_of, settled

MOMENTUM = "momentum/"


def finetune(
    small: nn.Module,
    dense: nn.Module | None,
    train: Split,
    held: Split | None,
    recipe: Recipe,
    *,
    seed: int = 0,
    checkpoints: Path | None = None,
    key: str = "",
    before_epoch: Callable[[nn.Module, int], None] | None = None,
    progress: Progress = silent,
) -> tuple[nn.Module, tuple[Epoch, ...]]:
    """A trained copy of `small`, and the figures of every epoch; the inputs are untouched.

    `dense` is the teacher (None: no distillation). `held` are images to judge by, never trained on. `checkpoints`: a folder that
    receives one file per epoch and is looked through for one of the same `key` to go on from. `before_epoch` may change the network
    in training, in place, before each epoch (0, 1, …). Raises DataError for data that
    cannot be trained on, GateError when the loss is no longer finite.
    """
    _check(train, recipe, dense)
    work = copy.deepcopy(small)
    layout = _layout_for(work, train) if recipe.epochs else torch.contiguous_format
    work = _in_format(work, layout)
    parameters = dict(work.named_parameters())
    optimizer = torch.optim.SGD(
        [p for p in parameters.values() if p.requires_grad],
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )
    store = _Checkpoints(checkpoints, key) if checkpoints else None
    curve = store.restore(work, optimizer) if store else ()
    side = train.preprocessing.size[0]
    augment = Augment(crop_padding=side // 8 if recipe.crop_padding is None else recipe.crop_padding, flip=recipe.flip)
    steps = math.ceil(len(train) / recipe.batch_size)
    for epoch in range(len(curve), recipe.epochs):
        started = time.monotonic()
        if before_epoch is not None:
            before_epoch(work, epoch)
        torch.manual_seed(seed + 7919 * epoch)
        loss, seen = 0.0, 0
        with suppress(NotImplementedError):  # an exported program: its mode was fixed at export
            work.train()
        batches = train.batches(recipe.batch_size, shuffle_seed=seed + 7919 * epoch, augment=augment)
        for step, (x, y) in enumerate(batches):
            _set_rate(optimizer, recipe, epoch * steps + step, recipe.epochs * steps)
            if len(x) > 1:  # batch norms cannot train on a last batch of one image
                loss += _step(work, dense, optimizer, (x.contiguous(memory_format=layout), y), recipe) * len(x)
                seen += len(x)
            progress("fine-tuning", epoch * steps + step + 1, recipe.epochs * steps)
        _check_finite(work, optimizer)
        judged = evaluate(work, held) if held is not None and held.labelled else None
        figures = Epoch(
            epoch=epoch + 1,
            train_loss=loss / seen,
            val_loss=judged.loss if judged else None,
            val_accuracy=judged.accuracy if judged else None,
            lr=optimizer.param_groups[0]["lr"],
            seconds=round(time.monotonic() - started, 3),
        )
        curve = (*curve, figures)
        if store:
            store.save(work, optimizer, curve)
    return settled(_in_format(work, torch.contiguous_format)), curve


def _check(train: Split, recipe: Recipe, dense: nn.Module | None) -> None:
    if recipe.epochs and len(train) < 2:
        raise DataError("fine-tuning needs at least two training images (x_train, or a train folder); with --epochs 0 none are needed.")
    if recipe.epochs and not train.labelled and dense is None:
        raise DataError("fine-tuning without distillation needs labels: give labels, or leave distillation on.")


def _step(work: nn.Module, dense: nn.Module | None, optimizer: torch.optim.SGD, batch: tuple[Tensor, Tensor], recipe: Recipe) -> float:
    x, y = batch
    logits = logits_of(work(x))
    labelled = bool((y >= 0).all())
    loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing) if labelled else logits.new_zeros(())
    if dense is not None:
        with torch.no_grad(), evaluating(dense):
            target = logits_of(dense(x.contiguous()))
        t = recipe.temperature
        soft = F.kl_div(F.log_softmax(logits / t, dim=1), F.log_softmax(target / t, dim=1), log_target=True, reduction="batchmean")
        share = recipe.distill_weight if labelled else 1.0
        loss = (1 - share) * loss + share * t * t * soft
    value = float(loss.detach())
    if not math.isfinite(value):
        raise _diverged(f"the loss became {value}", optimizer)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return value


def _check_finite(work: nn.Module, optimizer: torch.optim.SGD) -> None:
    broken = next((n for n, t in named_tensors(work) if t.is_floating_point() and not bool(torch.isfinite(t).all())), None)
    if broken:
        raise _diverged(f"the values of {broken} are no longer finite", optimizer)


def _diverged(what: str, optimizer: torch.optim.SGD) -> GateError:
    rate = optimizer.param_groups[0]["lr"]
    return GateError(f"{what} at a learning rate of {rate:.4g}: training diverged. Use a smaller --lr and check the preprocessing.")


def _set_rate(optimizer: torch.optim.SGD, recipe: Recipe, step: int, total: int) -> None:
    warmup = max(1, round(recipe.warmup_share * total))
    if step < warmup:
        rate = recipe.lr * (step + 1) / warmup
    else:
        rate = recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / max(1, total - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = rate


@dataclass(frozen=True)
class _Checkpoints:
    """One file per finished epoch, without pickle; only those with our key count, only the newest is kept."""

    folder: Path
    key: str

    def save(self, work: nn.Module, optimizer: torch.optim.SGD, curve: tuple[Epoch, ...]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(named_tensors(work))
        for name, parameter in work.named_parameters():
            momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[MOMENTUM + name] = momentum
        header = {"key": self.key, "curve": json.dumps([asdict(e) for e in curve])}
        plain = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
        path = self._path(len(curve))
        write_atomic(path, to_bytes(plain, metadata=header))
        for old in self.folder.glob("epoch-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)

    def restore(self, work: nn.Module, optimizer: torch.optim.SGD) -> tuple[Epoch, ...]:
        for path in sorted(self.folder.glob("epoch-*.safetensors"), reverse=True):
            try:
                with safe_open(path, framework="pt") as file:
                    header = file.metadata() or {}
                    if header.get("key") != self.key:
                        continue
                    saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            except (SafetensorError, OSError):
                continue
            with torch.no_grad():
                for name, tensor in named_tensors(work):
                    tensor.copy_(saved[name])
            for name, parameter in work.named_parameters():
                if MOMENTUM + name in saved:
                    optimizer.state[parameter]["momentum_buffer"] = saved[MOMENTUM + name].to(memory_format=_format_of(parameter))
            return tuple(Epoch(**e) for e in json.loads(header["curve"]))
        return ()

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.safetensors"


def _layout_for(work: nn.Module, train: Split) -> torch.memory_format:
    """channels_last, which trains faster, unless the network views its feature maps as only contiguous memory allows."""
    x = next(iter(train.batches(2)))[0]
    if x.ndim != 4:
        return torch.contiguous_format
    try:
        with torch.no_grad(), evaluating(work):
            _in_format(work, torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def _in_format(module: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    convert: Any = module.to  # torch's stubs lack this overload
    convert(memory_format=memory_format)
    return module


def _format_of(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
