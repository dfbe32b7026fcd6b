"""Fine-tuning with distillation, on one process or several, resumable after a crash at any moment.

Everything random in an epoch follows from (seed, epoch), so a checkpoint needs only weights, the optimizer's state and the epoch's
number, and a resumed run ends with the same weights as one that was never interrupted (on the same machine and number of threads).
Two steps on a copy come first: what cannot work is known before hours are spent.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from edgeprune.data import Split
from edgeprune.errors import DataError, GateError, UsageError
from edgeprune.graph.cut import silent_constants
from edgeprune.graph.running import evaluating, in_format, layout_for
from edgeprune.graph.slim import named_tensors
from edgeprune.train import Epoch, Progress, Recipe, silent
from edgeprune.train.augment import Batch, batches, seed_of, steps_in
from edgeprune.train.checkpoint import Checkpoints
from edgeprune.train.distill import Kept, Teacher, hard_loss, watched
from edgeprune.train.evaluate import batch_norms, evaluate, logits_of, settled
from edgeprune.train.processes import Processes, processes

REHEARSED = 2  # batches of the dry run
LOOKED_AT = 10  # steps between looks at the loss: every look waits for the device


def finetune(
    small: nn.Module,
    dense: nn.Module | None,
    train: Split,
    held: Split | None,
    recipe: Recipe,
    *,
    seed: int = 0,
    features: Kept | None = None,
    checkpoints: Path | None = None,
    key: str = "",
    before_epoch: Callable[[nn.Module, int], None] | None = None,
    progress: Progress = silent,
) -> tuple[nn.Module, tuple[Epoch, ...]]:
    """A trained copy of `small`, and the figures of every epoch; the inputs are untouched, and so is torch's global generator.

    `dense` is the teacher (None: no distillation), `features` the modules both have and the teacher's channels that `small` kept
    (features_to_learn), for a recipe with a feature_weight. `held` are images to judge and choose epochs by, never trained on.
    `checkpoints`: a folder that receives one file per epoch and is looked through for one of the same `key` to go on from.
    `before_epoch` may change the network in training, in place, before each epoch (0, 1, …). Raises DataError for data that cannot
    be trained on, GateError when the loss is no longer finite.
    """
    if not recipe.epochs:
        return settled(copy.deepcopy(small)), ()
    together = processes()
    _check(small, dense, train, recipe, together)
    steps = steps_in(len(train), recipe, together.count)
    sample = next(iter(train.batches(2)))[0]
    layout, teacher = layout_for(small, sample), None
    if dense is not None:
        teacher = Teacher(dense, together.device, features or {} if recipe.feature_weight else {}, layout_for(dense, sample))
    _rehearse(_Training(small, teacher, recipe, together, layout=layout, steps=steps), train, seed)
    training = _Training(small, teacher, recipe, together, layout=layout, steps=steps)
    store = Checkpoints(checkpoints, key) if checkpoints else None
    curve = training.restore(*found) if store and (found := store.newest()) else ()
    for epoch in range(len(curve), recipe.epochs):
        started = time.monotonic()
        if before_epoch is not None:
            before_epoch(training.work, epoch)
        with _drawing_from(seed_of(seed, epoch) + together.index, together.device):
            training.begin()
            for step, batch in enumerate(batches(train, recipe, seed=seed, epoch=epoch, processes=together), epoch * steps):
                training.step(batch, step)
                progress("fine-tuning", step + 1, recipe.epochs * steps)
        curve = (*curve, training.judged(held, epoch + 1, started))
        if chosen_epoch(curve, recipe) == len(curve):
            training.keep()
        if store and together.leads:
            store.save(training.state(), curve)
    return training.result(), tuple(replace(e, chosen=e.epoch == chosen_epoch(curve, recipe)) for e in curve)


def chosen_epoch(curve: tuple[Epoch, ...], recipe: Recipe) -> int:
    """The number (1, 2, …) of the epoch whose weights are the result: of equally accurate ones that of least loss, then the later one."""
    judged = [(e.val_accuracy, -e.val_loss, e.epoch) for e in curve if e.val_accuracy is not None and e.val_loss is not None]
    return max(judged)[2] if judged and recipe.choose == "best" else len(curve)


def _check(small: nn.Module, dense: nn.Module | None, train: Split, recipe: Recipe, together: Processes) -> None:
    if len(train) < 2 * together.count:
        raise DataError(
            "fine-tuning needs at least two training images (x_train, or a train folder) for each process, got "
            f"{len(train)} for {together.count}; with --epochs 0 none are needed."
        )
    if recipe.batch_size < 2 * together.count:
        raise UsageError(f"a batch of {recipe.batch_size} leaves {together.count} processes less than two images each: raise --batch-size.")
    if not train.labelled:
        if dense is None:
            raise DataError("fine-tuning without distillation needs labels: give labels, or leave distillation on.")
        return
    labels = train.labels
    if (lowest := int(labels.min())) == (highest := int(labels.max())):
        raise DataError(
            f"all {len(train)} training images of {train.source.name} have the label {highest}: training on them would unlearn every other "
            "class. Give images of all classes, or use --epochs 0."
        )
    with torch.no_grad(), evaluating(small):
        classes = logits_of(small(next(iter(train.batches(2)))[0])).shape[1]
    if lowest < 0 or highest >= classes:
        raise DataError(
            f"{train.source.name} has labels from {lowest} to {highest} but the network has {classes} outputs (labels 0 to {classes - 1}): "
            "give data with the network's classes, numbered as in its training."
        )


def _rehearse(trial: _Training, train: Split, seed: int) -> None:
    """A dry run of two steps on a copy: raises what would end the training later."""
    with _drawing_from(seed, trial.together.device):
        trial.begin()
        some = batches(train, trial.recipe, seed=seed, epoch=0, processes=trial.together)
        for step, batch in enumerate(itertools.islice(some, REHEARSED)):
            trial.step(batch, step)
            trial.check_loss(step)
    trial.check_weights()


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has instructions for it; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class _Training:
    """A network in training: its weights, the optimizer, the moving average, the best epoch so far."""

    def __init__(
        self, small: nn.Module, teacher: Teacher | None, recipe: Recipe, together: Processes, *, layout: torch.memory_format, steps: int
    ) -> None:
        """`steps`: of one epoch."""
        self.recipe, self.together = recipe, together
        self.work = in_format(copy.deepcopy(small).to(together.device), layout)
        self._average = copy.deepcopy(self.work) if recipe.ema_decay else None
        self._teacher, self._layout, self._steps = teacher, layout, steps
        still = silent_constants(self.work)
        self._parameters = {n: p for n, p in self.work.named_parameters() if p.requires_grad and n not in still}
        self._optimizer = _optimizer(list(self._parameters.values()), recipe)
        self._bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and _multiplies_bf16(together.device))
        self._kept: dict[str, Tensor] = {}
        self._loss, self._seen = torch.zeros((), device=together.device), 0

    def begin(self) -> None:
        """Before every epoch."""
        with suppress(NotImplementedError):  # an exported program: its mode was fixed at export
            self.work.train()
        if self.recipe.norms == "frozen":
            for norm in batch_norms(self.work):
                norm.training = False
        self._loss.zero_()
        self._seen = 0

    def step(self, batch: Batch, step: int) -> None:
        """One step of the optimizer; `step` counts from the start of the training."""
        for group in self._optimizer.param_groups:
            group["lr"] = _rate(self.recipe, step, self._steps * self.recipe.epochs)
        self._optimizer.zero_grad(set_to_none=True)
        with self.together.as_one():
            with torch.autocast(self.together.device.type, torch.bfloat16, enabled=self._bf16):
                loss = self._loss_of(batch) * (len(batch.x) / batch.images)
            loss.backward()
        total = loss.detach().float()
        self.together.sum([total, *(p.grad for p in self._parameters.values() if p.grad is not None)])
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters.values(), self.recipe.clip_norm)
        self._optimizer.step()
        self._loss += total * batch.images
        self._seen += batch.images
        if self._average is not None:
            _average(self._average, self.work, min(self.recipe.ema_decay, (1 + step) / (10 + step)))
        if step % LOOKED_AT == 0:
            self.check_loss(step)

    def _loss_of(self, batch: Batch) -> Tensor:
        recipe, x = self.recipe, batch.x.contiguous(memory_format=self._layout)
        with watched(self.work, self._teacher.features if self._teacher else {}) as seen:
            logits = logits_of(self.work(x)).float()
        labelled = bool((batch.y >= 0).all())
        loss = hard_loss(logits, batch, recipe) if labelled else logits.new_zeros(())
        if self._teacher is None:
            return loss
        soft, features = self._teacher.losses(logits, seen, batch.x, recipe.temperature)
        share = recipe.distill_weight if labelled else 1.0
        return (1 - share) * loss + share * soft + recipe.feature_weight * features

    def judged(self, held: Split | None, epoch: int, started: float) -> Epoch:
        """The figures of an epoch that is over; the first one is 1."""
        self.check_loss(epoch * self._steps - 1)
        self.check_weights()
        judged = evaluate(self._network, held) if held is not None and held.labelled and self.together.leads else None
        judged = self.together.told(judged)
        return Epoch(
            epoch=epoch,
            train_loss=float(self._loss) / self._seen,
            val_loss=judged.loss if judged else None,
            val_accuracy=judged.accuracy if judged else None,
            lr=self._optimizer.param_groups[0]["lr"],
            seconds=round(time.monotonic() - started, 3),
        )

    def keep(self) -> None:
        """The weights of now are the result, until others are."""
        self._kept = {name: t.detach().clone() for name, t in named_tensors(self._network)}

    def result(self) -> nn.Module:
        """The network with the weights kept, in eval mode, on the CPU."""
        _write_into(self.work, self._kept)
        return settled(in_format(self.work.cpu(), torch.contiguous_format))

    def state(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint needs."""
        found = {f"work/{name}": t for name, t in named_tensors(self.work)}
        found |= {f"kept/{name}": t for name, t in self._kept.items()}
        found |= {f"average/{name}": t for name, t in named_tensors(self._average)} if self._average else {}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            found |= {f"{key}/{name}": value for key, value in state.items() if isinstance(value, Tensor)}
        return found

    def restore(self, tensors: Mapping[str, Tensor], curve: tuple[Epoch, ...]) -> tuple[Epoch, ...]:
        """Go on from what `state` returned; the curve is handed through."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        _write_into(self.work, parts.pop("work"))
        self._kept = {name: t.to(self.together.device) for name, t in parts.pop("kept").items()}
        if self._average is not None:
            _write_into(self._average, parts.pop("average"))
        for key, values in parts.items():
            for name, value in values.items():
                parameter = self._parameters[name]  # its memory format, because the order of sums follows from that
                like = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
                self._optimizer.state[parameter][key] = like
        return curve

    def check_loss(self, step: int) -> None:
        """Raises GateError once a loss was not finite."""
        if math.isfinite(value := float(self._loss)):
            return
        if step == 0:
            raise GateError(
                f"the loss of the very first batch is {value}, before any weight was changed: the network, its teacher or the images hold "
                "values that are not finite or far too large. Check the weights and the preprocessing (--mean, --std)."
            )
        raise self._diverged(f"the loss became {value}")

    def check_weights(self) -> None:
        """Raises GateError where weights are not finite."""
        broken = next((n for n, t in named_tensors(self.work) if t.is_floating_point() and not bool(torch.isfinite(t).all())), None)
        if broken:
            raise self._diverged(f"the values of {broken} are no longer finite")

    def _diverged(self, what: str) -> GateError:
        smaller = "--lr or --feature-weight" if self.recipe.feature_weight else "--lr"
        rate = f"a learning rate of up to {self.recipe.lr:.4g}"  # that of the moment, at the end, is 0
        return GateError(f"{what} at {rate}: training diverged. Use a smaller {smaller} and check the preprocessing.")

    @property
    def _network(self) -> nn.Module:
        return self.work if self._average is None else self._average


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    nesterov = recipe.momentum > 0
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=nesterov)


def _rate(recipe: Recipe, step: int, total: int) -> float:
    warmup = max(1, round(recipe.warmup_share * total))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / max(1, total - warmup)))


def _average(average: nn.Module, work: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for (_, old), (_, new) in zip(named_tensors(average), named_tensors(work), strict=True):
            if old.is_floating_point():
                old.lerp_(new, 1 - decay)
            else:
                old.copy_(new)


def _write_into(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in named_tensors(module):
            tensor.copy_(values[name])


@contextmanager
def _drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators, which dropout uses, start from a seed, and are afterwards as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
