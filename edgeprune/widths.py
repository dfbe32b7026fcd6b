"""Which widths a plan may choose: the user's say in what is pruned, the same for every allocator. Neither torch nor numpy here."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from edgeprune.errors import UsageError

if TYPE_CHECKING:
    from edgeprune.graph import ChannelGraph, ChannelGroup
    from edgeprune.graph.branches import Branch


@dataclass(frozen=True, kw_only=True)
class WidthRules:
    """Which widths a plan may choose, whoever makes it.

    round_to: layers keep a multiple of so many filters, or all. min_channels: no layer gets fewer filters, one that has fewer stays
    whole; 0: residual branches may go as a whole. max_remove: no group loses more than this share of its channels, unless its branch
    goes as a whole. keep_dense: patterns (*, ?, [abc]) of what stays as it
    is: the name of a group or of a layer keeps the channels it makes, the name of a parameter everything that reaches it.
    Raises UsageError for values out of range.
    """

    round_to: int = 8
    min_channels: int = 1
    max_remove: float = 0.9
    keep_dense: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.round_to < 1 or self.min_channels < 0:
            raise UsageError(f"round_to must be 1 or more and min_channels 0 or more, got {self.round_to} and {self.min_channels}.")
        if not 0 <= self.max_remove <= 1:
            raise UsageError(f"max_remove is the largest share of a group that may go, in [0, 1], got {self.max_remove}.")
        object.__setattr__(self, "keep_dense", (self.keep_dense,) if isinstance(self.keep_dense, str) else tuple(self.keep_dense))

    def allowed(self, graph: ChannelGraph) -> tuple[tuple[int, ...], ...]:
        """The widths each group may take, ascending, the dense one last. Raises UsageError for a pattern that matches nothing."""
        dense = self.dense_groups(graph)
        whole = {name for name, branch in graph.branches.items() if self.min_channels == 0 and not self._names(branch)}
        return tuple(
            (g.channels,) if g.name in dense else (*((0,) if g.name in whole else ()), *g.widths(self.round_to, self._minimum(g)))
            for g in graph.groups
        )

    def dense_groups(self, graph: ChannelGraph) -> frozenset[str]:
        """The groups that keep_dense names. Raises UsageError, with near matches, for a pattern that matches nothing."""
        reached: dict[str, set[str]] = {name: set() for name in graph.shapes}
        for op in graph.multiplying:
            reached.setdefault((op.weight or "").removesuffix(".weight"), set())
        for group in graph.groups:
            reached.setdefault(group.name, set()).add(group.name)
            for number, member in enumerate(group.members):
                reached[member.parameter].add(group.name)
                if number < group.producing:
                    reached.setdefault(member.parameter.removesuffix(".weight"), set()).add(group.name)
        dense: set[str] = set()
        for pattern in self.keep_dense:
            matched = [name for name in reached if fnmatchcase(name, pattern)]
            if not matched:
                near = _near(pattern, reached)
                hint = f"Did you mean {' or '.join(near)}?" if near else "edgeprune inspect lists the groups."
                raise UsageError(f"keep_dense: {pattern!r} matches no group, layer or parameter of this network. {hint}")
            dense.update(*(reached[name] for name in matched))
        return frozenset(dense)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for run.json and the keys of stages."""
        return asdict(self) | {"keep_dense": list(self.keep_dense)}

    def _names(self, branch: Branch) -> bool:
        """Whether keep_dense names a layer or a parameter of a branch."""
        tensors = {*branch.tensors, *(name for end in branch.ends for name in (end.weight, *end.held))}
        return any(fnmatchcase(name, p) for p in self.keep_dense for t in tensors for name in (t, t.removesuffix(".weight")))

    def _minimum(self, group: ChannelGroup) -> int:
        removable = math.floor(self.max_remove * group.channels + 1e-9)  # 0.29 * 100 is a little less than 29
        return max(1, math.ceil(self.min_channels / group.filters), group.channels - removable)


def _near(pattern: str, names: Collection[str]) -> list[str]:
    """What was perhaps meant: the beginnings of names for a pattern that ends with *, else whole names."""
    if pattern.endswith("*"):
        starts = {".".join(parts[:n]) for name in names if (parts := name.split(".")) for n in range(1, len(parts))}
        if near := difflib.get_close_matches(pattern.rstrip(".*"), sorted(starts), n=3):
            return [f"{start}.*" for start in near]
    return difflib.get_close_matches(pattern.strip(".*"), names, n=3)


DEFAULT_RULES = WidthRules()
