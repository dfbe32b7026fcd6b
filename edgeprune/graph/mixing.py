"""Operations that compute over the set of channels (layer, group and RMS norm, means and sums over channels, matrix products).

Zeros in the place of removed channels change what they compute, so that a network masked by zeros is not the pruned one. The dense
twin therefore runs them over the kept channels alone: each takes the kept positions of what it reads, computes, and puts the result
back in its place among zeros. Everything else of the twin is the user's dense network with zeroed weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from edgeprune.graph.channels import Mixing
from edgeprune.graph.running import Observer, operation_name

Kept = tuple[Mixing, tuple[Tensor, ...]]


class _KeptOnly(Observer):
    """Runs the listed operations over kept positions; `kept` is keyed by operation and how many of that name ran before it."""

    def __init__(self, kept: Mapping[tuple[str, int], Kept]) -> None:
        super().__init__()
        self.kept = kept
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """The operation's result in its dense size, removed positions zero."""
        name = operation_name(func)
        mixed = self.kept.get((name, self.seen[name]))
        self.seen[name] += 1
        if mixed is None:
            return func(*args, **(kwargs or {}))
        mixing, kept = mixed
        thin = list(args)
        for read, positions in zip(mixing.reads, kept, strict=True):
            thin[read.argument] = thin[read.argument].index_select(read.axis, positions.to(thin[read.argument].device))
        if name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
            thin[1] = list(thin[0].shape[-len(args[1]) :])
        elif name == "native_group_norm":
            thin[4], thin[6] = thin[0].shape[1], args[6] if args[6] < args[4] else thin[0].shape[1]
        out = func(*thin, **(kwargs or {}))
        first = out if isinstance(out, Tensor) else out[0]
        for axis, positions, read in zip(mixing.output_axes, kept, mixing.reads, strict=False):
            first = _spread(first, args[read.argument], axis, positions)
        return first if isinstance(out, Tensor) else (first, *out[1:])


def _spread(thin: Tensor, dense: Tensor, axis: int, kept: Tensor) -> Tensor:
    shape = [dense.shape[axis] if d == axis else n for d, n in enumerate(thin.shape)]
    return thin.new_zeros(shape).index_copy_(axis, kept.to(thin.device), thin)


def compute_over_kept(twin: nn.Module, kept: Mapping[tuple[str, int], Kept]) -> None:
    """From now on every call of `twin` runs these operations over kept positions (by hooks: its class stays).

    `kept` is looked at in every call: it may change between them.
    """
    running: list[_KeptOnly] = []

    def enter(*_: Any) -> None:
        if kept:
            running.append(_KeptOnly(kept))
            running[-1].__enter__()

    def leave(*_: Any) -> None:
        if running:
            running.pop().__exit__(None, None, None)

    twin.register_forward_pre_hook(enter)
    twin.register_forward_hook(leave, always_call=True)
