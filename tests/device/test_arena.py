from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.device.arena import _Arena, arena_bytes
from edgeprune.device.kernels import Kernels, kernels
from edgeprune.graph.trace import trace

MB, SIDE = 2**20, 64
CHANNEL = 4 * SIDE * SIDE  # bytes
INPUT = 3 * CHANNEL


def chain(*widths: int) -> Kernels:
    """1x1 convolutions, one after the other."""
    sizes = (3, *widths)
    layers = [nn.Sequential(nn.Conv2d(a, b, 1), nn.ReLU()) for a, b in pairwise(sizes)]
    return kernels(trace(nn.Sequential(*layers).eval(), torch.zeros(1, 3, SIDE, SIDE)))


def dense_bytes(made: Kernels, *copied: str) -> float:
    return float(arena_bytes(made, made.graph.dense_widths, copied)[0])


def test_tensors_that_take_turns_share_a_region() -> None:
    # 256 KB each: the first two lie side by side in a region of 1 MB, the third where the first was, the block of later runs over both.
    assert dense_bytes(chain(16, 16, 16)) == INPUT + 2 * 16 * CHANNEL


def test_a_block_goes_where_it_fits() -> None:
    # 640 KB leaves less than half of 1 MB: the second tensor opens 2 MB, where the block of both then lies; the first's place stays.
    assert dense_bytes(chain(40, 40, 40)) == INPUT + 3 * 40 * CHANNEL


def test_regions_grow_as_the_allocator_s() -> None:
    arena = _Arena()
    for size in (6422528, 6422528, 19267584):  # MobileNetV2's at 448 pixels, for which the runtime logs regions of 8, 8 and 32 MB
        arena.take(size)
    assert [sum(chunk.size for chunk in region) for region in arena.regions] == [8 * MB, 8 * MB, 32 * MB]


def test_what_is_given_back_is_one_piece_again() -> None:
    arena = _Arena()
    places = [arena.take(MB // 8) for _ in range(3)]
    for number in (0, 2, 1):
        arena.give_back(places[number])
    assert [[(chunk.size, chunk.used) for chunk in region] for region in arena.regions] == [[(MB, False)]]
    assert arena.touched == 3 * MB // 8


def test_fewer_channels_can_take_more() -> None:
    # The third tensor lies where the first of 40 channels was; one channel less leaves no such gap, and the block is longer.
    more, less = arena_bytes(chain(40, 24, 40), np.array([[39, 24], [40, 24]]))
    assert more > less


def test_an_addition_is_computed_by_the_convolution_before_it() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.stem(x)
            return torch.relu(y + self.body(y))

    made = kernels(trace(Residual().eval(), torch.zeros(1, 3, SIDE, SIDE)))
    assert dense_bytes(made) == INPUT + 16 * CHANNEL


@pytest.mark.parametrize(("copied", "channels"), [((), 2 * 16), (("conv1x1",), 3 + 2 * 16)])
def test_other_layouts_are_copies(copied: tuple[str, ...], channels: int) -> None:
    # The input's copy, the result in the plain layout, and that in the usual one; what is read is gone once it is copied.
    assert dense_bytes(chain(16, 16), *copied) == INPUT + channels * CHANNEL


def test_every_plan_alone() -> None:
    made = chain(16, 40, 8)
    plans = np.array([[16, 40], [3, 7], [1, 1]])
    together = arena_bytes(made, plans, ("conv1x1",))
    assert together.tolist() == [arena_bytes(made, plan, ("conv1x1",))[0] for plan in plans]
