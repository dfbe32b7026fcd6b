"""Which layers are refitted after a cut, and what must be known of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.graph import ChannelGraph, Op
from edgeprune.train.moments import sampled_places

Gone = Mapping[tuple[str, int], NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class Target:
    """One layer to refit: its operation, what stays of it, the batch norm behind it, the call whose result is added to it.

    `read`: which of the values that an output reads stay; None of layers with conv groups. `kept`: the outputs that stay. `rectified`:
    what comes of these goes through a ReLU and nowhere else. `scaled`: a depthwise conv, of which only the scale of each channel is
    refitted: it mixes no channels, so what it lost is not in its inputs. `constant`: nothing that it reads stays, and of its branch only
    a constant, which is refitted because no layer behind could make up for it.
    """

    op: Op
    read: Tensor | None
    kept: Tensor
    norm: Op | None
    places: Tensor
    beside: int | None
    rectified: bool
    scaled: bool
    constant: bool = False


def could_go(graph: ChannelGraph) -> Gone:
    """Every parameter axis that may lose something, none of it lost."""
    axes = {(member.parameter, member.axis) for group in graph.groups for member in group.members}
    return {(name, axis): np.zeros(graph.shapes[name][axis], dtype=bool) for name, axis in axes}


def targets_of(graph: ChannelGraph, gone: Gone, positions: int, empty: Collection[str] = ()) -> dict[int, Target]:
    """By call number, every conv and linear from the first one on that lost inputs; fitted at so many positions of each image's map.

    `empty`: groups of which nothing stays; what runs in their branches alone is no target, but for a last layer with no other behind.
    """
    stopped = {graph.ops[number].weight for name in empty for number in graph.branches[name].ops}
    ends = {end.weight for name in empty for end in graph.branches[name].ends}
    last = max((op.call for op in graph.ops if op.kind in ("conv", "linear") and op.weight and op.weight not in stopped), default=-1)
    ends = {op.weight for op in graph.ops if op.weight in ends and op.call > last}
    stopped -= ends
    norms = {op.inputs[0]: op for op in graph.ops if op.kind == "norm" and op.inputs and op.weight}
    seen: set[str] = set()
    begun = False
    targets: dict[int, Target] = {}
    for op in graph.ops:
        if op.kind not in ("conv", "linear") or op.weight is None or op.weight in seen:
            continue
        seen.add(op.weight)
        shape = graph.shapes[op.weight]
        begun = begun or (op.weight, 1) in gone
        if not begun or op.name == "bmm" or op.weight in stopped:
            continue
        if op.kind == "conv" and graph.activations[op.output].shape[1] != shape[0]:  # transposed
            continue
        lost = gone.get((op.weight, 0), np.zeros(shape[0], dtype=bool))
        norm = norms.get(op.output)
        norm = norm if norm and graph.keeps_statistics(norm) else None
        spatial = int(np.prod(graph.activations[op.output].shape[2:])) if op.kind == "conv" else 1
        places = sampled_places([spatial], positions, op.call)
        kept = torch.from_numpy(np.flatnonzero(~lost))
        scaled = op.groups > 1 and shape[1] == 1
        inputs = gone.get((op.weight, 1), np.zeros(shape[1], dtype=bool))
        read = None if op.groups > 1 else torch.from_numpy(~inputs).repeat_interleave(int(np.prod(shape[2:])))
        constant = op.weight in ends
        targets[op.call] = Target(
            op, read, kept, norm, places, _beside(graph, op), _rectified(graph, op), scaled and not constant, constant
        )
    return targets


def result_of(graph: ChannelGraph, op: Op) -> Op:
    """The last of a layer, the norm behind it and the sum behind that, as far as nothing else reads what is in between."""
    for kind in ("norm", "add"):
        readers = _readers(graph, op.output)
        if len(readers) == 1 and readers[0].kind == kind:
            op = readers[0]
    return op


def _rectified(graph: ChannelGraph, op: Op) -> bool:
    """Whether a layer's result goes, through its norm and a sum at most, into a ReLU and nowhere else."""
    number = result_of(graph, op).output
    readers = _readers(graph, number)
    return len(readers) == 1 and readers[0].name == "relu" and number not in graph.output_activations


def _readers(graph: ChannelGraph, number: int) -> list[Op]:
    return [op for op in graph.ops if number in op.inputs]


def _beside(graph: ChannelGraph, op: Op) -> int | None:
    """The call that made the other operand of the residual sum this layer writes into (through its norm), if it ran before."""
    outputs = {op.output, *(n.output for n in graph.ops if n.kind == "norm" and n.inputs and n.inputs[0] == op.output)}
    for add in graph.ops:
        if add.kind == "add" and len(add.inputs) == 2 and outputs & set(add.inputs):
            other = next((a for a in add.inputs if a not in outputs), None)
            made = next((o.call for o in reversed(graph.ops) if o.output == other and o.call < op.call), None)
            same = other is not None and graph.activations[other].shape == graph.activations[op.output].shape
            return made if same else None
    return None
