"""How strongly a network's outputs react to what one of its layers computes, without labels.

For a random direction v of the outputs, the gradient g of <v, outputs> with respect to a layer's output is J^T v; averaged over
v ~ N(0, 1), sums of its squares are the squared change of all outputs (Hutchinson's estimator of J^T J). One backward pass gives them
for every layer. An error of a channel that differs from position to position moves the outputs by the sum of g² over positions; one
that is the same everywhere in an image by the square of the sum of g, which behind a mean over 64 positions is 64 times as much. Errors
are a mixture of both; the share r of the second is taken from the layer's own output: how much of its variance lies between images.
Layers are found by the parameter that a call of torch takes as its weight, above autograd: module or function, traced graph or plain
code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from edgeprune.graph.running import tensors_in

BYTES = 1 << 30


def reactions(
    model: nn.Module, inputs: tuple[Any, ...], weights: Mapping[str, Tensor], *, generator: torch.Generator, bytes_per_image: int
) -> dict[str, Tensor]:
    """What `effect` needs, summed over images, by weight name: float64 (6, outputs of that layer).

    `weights`: the parameters of the layers asked for. `generator` draws the directions image by image. Layers that the outputs do not
    depend on are zero; weights that no call takes as they are (standardised ones, say) are left out, and everything is where the outputs
    cannot be differentiated. A few images at a time, so that what the backward pass keeps stays within 1 GiB.
    """
    found: dict[str, Tensor] = {}
    for part in _parts(inputs, max(1, BYTES // max(1, bytes_per_image))):
        listener = _Listener({id(t): name for name, t in weights.items()}, found)
        with torch.enable_grad(), listener:
            outputs = model(*tree_map(_differentiable, part))
        ends = [t for t in tensors_in(outputs) if t.requires_grad]
        if not ends:
            return {}
        directions = [torch.stack([torch.randn(row.shape, generator=generator) for row in t]).to(t) for t in ends]
        leaves = [t for t in listener.outputs if t.requires_grad]
        if leaves:
            torch.autograd.grad(ends, leaves, directions, allow_unused=True)
        listener.outputs.clear()  # through their hooks they hold the listener, and so each other: gigabytes until the next collection
        del outputs, ends, leaves
    return found


def effect(sums: Tensor, images: int) -> Tensor:
    """Mean squared change of the network's outputs per unit mean squared error of each output of a layer: float64 (outputs,).

    (1 - r) * sum of g² + r * (sum of g)²; r, the share of the output's variance that lies between images, is the intraclass
    correlation (means of images vary by chance too: that part is taken off). `sums` over `images`.
    """
    alone, together, mean, squared_mean, square, positions = sums / images
    total = square - mean.square()
    between = positions * (squared_mean - mean.square()) / total.clamp(min=1e-300)
    share = torch.where(total > 0, (between - 1) / (positions - 1).clamp(min=1), torch.zeros_like(total)).clamp(min=0, max=1)
    mixed: Tensor = (1 - share) * alone + share * together
    return mixed


def _by_image(values: Tensor, axis: int) -> Tensor:
    """(images, outputs, positions) of a layer's output with its channels on `axis`."""
    return values.movedim(axis, 1).flatten(2) if values.ndim > 2 else values[:, :, None]


class _Listener(TorchFunctionMode):
    """Hangs a hook on the result of every call that takes one of the weights."""

    def __init__(self, names: Mapping[int, str], found: dict[str, Tensor]) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self._names = names
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the call; listen to its result if it is a conv or linear with a known weight."""
        out = func(*args, **(kwargs or {}))
        named = (self._names.get(id(a)) for a in (*args, *(kwargs or {}).values()) if isinstance(a, nn.Parameter))
        name = next((n for n in named if n is not None), None)
        kind = str(getattr(func, "__name__", func))
        if name is not None and isinstance(out, Tensor) and out.requires_grad and ("conv" in kind or "linear" in kind):
            axis = -1 if "linear" in kind else 1
            sums = self._found.setdefault(name, torch.zeros(6, out.shape[axis], dtype=torch.float64))
            values = _by_image(out.detach(), axis)
            means = values.mean(dim=2)
            sums[2:5] += torch.stack([means.sum(0), means.square().sum(0), values.square().mean(dim=2).sum(0)]).double().cpu()
            sums[5] += values.shape[0] * values.shape[2]
            out.register_hook(self._adder(name, axis))
            self.outputs.append(out)
        return out

    def _adder(self, name: str, axis: int) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            slopes = _by_image(gradient, axis)
            self._found[name][:2] += torch.stack([slopes.square().sum((0, 2)), slopes.sum(2).square().sum(0)]).double().cpu()

        return add


def _differentiable(value: Any) -> Any:
    """A copy of a floating input that gradients reach: without one, frozen parameters would leave nothing to differentiate."""
    return value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _parts(inputs: tuple[Any, ...], images: int) -> Iterator[tuple[Any, ...]]:
    """The batch in slices of at most `images`; whole where its tensors do not share a first axis."""
    tensors: Iterable[Tensor] = list(tensors_in(inputs))
    sizes = {t.shape[0] if t.ndim else -1 for t in tensors}
    if len(sizes) != 1 or isinstance(inputs[0], list):
        yield inputs
        return
    for start in range(0, sizes.pop(), images):
        yield tree_map(lambda t, at=start: t[at : at + images] if isinstance(t, Tensor) else t, inputs)
