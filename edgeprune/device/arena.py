"""What ONNX Runtime's CPU arena makes resident in an inference: its allocator, run on the activations of a network. No torch here.

Its sources (core/framework: bfc_arena.cc, mem_pattern_planner.h, allocation_planner.cc) decide how much more than liveness that is:
 - The first inference asks for one tensor after the other. Each gets the smallest free chunk that holds it; where there is none, the
   arena takes a region of the next power of two from the system, twice as large each time. A chunk is split only where half is left.
 - Later inferences ask for a single block, in which a plan made from the first one gives every tensor its place. It lies in a free region
   if one is large enough, and beside them all if not.
 - An addition behind a convolution is computed by it, onto the other operand.
Memory that nobody wrote is not resident, so the bytes that were handed out count, not the regions. A plan with fewer channels can take
more than one with more: its block may just not fit where a larger first tensor made a larger region.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeprune.device.kernels import FLOAT_BYTES, Kernels, buffers, same_size
from edgeprune.graph.lengths import Floats, checked

_FIRST_REGION_BYTES = 2**20
_ALIGNMENT_BYTES = 256
_LARGEST_REST_BYTES = 2**27  # a chunk with so much to spare is split in any case
_CONVS = ("conv1x1", "conv3x3", "conv_other", "depthwise", "depthwise_large", "grouped")


class _Step(NamedTuple):
    """Memory for activation `like` is taken, or given back, under the name `key`."""

    taken: bool
    key: tuple[str, int]
    like: int


class _Chunk(NamedTuple):
    start: int
    size: int
    used: bool


def arena_bytes(made: Kernels, widths: NDArray[Any], copied: Collection[str] = ()) -> Floats:
    """Resident bytes of the inputs and of the arena after two inferences, float32: (plans, groups) -> (plans,), about 1 ms a plan.

    Kernels of the kinds `copied` work on copies of what they read and write, in another layout.
    """
    plan_sizes = FLOAT_BYTES * made.activation_elements(checked(widths, len(made.graph.groups)))
    steps = list(_steps(made, copied))
    given = list(made.graph.input_activations)
    return np.array([_resident(steps, sizes) + sizes[given].sum() for sizes in plan_sizes], dtype=np.float64)


def _resident(steps: list[_Step], sizes: Floats) -> int:
    arena, block, held, placed = _Arena(), _Block(), {}, {}
    for step in steps:
        if step.taken:
            size = -(-max(int(sizes[step.like]), 1) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            held[step.key], placed[step.key] = arena.take(size), block.take(size)
        else:
            arena.give_back(held.pop(step.key))
            block.give_back(placed.pop(step.key))
    for place in held.values():  # the outputs
        arena.give_back(place)
    arena.take(block.size)
    return arena.touched


@dataclass
class _Arena:
    """Regions, newest last, each a list of chunks in order; and the stretches of each that were handed out."""

    next_size: int = _FIRST_REGION_BYTES
    regions: list[list[_Chunk]] = field(default_factory=list)
    stretches: list[list[tuple[int, int]]] = field(default_factory=list)

    def take(self, size: int) -> tuple[int, int]:
        """(number of the region, where in it)."""
        # The system places a new region below the older ones, and the lower of two equal chunks is taken first.
        fitting = [
            (chunk.size, -number, position)
            for number, region in enumerate(self.regions)
            for position, chunk in enumerate(region)
            if not chunk.used and chunk.size >= size
        ]
        number, position = (-min(fitting)[1], min(fitting)[2]) if fitting else (self._extend(size), 0)
        region = self.regions[number]
        start, whole, _ = region[position]
        if whole >= 2 * size or whole - size >= _LARGEST_REST_BYTES:
            region[position : position + 1] = [_Chunk(start, size, True), _Chunk(start + size, whole - size, False)]
        else:
            region[position] = _Chunk(start, whole, True)
        self.stretches[number].append((start, start + size))
        return number, start

    def _extend(self, size: int) -> int:
        enough = self.next_size >= size
        while self.next_size < size:
            self.next_size *= 2
        self.regions.append([_Chunk(0, self.next_size, False)])
        self.stretches.append([])
        if enough:
            self.next_size *= 2
        return len(self.regions) - 1

    def give_back(self, place: tuple[int, int]) -> None:
        """Free a chunk and join it with free neighbours."""
        region = self.regions[place[0]]
        position = next(n for n, chunk in enumerate(region) if chunk.start == place[1])
        first = position - (position > 0 and not region[position - 1].used)
        last = position + (position + 1 < len(region) and not region[position + 1].used)
        region[first : last + 1] = [_Chunk(region[first].start, sum(chunk.size for chunk in region[first : last + 1]), False)]

    @property
    def touched(self) -> int:
        """Bytes that were handed out at least once."""
        total = 0
        for stretches in self.stretches:
            end = 0
            for start, stop in sorted(stretches):
                total += max(stop - max(start, end), 0)
                end = max(end, stop)
        return total


@dataclass
class _Block:
    """The single block of later inferences: each tensor in the smallest gap between those alive, or behind them."""

    size: int = 0
    alive: list[tuple[int, int]] = field(default_factory=list)

    def take(self, size: int) -> tuple[int, int]:
        """(start, stop) of the tensor in the block."""
        end, gaps = 0, []
        for start, stop in sorted(self.alive):
            gaps += [(start - end, end)] if start - end >= size else []
            end = max(end, stop)
        start = min(gaps)[1] if gaps else end
        self.alive.append((start, start + size))
        self.size = max(self.size, start + size)
        return self.alive[-1]

    def give_back(self, place: tuple[int, int]) -> None:
        """Free the place."""
        self.alive.remove(place)


def _steps(made: Kernels, copied: Collection[str]) -> Iterator[_Step]:
    """What is taken and given back, in order; inputs are the caller's, outputs are given back by nobody."""
    owner = _owners(made)
    last: dict[int, int] = {}
    for kernel, (reads, write) in enumerate(zip(made.reads, made.writes, strict=True)):
        last.update({owner.get(a, a): kernel for a in (*reads, write)})
    ours = {owner.get(a, a) for a in made.writes} - set(made.graph.input_activations)
    kept = {owner.get(a, a) for a in made.graph.output_activations}
    born: set[int] = set()
    for kernel, (kind, reads, write) in enumerate(zip(made.kinds, made.reads, made.writes, strict=True)):
        own, out = dict.fromkeys(owner.get(a, a) for a in reads), owner.get(write, write)
        dying = [a for a in dict.fromkeys((*own, out)) if a in ours - kept and last[a] == kernel]
        inside = _Step(True, ("inside", write), write)
        if kind in copied:
            copies = [_Step(True, ("copy", a), a) for a in dict.fromkeys(reads)]
            gone = [a for a in dying if a in own and a != out]
            yield from (*copies, *(_Step(False, ("own", a), a) for a in gone), inside)
            yield from (copy._replace(taken=False) for copy in copies)
            dying = [a for a in dying if a not in gone]
        if out in ours - born:
            born.add(out)
            yield _Step(True, ("own", out), write)
        if kind not in copied and made.composed[kernel]:
            yield inside
        if kind in copied or made.composed[kernel]:
            yield inside._replace(taken=False)
        yield from (_Step(False, ("own", a), a) for a in dying)


def _owners(made: Kernels) -> dict[int, int]:
    """Activation -> the one whose memory it takes: what elementwise kernels overwrite, and what a convolution adds its result to."""
    owner = dict(buffers(made))
    producer = {write: kernel for kernel, write in enumerate(made.writes)}
    last_read = {a: kernel for kernel, reads in enumerate(made.reads) for a in reads}
    for kernel, (kind, reads, write) in enumerate(zip(made.kinds, made.reads, made.writes, strict=True)):
        operands = sorted((a for a in set(reads) if a in producer and last_read[a] == kernel), key=lambda a: producer[a])
        if kind == "elementwise" and len(operands) == 2 and same_size(made.graph, *operands):
            earlier, later = operands
            if made.kinds[producer[later]] in _CONVS:
                owner |= {later: earlier, write: earlier}
    return {a: _root(owner, a) for a in owner}


def _root(owner: dict[int, int], number: int) -> int:
    while number in owner:
        number = owner[number]
    return number
