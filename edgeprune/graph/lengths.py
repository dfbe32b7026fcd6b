"""How large every parameter is under any widths of the groups, in closed form. No torch here.

An axis of a parameter is as long as its fixed positions and, for every group that reaches it, the group's width times the positions
each channel owns there; a parameter is as large as the product of its axes. Whole batches of widths are evaluated at once, because
allocators ask in loops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import UsageError

if TYPE_CHECKING:
    from edgeprune.graph.channels import ChannelGraph

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sizes:
    """Sizes that are linear in the widths: fixed + widths @ slope, for many quantities at once."""

    fixed: Floats  # (quantities,)
    slope: Floats  # (groups, quantities)

    def at(self, widths: Floats) -> Floats:
        """(plans, groups) -> (plans, quantities)."""
        return self.fixed + widths @ self.slope


def axis_lengths(graph: ChannelGraph, names: Iterable[str | None]) -> tuple[Sizes, ...]:
    """Axis lengths of the named parameters (None: a scalar), one Sizes per axis number."""
    wanted = list(names)
    shapes = [graph.shapes[name] if name else () for name in wanted]
    columns: dict[str, list[int]] = {}
    for column, name in enumerate(wanted):
        columns.setdefault(name or "", []).append(column)
    rank = max((len(shape) for shape in shapes), default=0)
    fixed = [np.array([s[axis] if axis < len(s) else 1.0 for s in shapes], dtype=np.float64) for axis in range(rank)]
    slope = [np.zeros((len(graph.groups), len(wanted))) for _ in range(rank)]
    for group, parameter, axis, channels, span in _spans(graph):
        for column in columns.get(parameter, ()):
            slope[axis][group, column] += span
            fixed[axis][column] -= channels * span
    return tuple(Sizes(f, s) for f, s in zip(fixed, slope, strict=True))


def elements(axes: tuple[Sizes, ...], widths: Floats) -> Floats:
    """Elements of each parameter, the product of its axes: (plans, groups) -> (plans, parameters)."""
    result = np.ones((len(widths), len(axes[0].fixed) if axes else 0))
    for axis in axes:
        # Kernel axes never change: skip the matrix product for them.
        result *= axis.at(widths) if axis.slope.any() else axis.fixed
    return result


def checked(widths: NDArray[Any], groups: int) -> Floats:
    """Widths as (plans, groups), also where one plan came alone. Raises UsageError for another number of groups."""
    w = np.atleast_2d(np.asarray(widths, dtype=np.float64))
    if w.ndim != 2 or w.shape[1] != groups:
        raise UsageError(f"widths must have the shape (plans, {groups} groups), got {np.shape(widths)}.")
    return w


def _spans(graph: ChannelGraph) -> Iterator[tuple[int, str, int, int, int]]:
    for number, group in enumerate(graph.groups):
        for member in group.members:
            yield number, member.parameter, member.axis, *member.indices.shape
