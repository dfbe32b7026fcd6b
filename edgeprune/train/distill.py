"""What a network learns from the dense one it was cut from: its answers, and the feature maps of the channels both have.

Logits after Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015). Features: at the last layer that makes each
group of channels, the mean squared difference of the channels that stayed, as a share of their mean square in the dense network;
after Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets" (2015), without its regressors: a slim network's channels are the
dense network's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.graph import ChannelGraph
from edgeprune.graph.running import evaluating, in_format, tensors_in
from edgeprune.graph.slim import removed_positions
from edgeprune.plan import Plan
from edgeprune.train import Recipe
from edgeprune.train.augment import Batch
from edgeprune.train.evaluate import logits_of

Kept = Mapping[str, Sequence[int]]


class Teacher:
    """The dense network on a device, in eval mode, without gradients."""

    def __init__(
        self, dense: nn.Module, device: torch.device, features: Kept, layout: torch.memory_format = torch.contiguous_format
    ) -> None:
        """`features`: modules whose outputs are learned from too, and which of their channels the slim network has."""
        self.dense, self._layout = in_format(copy.deepcopy(dense).to(device), layout), layout
        self.features = features
        self._kept = {name: torch.tensor(list(kept), device=device) for name, kept in features.items()}

    def answer(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (n, classes), and by module the outputs of the channels that stayed."""
        with torch.no_grad(), evaluating(self.dense), watched(self.dense, self.features) as seen:
            logits = logits_of(self.dense(x.contiguous(memory_format=self._layout)))
        return logits, {name: seen[name].index_select(1, kept) for name, kept in self._kept.items()}

    def losses(self, logits: Tensor, seen: Mapping[str, Tensor], x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """temperature² * KL(dense || slim) of the softened answers, and the mean relative error of the features (0 without)."""
        target, wanted = self.answer(x)
        soft = F.kl_div(
            F.log_softmax(logits / temperature, dim=1),
            F.log_softmax(target.float() / temperature, dim=1),
            log_target=True,
            reduction="batchmean",
        )
        apart = [F.mse_loss(seen[name].float(), t) / t.square().mean().clamp(min=1e-8) for name, t in wanted.items()]
        return temperature**2 * soft, torch.stack(apart).mean() if apart else logits.new_zeros(())


@contextmanager
def watched(model: nn.Module, names: Kept) -> Iterator[dict[str, Tensor]]:
    """The outputs of some modules while the block runs, by name."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen[name] = next(tensors_in(output))

    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for name in names:
            hooks.callback(modules[name].register_forward_hook(partial(keep, name)).remove)
        yield seen


def features_to_learn(graph: ChannelGraph, plan: Plan) -> dict[str, tuple[int, ...]]:
    """For every group the module that makes its channels last (the norm behind a conv, where there is one), and the channels it keeps.

    Empty for an exported network, whose operations are no modules.
    """
    if graph.exported is not None:
        return {}
    gone = removed_positions(graph, plan)
    stopped = {number for name in plan.empty for number in graph.branches[name].ops}
    made = {op.weight: op for n, op in enumerate(graph.ops) if op.weight and op.kind in ("conv", "linear") and n not in stopped}
    norms = {op.inputs[0]: op.weight for op in graph.ops if op.kind == "norm" and op.inputs and op.weight}
    found: dict[str, tuple[int, ...]] = {}
    for group in graph.groups:
        last = max((m for m in group.members[: group.producing] if m.parameter in made), key=lambda m: made[m.parameter].call, default=None)
        if last is None:
            continue
        norm = norms.get(made[last.parameter].output)
        weight, axis = (norm, 0) if norm else (last.parameter, last.axis)
        lost = gone.get((weight, axis), np.zeros(graph.shapes[weight][axis], dtype=bool))
        found[weight.rpartition(".")[0]] = tuple(np.flatnonzero(~lost).tolist())
    return found


def hard_loss(logits: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """Cross-entropy with the labels, of mixed images with both (label smoothing as in the recipe); the mean over the images."""

    def against(y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing, reduction="none")

    own = against(batch.y)
    if batch.partner is batch.y:
        return own.mean()
    return (batch.share * own + (1 - batch.share) * against(batch.partner)).mean()
