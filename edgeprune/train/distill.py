"""What a network learns from the dense one it was cut from: its answers, and the feature maps of the channels both have.

Logits after Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015). Features: where layers read the outputs of
groups of channels, the mean squared difference of the channels that stayed, as a share of their mean square in the dense network;
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
from numpy.typing import NDArray
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
"""By the name of a layer: the channels of the dense network's that the slim network has, in its input."""

POINTS = 9  # where features are learned, at most; 27 in a ResNet-56 cost twice the time


class Teacher:
    """The dense network on a device, in eval mode, without gradients."""

    def __init__(
        self, dense: nn.Module, device: torch.device, features: Kept, layout: torch.memory_format = torch.contiguous_format
    ) -> None:
        """`features`: the layers at whose inputs features are learned too (features_to_learn)."""
        self.dense, self._layout = in_format(copy.deepcopy(dense).to(device), layout), layout
        self.features = features
        self._kept = {name: torch.tensor(list(kept), device=device) for name, kept in features.items()}
        self._axes = {name: -1 if isinstance(self.dense.get_submodule(name), nn.Linear) else 1 for name in features}

    def answer(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (n, classes), and by layer what it reads of the channels that stayed."""
        with torch.no_grad(), evaluating(self.dense), watched(self.dense, self.features) as seen:
            logits = logits_of(self.dense(x.contiguous(memory_format=self._layout)))
        return logits, {name: seen[name].index_select(self._axes[name], kept) for name, kept in self._kept.items()}

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
    """What some modules read while the block runs, by name."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any) -> None:
        seen[name] = next(tensors_in(args))

    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for name in names:
            hooks.callback(modules[name].register_forward_pre_hook(partial(keep, name)).remove)
        yield seen


def features_to_learn(graph: ChannelGraph, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Layers at whose inputs feature maps are learned, and the channels that both networks have there, in the order of the forward.

    They are the convs and linears that read a waist, a tensor that everything passes, such as what comes out of a residual block; in a
    network without waists, all of them. Of many, POINTS evenly spread ones. Empty for an exported network, whose operations are no modules.
    """
    if graph.exported is not None:
        return {}
    stopped = {number for name in plan.empty for number in graph.branches[name].ops}
    readers: dict[int, int] = {}
    for number, op in enumerate(graph.ops):
        is_layer = op.kind in ("conv", "linear") and op.groups == 1 and (op.weight or "").endswith(".weight")
        if is_layer and number not in stopped and op.inputs[0] not in graph.input_activations:
            readers.setdefault(op.inputs[0], number)
    alive = _alive(graph)
    points = [number for number in readers.values() if alive[number] == 1] or list(readers.values())
    gone, found = removed_positions(graph, plan), {}
    reading = {(m.parameter, m.axis) for group in graph.groups for m in group.members[group.producing :]}
    for op in (graph.ops[n] for n in points[:: -max(1, -(-len(points) // POINTS))][::-1]):
        channels = graph.activations[op.inputs[0]].shape[1 if op.kind == "conv" else -1]
        axis = 0 if (op.weight, 0) in reading else 1  # 0: of a transposed conv
        lost = gone.get((str(op.weight), axis), np.zeros(channels, dtype=bool))
        found[op.stem.removesuffix(".")] = tuple(np.flatnonzero(~lost).tolist())
    return found


def _alive(graph: ChannelGraph) -> NDArray[np.int64]:
    """How many tensors that are read later exist just before each op, (ops,)."""
    made = {op.output: number + 1 for number, op in enumerate(graph.ops)}
    last = {a: number for number, op in enumerate(graph.ops) for a in op.inputs} | dict.fromkeys(graph.output_activations, len(graph.ops))
    alive = np.zeros(len(graph.ops), dtype=np.int64)
    for activation, number in last.items():
        alive[made.get(activation, 0) : number + 1] += 1
    return alive


def hard_loss(logits: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """Cross-entropy with the labels, of mixed images with both (label smoothing as in the recipe); the mean over the images."""

    def against(y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing, reduction="none")

    own = against(batch.y)
    if batch.partner is batch.y:
        return own.mean()
    return (batch.share * own + (1 - batch.share) * against(batch.partner)).mean()
