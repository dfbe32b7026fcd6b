"""Unstructured screening: single connections removed, a little more after every epoch, by class significance and weight.

Score of a connection from input i: alpha * R(F_i) + (1 - alpha) * R(|w|), or F_i^alpha * |w|^(1 - alpha). F_i is the one-way F-statistic
of the input's activity between classes (a linear's neuron; the mean of a conv's input map), R the rank within the layer, in (0, 1]. F
does not change when a signal is scaled, so it cannot tell a neuron's outgoing connections apart: the magnitude does. alpha 0 is magnitude
pruning, alpha 1 screening alone.
After epoch e of E the connections kept are M_e = k + (M - k) * max(0, (E - 2e) / (2 e mu + E)): all at first, k from the middle on. What
was removed stays away; removed weights are exactly zero through all training.
Source: Wang, Guo, S. Liu, Y. Liu, "Exploring Vision Neural Network Pruning via Screening Methodology", arXiv 2502.07189 (2025); the
schedule after Barbu et al., "Feature Selection with Annealing", 2017. We differ in: only abstracts were readable; the mix by ranks, alpha
and the layers' shares are reconstructed.
"""

from __future__ import annotations

import copy
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgeprune.criteria.screening import ClassMoments
from edgeprune.data import Data, Split, load_data
from edgeprune.errors import DataError, ModelError, UsageError
from edgeprune.graph.running import evaluating
from edgeprune.graph.slim import named_tensors
from edgeprune.run import product_version, write_atomic
from edgeprune.train import Epoch, Progress, Recipe, silent
from edgeprune.train.evaluate import settled
from edgeprune.train.finetune import finetune

Bits = NDArray[np.bool_]
Floats = NDArray[np.float64]
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FORMAT = "edgeprune-sparse-1"
CODEC = "bitmask+deflate"  # a bit per element, deflated, and the elements that are not zero
WHOLE_BYTES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Step:
    """The network after one epoch: `kept` of `connections` remain, `layers[name]` of them in each layer.

    The accuracy is of images held out from training, None without them.
    """

    epoch: int
    kept: int
    connections: int
    layers: Mapping[str, int]
    train_loss: float
    val_accuracy: float | None


@dataclass(frozen=True, eq=False)
class Sparse:
    """A network with removed connections: `model` holds exact zeros, `masks[weight name]` is bool of the weight's shape."""

    model: nn.Module
    masks: Mapping[str, Tensor]
    steps: tuple[Step, ...]
    facts: Mapping[str, Any]

    @property
    def kept(self) -> int:
        """Connections that remain."""
        return sum(int(m.sum()) for m in self.masks.values())

    @property
    def connections(self) -> int:
        """Connections of the dense network."""
        return sum(m.numel() for m in self.masks.values())


def kept_after(epoch: int, epochs: int, total: int, final: int, speed: float) -> int:
    """M_e: how many of `total` connections are kept after `epoch` of `epochs`; `final` from the middle on, and where epochs is 0."""
    if 2 * epoch >= epochs:
        return final
    return final + round((total - final) * (epochs - 2 * epoch) / (2 * epoch * speed + epochs))


def sparsify(
    model: nn.Module,
    *,
    data: Any,
    keep: float = 0.1,
    alpha: float = 0.5,
    epochs: int = 10,
    speed: float = 1.0,
    combine: str = "rank",
    scope: str = "layer",
    recipe: Recipe | None = None,
    images: int = 2048,
    seed: int = 0,
    progress: Progress = silent,
) -> Sparse:
    """A trained copy of `model` with a share `keep` of its connections (weights of linears and convs, not biases).

    data: whatever `load_data` takes, or Data; only its training images are looked at, a tenth of them (at most 2,000) held out to
    judge every epoch by. alpha: weight of the F-statistic against magnitude, see above. epochs: of training, the first half of them
    while connections go; 0 removes at once and does not train. speed: mu, how soon most connections go. combine: rank, the sum of
    ranks, or product, which keeps nearer to magnitude. scope: every layer keeps the same share, or ("global") one threshold is set for
    the whole network; F is always relative to its layer, by rank or by the layer's largest.
    recipe: how to train (its epochs give way to `epochs`, its distillation is not used). images: how many F is taken from, afresh for
    every step. Raises UsageError for options out of range, ModelError for a network without linears and convs, DataError for data
    without labels.
    """
    checks = {"keep": 0 < keep <= 1, "alpha": 0 <= alpha <= 1, "epochs": epochs >= 0, "speed": speed >= 0, "images": images >= 2}
    checks |= {"combine": combine in ("rank", "product"), "scope": scope in ("layer", "global")}
    for name, good in checks.items():
        if not good:
            raise UsageError(f"sparsify cannot work with {name} = {locals()[name]!r}; see its documentation for the range.")
    source = data if isinstance(data, Data) else load_data(data, seed=seed)
    if not len(source.train) or not source.train.labelled:
        raise DataError("sparsify compares and trains on classes: give training images with labels (x_train, y_train, or a train folder).")
    train, aside = source.train.hold_out_tenth(seed)
    work = copy.deepcopy(model)
    names = _hold_masks(work)
    screen = _Screen(train, keep, (alpha, combine), epochs, speed, scope, images, seed)
    counts: list[dict[str, int]] = []

    def between(network: nn.Module, epoch: int) -> None:
        if epoch:
            counts.append(screen.tighten(network, names, epoch))

    chosen = replace(recipe or Recipe(), epochs=epochs, distill=False, choose="last")
    work, curve = finetune(work, None, train, aside, chosen, seed=seed, before_epoch=between, progress=progress)
    counts.append(screen.tighten(work, names, epochs))
    masks = {name: _parametrization(work, module).mask.clone() for name, module in names.items()}
    for module in work.modules():
        if isinstance(module, LAYERS) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    final, trained = settled(copy.deepcopy(model)), dict(named_tensors(work))
    with torch.no_grad():
        for name, tensor in named_tensors(final):  # parameters in the order of the user's own class
            tensor.copy_(trained[name])
    total = sum(m.numel() for m in masks.values())
    facts = {
        "keep": keep, "alpha": alpha, "combine": combine, "epochs": epochs, "speed": speed, "scope": scope, "seed": seed,
        "images": min(images, len(train)), "recipe": chosen.to_json(), "held_out": len(aside) if aside else 0,
    }  # fmt: skip
    return Sparse(final, masks, tuple(_step(e, c, total) for e, c in zip(curve, counts, strict=False)), facts)


def _step(epoch: Epoch, layers: dict[str, int], total: int) -> Step:
    return Step(epoch.epoch, sum(layers.values()), total, layers, epoch.train_loss, epoch.val_accuracy)


class _Held(nn.Module):
    """Shows a weight with its removed connections as exact zeros; they get no gradient."""

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool, memory_format=torch.preserve_format))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)


def _hold_masks(work: nn.Module) -> dict[str, str]:
    """Put a mask on every linear and conv weight, in place: {weight name: module name}, weights that are shared once."""
    found: dict[int, tuple[str, str]] = {}
    for name, module in work.named_modules():
        if isinstance(module, LAYERS) and isinstance(module._parameters.get("weight"), nn.Parameter):
            found.setdefault(id(module.weight), (f"{name}.weight" if name else "weight", name))
    if not found:
        raise ModelError("this network has no nn.Linear or nn.Conv layer with a weight: there are no connections to remove.")
    shared: dict[int, _Held] = {}
    for module in list(work.modules()):
        weight = module._parameters.get("weight")
        if isinstance(module, LAYERS) and weight is not None and id(weight) in found:
            held = shared.setdefault(id(weight), _Held(weight))
            parametrize.register_parametrization(module, "weight", held, unsafe=True)  # same shape, nothing to check by running it
    return dict(found.values())


def _parametrization(network: nn.Module, module: str) -> _Held:
    layer: Any = network.get_submodule(module)
    held: _Held = layer.parametrizations.weight[0]
    return held


@dataclass(frozen=True, eq=False)
class _Screen:
    """Which connections go: the options of one run."""

    train: Split
    keep: float
    mix: tuple[float, str]  # alpha, combine
    epochs: int
    speed: float
    scope: str
    images: int
    seed: int

    def tighten(self, network: nn.Module, names: Mapping[str, str], epoch: int) -> dict[str, int]:
        """Remove connections in place, down to as many as this epoch leaves; what is left in each layer."""
        held = {name: _parametrization(network, module) for name, module in names.items()}
        sizes = {name: h.mask.numel() for name, h in held.items()}
        if self.scope == "global":
            goals = {"": self._goal(sum(sizes.values()), epoch)}
            pools = {"": list(names)}
        else:
            goals = {name: self._goal(size, epoch) for name, size in sizes.items()}
            pools = {name: [name] for name in names}
        now = {name: int(h.mask.sum()) for name, h in held.items()}
        if any(sum(now[n] for n in pool) > goals[key] for key, pool in pools.items()):
            significance = self._significance(network, names) if self.mix[0] else {}
            for key, pool in pools.items():
                self._cut([(held[n], network.get_submodule(names[n]), significance.get(n)) for n in pool], goals[key])
        return {name: int(h.mask.sum()) for name, h in held.items()}

    def _goal(self, size: int, epoch: int) -> int:
        return kept_after(epoch, self.epochs, size, max(1, round(self.keep * size)), self.speed)

    def _cut(self, pool: list[tuple[_Held, nn.Module, Floats | None]], goal: int) -> None:
        """Keep the `goal` best of the connections that are still there; of equal ones the first."""
        with torch.no_grad():
            weights = [module.weight.detach().abs().double().cpu().numpy() for _, module, _ in pool]  # type: ignore[operator]
        there = np.concatenate([h.mask.cpu().numpy().reshape(-1) for h, _, _ in pool])
        score = _mixed(weights, [f for _, _, f in pool], [module for _, module, _ in pool], *self.mix)
        best = np.argsort(np.where(there, -score, np.inf), kind="stable")[:goal]
        keep = np.zeros(len(score), dtype=np.bool_)
        keep[best] = True
        for (h, _, _), part in zip(pool, np.split(keep, np.cumsum([w.size for w in weights])[:-1]), strict=True):
            h.mask.copy_(torch.from_numpy(part.reshape(h.mask.shape)))

    def _significance(self, network: nn.Module, names: Mapping[str, str]) -> dict[str, Floats]:
        """F of every input of every layer, by weight name."""
        moments = {name: ClassMoments() for name in names}
        labels = torch.zeros(0, dtype=torch.long)

        def watch(name: str, module: nn.Module) -> Any:
            def look(_: nn.Module, given: tuple[Any, ...]) -> None:
                if len(given[0]) == len(labels):
                    moments[name].add(_features(given[0], module), labels)

            return module.register_forward_pre_hook(look)

        hooks = [watch(name, network.get_submodule(module)) for name, module in names.items()]
        try:
            with torch.no_grad(), evaluating(network):
                for x, y in self.train.batches(256, shuffle_seed=self.seed, limit=self.images):
                    labels = y
                    network(x)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: m.f_statistic() if m.samples else np.ones(1) for name, m in moments.items()}


def _features(given: Tensor, module: nn.Module) -> Tensor:
    """One value per input of a layer and image: (n, inputs)."""
    if isinstance(module, nn.Linear):
        return given.reshape(len(given), -1, given.shape[-1]).mean(dim=1)
    return given.flatten(2).mean(dim=2)


def _mixed(weights: list[Floats], inputs: list[Floats | None], modules: list[nn.Module], alpha: float, combine: str) -> Floats:
    """The score of every connection of these layers, one behind the other, from magnitudes and the F of the inputs."""
    magnitude = np.concatenate([w.reshape(-1) for w in weights])
    relative = _ranks if combine == "rank" else lambda v: v / max(float(v.max()), 1e-300)
    parts = [_spread(relative(f), m, w.shape).reshape(-1) for w, f, m in zip(weights, inputs, modules, strict=True) if f is not None]
    if not parts:
        return magnitude
    significance = np.concatenate(parts)
    if combine == "product":
        return significance**alpha * magnitude ** (1 - alpha)
    return alpha * significance + (1 - alpha) * _ranks(magnitude)


def _ranks(values: Floats) -> Floats:
    """Ranks in (0, 1], equal values share theirs."""
    return np.asarray(rankdata(values) / len(values), dtype=np.float64)


def _spread(inputs: Floats, module: nn.Module, shape: tuple[int, ...]) -> Floats:
    """A figure of each input on all connections that leave it: (inputs,) -> the weight's shape."""
    if len(inputs) == 1:
        return np.full(shape, float(inputs[0]))
    groups = int(getattr(module, "groups", 1))
    own = inputs.reshape(groups, -1).repeat(shape[0] // groups, axis=0)  # the inputs of each output
    return np.broadcast_to(own.reshape(*own.shape, *[1] * (len(shape) - 2)), shape)


def save_sparse(model: nn.Module, path: str | Path) -> Path:
    """Write a network with many zeros to `path` (.safetensors): a deflated bit per element and the elements that are not zero.

    Tensors for which that is no smaller are written whole. Bit for bit what `load_sparse` gives back; no pickle. Returns the path.
    """
    path = Path(path)
    stored: dict[str, Tensor] = {}
    sparse: dict[str, list[int]] = {}
    for name, tensor in named_tensors(model):
        plain = tensor.detach().cpu().contiguous()
        packed = _packed(plain)
        if packed is None:
            stored[name] = plain.clone()
        else:
            stored[f"{name}/bits"], stored[f"{name}/values"] = packed
            sparse[name] = list(plain.shape)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    header = {"format": FORMAT, "codec": CODEC, "edgeprune": product_version(), "class": kind, "sparse": json.dumps(sparse)}
    write_atomic(path, to_bytes(stored, metadata=header))
    return path


def _packed(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """(deflated bits, values), or None where the tensor itself is smaller. A zero is all bits zero: -0.0 is a value."""
    whole = WHOLE_BYTES.get(tensor.element_size())
    if whole is None or not tensor.is_floating_point():
        return None
    flat = tensor.reshape(-1)
    used = flat.view(whole) != 0
    bits = zlib.compress(np.packbits(used.numpy()).tobytes(), 9)
    if len(bits) + int(used.sum()) * flat.element_size() >= flat.numel() * flat.element_size():
        return None
    return torch.frombuffer(bytearray(bits), dtype=torch.uint8), flat[used].clone()


def load_sparse(path: str | Path, *, model: nn.Module) -> nn.Module:
    """The saved network, in a copy of a `model` of the same architecture. Raises ModelError for a file that is none of ours."""
    try:
        with safe_open(Path(path), framework="pt") as file:
            header = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}.") from error
    if (header.get("format"), header.get("codec")) != (FORMAT, CODEC):
        raise ModelError(f"{path} was not written by save_sparse; load it with the tool that wrote it.")
    for name, shape in json.loads(header["sparse"]).items():
        stored[name] = _unpacked(path, name, stored.pop(f"{name}/bits"), stored.pop(f"{name}/values"), shape)
    loaded = copy.deepcopy(model)
    own = dict(named_tensors(loaded))
    if wrong := sorted(n for n in own.keys() | stored.keys() if n not in own or n not in stored or own[n].shape != stored[n].shape):
        raise ModelError(f"{path} does not belong to this {type(model).__name__}: {', '.join(wrong[:3])} differ. Build the same network.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    return loaded


def _unpacked(path: str | Path, name: str, bits: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    try:
        raw = np.frombuffer(zlib.decompress(bits.numpy().tobytes()), dtype=np.uint8)
    except zlib.error as error:
        raise ModelError(f"{path} is damaged: the bits of {name} cannot be inflated ({error}).") from error
    used = torch.from_numpy(np.unpackbits(raw, count=math.prod(shape)).astype(np.bool_)) if 8 * len(raw) >= math.prod(shape) else None
    if used is None or int(used.sum()) != len(values):
        raise ModelError(f"{path} is damaged: the bits of {name} do not fit its {len(values)} values.")
    whole = values.new_zeros(math.prod(shape))
    whole[used] = values
    return whole.reshape(shape)
