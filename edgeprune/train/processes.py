"""The processes that train together: one alone, or those that `accelerate launch` started, with the same result.

Every process computes its part of each global batch. Gradients and the statistics of batch norms are summed over all of them, so that
a step is that of one process with the whole batch, up to rounding. Files are written by the leader alone; what it decides, the
others are told. They need the same folder: on several machines, a shared one. Without a GPU accelerate's launcher starts more than
one process only through MPI or, as for GPUs, with --multi_gpu; they then talk by gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # the others wait while the leader measures a board; if it dies, the launcher ends them


@dataclass(frozen=True)
class Processes:
    """`index` of `count` processes, computing on `device`."""

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.index == 0

    def told(self, value: T) -> T:
        """What the leader has as `value`, in every process; a small picklable object."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all processes, in one exchange for every type of number."""
        if self.count == 1:
            return
        for kind in dict.fromkeys(t.dtype for t in tensors):
            mine = [t for t in tensors if t.dtype == kind]
            flat = torch.cat([t.reshape(-1) for t in mine])
            distributed.all_reduce(flat)
            for tensor, total in zip(mine, flat.split([t.numel() for t in mine]), strict=True):
                tensor.copy_(total.view_as(tensor))

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Batch norms in training take mean and variance over the images of all processes meanwhile."""
        if self.count == 1:
            yield
            return
        with _GlobalStatistics():
            yield


def processes() -> Processes:
    """Those that accelerate started; this process alone otherwise, on the accelerator if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(device=torch.accelerator.current_accelerator() or torch.device("cpu"))
    from accelerate.state import PartialState  # half a second that one process need not spend

    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, torch.device(state.device))


class _GlobalStatistics(TorchFunctionMode):
    """Computes every batch norm in training over all processes, whichever module calls it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(  # noqa: PLR0917  the arguments of the function it stands for
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm as torch has it, with statistics over the images of all processes (arguments by torch's names)."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    axes, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    rows = x.numel() // x.shape[1]
    mean = x.mean(axes).double()
    scatter = (x - mean.to(x.dtype).view(shape)).square().sum(axes).double()
    # float64, because the sum of squares about zero would lose the variance of channels far from it.
    sums: Tensor = _Sum.apply(torch.cat([rows * mean, scatter + rows * mean.square(), mean.new_tensor([rows])]))  # type: ignore[no-untyped-call]
    first, second, total = sums.split([len(mean), len(mean), 1])
    mean = first / total
    variance = second / total - mean.square()
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * total / (total - 1)).to(running_var.dtype), momentum)
    scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight
    out = (x - mean.to(x.dtype).view(shape)) * scale.to(x.dtype).view(shape)
    shifted: Tensor = out if bias is None else out + bias.view(shape)
    return shifted.to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes, and the sum of its gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        distributed.all_reduce(grad)
        return grad
