from __future__ import annotations

import numpy as np
import torch

from edgeprune import criteria
from tests.networks import build, traced


def test_scores_are_the_scale_of_the_norm_behind_the_conv() -> None:
    model, graph = traced("plain")
    scores = criteria.score(graph, model, "bn_scale")
    np.testing.assert_allclose(scores.values["body.2.0"], model.get_parameter("body.2.1.weight").detach().abs().numpy())
    assert scores.facts["without_norm"] == []


def test_the_sign_does_not_count_and_a_closed_gate_is_the_least() -> None:
    model, graph = build("plain"), traced("plain")[1]
    before = criteria.score(graph, model, "bn_scale").values["body.0.0"]
    with torch.no_grad():
        gamma = model.get_parameter("body.0.1.weight")
        gamma.neg_()
        gamma[5] = 0
    after = criteria.score(graph, model, "bn_scale").values["body.0.0"]
    assert after[5] == 0 and (np.delete(after, 5) == np.delete(before, 5)).all() and after.argmin() == 5


def test_tied_layers_and_every_reader_of_a_concatenation_count() -> None:
    for name, group, norms in (
        ("residual", "body.0.0", ["body.0.1", "body.1.b.1", "body.2.b.1"]),
        ("mobile", "body.1.a.0", ["body.1.a.1", "body.1.b.1"]),
    ):
        model, graph = traced(name)
        expected = np.mean([model.get_parameter(f"{n}.weight").detach().abs().numpy() for n in norms], axis=0)
        np.testing.assert_allclose(criteria.score(graph, model, "bn_scale").values[group], expected)
    model, graph = traced("dense")
    own, first = (model.get_parameter(f"{n}.weight").detach().abs().numpy() for n in ("body.2.norm", "body.3"))
    np.testing.assert_allclose(criteria.score(graph, model, "bn_scale").values["body.1.conv"], (own[6:10] + first[6:10]) / 2)


def test_channels_that_span_several_positions_have_their_mean() -> None:
    model, graph = traced("grouped")
    gamma = model.get_parameter("body.1.a.1.weight").detach().abs().numpy()
    group = next(g for g in graph.groups if g.name == "body.1.a.0")
    np.testing.assert_allclose(criteria.score(graph, model, "bn_scale").values[group.name], gamma[group.members[0].indices].mean(axis=1))


def test_groups_without_norms_have_the_length_of_their_filters_and_are_named() -> None:
    model, graph = traced("literal_flatten")
    scores = criteria.score(graph, model, "bn_scale")
    assert scores.facts["without_norm"] == [g.name for g in graph.groups]
    expected = criteria.score(graph, model, "l2").values
    assert all((scores.values[name] == expected[name]).all() for name in expected)
    mixed = criteria.score(traced("mlp")[1], traced("mlp")[0], "bn_scale")
    assert mixed.facts["without_norm"] == ["3"]
