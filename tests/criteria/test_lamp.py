from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import criteria
from edgeprune.criteria.lamp import lamp
from tests.networks import build, traced

SQUARES = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12).map(np.array)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(squares=SQUARES)
def test_scores_equal_their_definition(squares: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
    expected = [n / s if (s := sum(d for d in squares if d >= n)) else 0 for n in squares]
    np.testing.assert_allclose(lamp(squares), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["plain", "twice", "transposed"])
def test_the_order_is_that_of_l2_and_the_best_channel_of_a_layer_scores_one(name: str) -> None:
    model, graph = traced(name)
    found, lengths = (criteria.score(graph, model, c).values for c in ("lamp", "l2"))
    for group in graph.groups:
        if group.producing == 1:
            assert (np.argsort(found[group.name]) == np.argsort(lengths[group.name])).all()
            assert found[group.name].max() == 1


def test_tied_layers_are_scored_by_the_mean_of_their_own_shares() -> None:
    model, graph = traced("residual")
    stream = graph.groups[0]
    rows = [lamp(model.get_parameter(m.parameter).detach().square().sum((1, 2, 3)).numpy()) for m in stream.members[: stream.producing]]
    np.testing.assert_allclose(criteria.score(graph, model, "lamp").values[stream.name], np.mean(rows, axis=0))


def test_scale_does_not_matter_and_zeros_are_the_least() -> None:
    model, graph = build("plain"), traced("plain")[1]
    before = criteria.score(graph, model, "lamp").values
    with torch.no_grad():
        model.get_parameter("body.2.0.weight").mul_(7)
    after = criteria.score(graph, model, "lamp").values
    assert all(np.allclose(after[name], before[name], rtol=1e-12) for name in before)
    with torch.no_grad():
        model.get_parameter("body.2.0.weight")[3] = 0
    assert criteria.score(graph, model, "lamp").values["body.2.0"][3] == 0
    with torch.no_grad():
        model.get_parameter("body.2.0.weight").zero_()
    assert (criteria.score(graph, model, "lamp").values["body.2.0"] == 0).all()
