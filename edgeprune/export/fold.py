"""Fold every batch normalization that directly follows a conv or linear layer into that layer's weights.

An inference batch norm is a scale and a shift per channel, so conv + norm is one conv with other weights: the artifact gets
smaller and faster and computes the same. Which pairs exist is read off one real run, not off names: a norm is folded only
when nothing else in that run read the conv's output, the conv's parameters or the norm's. A norm with a forward of its own (timm's
have their activation inside) counts where that run shows it to be the norm and then its children. What is not provably such a pair
stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from edgeprune.graph.branches import NORM_TENSORS
from edgeprune.graph.running import Observer, quiet_torch

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_batchnorm(model: nn.Module, example_inputs: Tensor | Sequence[Any]) -> nn.Module:
    """A copy of `model` in eval mode with its foldable batch norms merged into the layers before them; their children stay in their place.

    Computes the same function up to rounding (the merged weights are computed in float64). `model` is not changed; it is run
    once on `example_inputs` (a tensor or a sequence of positional arguments), and errors of that run come through.
    """
    folded = frozen_copy(model)
    names = {module: name for name, module in folded.named_modules()}
    for layer, norm in _pairs(folded, as_args(example_inputs)):
        _merge(layer, norm)
        parent, _, name = names[norm].rpartition(".")
        setattr(folded.get_submodule(parent), name, _rest(norm))
    return folded


def frozen_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode. Sets the flag itself because the modules torch.export gives refuse `eval()`."""
    with quiet_torch():
        twin = copy.deepcopy(model)
    for module in twin.modules():
        module.training = False
    return twin


def as_args(example_inputs: Tensor | Sequence[Any]) -> tuple[Any, ...]:
    """The positional arguments of a forward: a lone tensor becomes a tuple of one."""
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)


class _Readers(Observer):
    """Who reads each watched storage: one entry per operation, functional calls included, but only one per call of a watched module."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inside: object | None = None  # the call of a watched module that is running
        self._readers: dict[int, set[object]] = {}
        self._alive: list[Tensor] = []  # a freed storage's address would be handed out again
        for module in modules:
            for tensor in _tensors(module):
                self.watch(tensor)

    def watch(self, tensor: Tensor) -> None:
        self._alive.append(tensor)
        self._readers[_storage(tensor)] = set()

    def read(self, values: object) -> None:
        reader = self.inside or object()
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and _storage(value) in self._readers:
                self._readers[_storage(value)].add(reader)

    def once(self, tensors: Sequence[Tensor]) -> bool:
        return all(len(self._readers[_storage(t)]) == 1 for t in tensors)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.read((args, kwargs))
        return func(*args, **(kwargs or {}))


def _pairs(model: nn.Module, args: tuple[Any, ...]) -> list[tuple[nn.Module, _BatchNorm]]:
    """The (layer, norm) pairs of one run in which only the norm reads the layer's output and both ran exactly once."""
    modules = [m for m in model.modules() if _is_plain_layer(m) or _is_plain_norm(m)]
    readers = _Readers(modules)
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    other: set[nn.Module] = set()  # norms that do something else than their form says
    met: list[tuple[nn.Module, _BatchNorm, Tensor]] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        readers.inside = object()
        if isinstance(module, _BatchNorm) and inputs:
            layer, output = made.get(_storage(inputs[0]), (None, None))
            if layer is not None and output is inputs[0]:
                met.append((layer, module, output))

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, _BatchNorm) and not _has_plain_forward(module) and not _is_norm_then_rest(module, inputs, output):
            other.add(module)
        readers.inside = None
        if not isinstance(module, _BatchNorm):
            readers.watch(output)
            made[_storage(output)] = (module, output)

    handles = [m.register_forward_pre_hook(before) for m in modules] + [m.register_forward_hook(after) for m in modules]
    try:
        with torch.no_grad(), readers:
            outputs = model(*args)
    finally:
        for handle in handles:
            handle.remove()
    readers.read(outputs)
    return [
        (layer, norm)
        for layer, norm, output in met
        if norm not in other and _fits(layer, output) and readers.once((output, *_tensors(layer), *_tensors(norm)))
    ]


def _is_plain_layer(module: nn.Module) -> bool:
    """Whether the layer is what its type says: no own forward (weight standardization), no hook or parametrization on its weights."""
    if _is_altered(module):
        return False
    if isinstance(module, _CONVS):
        kind = next(k for k in _CONVS if isinstance(module, k))
        return type(module).forward is kind.forward and type(module)._conv_forward is kind._conv_forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether the norm may be what its type says; one with a forward of its own has to show it when it runs."""
    known = (
        isinstance(module, _BatchNorm) and not _is_altered(module) and (_has_plain_forward(module) or any(True for _ in module.children()))
    )
    return known and module.running_mean is not None and module.running_var is not None


def _has_plain_forward(norm: _BatchNorm) -> bool:
    return type(norm).forward is _BatchNorm.forward


def _is_norm_then_rest(norm: _BatchNorm, inputs: tuple[Any, ...], output: Tensor) -> bool:
    """Whether the norm just gave exactly what normalizing and then its children give."""
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return False
    normalized = functional.batch_norm(inputs[0], norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return torch.equal(_rest(norm)(normalized), output)


def _rest(norm: _BatchNorm) -> nn.Module:
    """What is left of a norm once it is merged: its children in their order, such as the activation inside timm's norms."""
    rest = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else nn.Identity()


def _is_altered(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or hasattr(module, "parametrizations"))


def _fits(layer: nn.Module, output: Tensor) -> bool:
    """Whether the norm's channel axis (1) is the layer's output axis: a linear layer over more than 2 axes puts its own last."""
    return not isinstance(layer, nn.Linear) or output.ndim == 2


def _tensors(module: nn.Module) -> tuple[Tensor, ...]:
    """The tensors that must belong to this pair alone; the norm's batch counter takes no part in inference."""
    return tuple(t for name in NORM_TENSORS if isinstance(t := getattr(module, name, None), Tensor))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@torch.no_grad()
def _merge(layer: nn.Module, norm: _BatchNorm) -> None:
    """Set weight' = weight * s and bias' = (bias - mean) * s + shift, with s = gain / sqrt(variance + eps) per output channel."""
    weight, bias, mean, variance = layer.weight, layer.bias, norm.running_mean, norm.running_var
    assert isinstance(weight, Tensor) and mean is not None and variance is not None  # what _is_plain_* established
    scale = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    offset = -mean.double() if bias is None else bias.double() - mean.double()  # type: ignore[operator]  # torch types running_mean as optional
    shift = offset * scale + (0.0 if norm.bias is None else norm.bias.double())
    column = scale.reshape(-1, *[1] * (weight.ndim - 1))
    layer.weight = nn.Parameter((weight.double() * column).to(weight.dtype), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
