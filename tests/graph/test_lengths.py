from __future__ import annotations

import numpy as np
import pytest

from edgeprune.errors import UsageError
from edgeprune.graph.lengths import Sizes, axis_lengths, checked, elements
from tests.networks import traced


def test_an_axis_is_its_fixed_positions_and_what_the_groups_own() -> None:
    """DenseNet: the norm over 6 + 4 + 4 channels has three groups; the classifier's classes are fixed."""
    graph = traced("dense")[1]
    assert [g.channels for g in graph.groups] == [6, 4, 4, 7]
    (norm,) = axis_lengths(graph, ["body.3.weight"])
    assert (norm.fixed.tolist(), norm.slope[:, 0].tolist()) == ([0.0], [1.0, 1.0, 1.0, 0.0])
    rows, columns = axis_lengths(graph, ["fc.weight"])
    assert rows.fixed.tolist() == [5.0] and not rows.slope.any()
    assert columns.at(np.array([[6.0, 4, 4, 3]])).tolist() == [[3.0]]


def test_positions_per_channel_count() -> None:
    graph = traced("flatten")[1]
    fc = axis_lengths(graph, ["fc1.weight"])
    number = next(n for n, g in enumerate(graph.groups) if g.name == "conv2")
    assert fc[1].slope[number, 0] == 16
    widths = np.array([[g.channels for g in graph.groups]], dtype=np.float64)
    widths[0, number] = 2
    assert elements(fc, widths)[0, 0] == 32 * 12


def test_scalars_and_short_parameters_stand_beside_long_ones() -> None:
    graph = traced("plain")[1]
    axes = axis_lengths(graph, [None, "fc.bias", "body.0.0.weight"])
    widths = np.array([g.channels for g in graph.groups], dtype=np.float64)[None]
    assert elements(axes, widths).tolist() == [[1.0, 5.0, 216.0]]
    assert elements((), widths).shape == (1, 0)


def test_widths_come_as_plans() -> None:
    assert checked(np.array([3, 4]), 2).shape == (1, 2)
    assert checked(np.ones((5, 2)), 2).dtype == np.float64
    with pytest.raises(UsageError, match=r"must have the shape \(plans, 3 groups\), got \(2,\)"):
        checked(np.array([3, 4]), 3)
    assert Sizes(np.array([1.0]), np.array([[2.0]])).at(np.array([[3.0]])).tolist() == [[7.0]]
