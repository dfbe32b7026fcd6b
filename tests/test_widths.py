from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeprune.errors import UsageError
from edgeprune.graph import ChannelGraph
from edgeprune.graph.trace import trace
from edgeprune.widths import DEFAULT_RULES, WidthRules
from tests.networks import traced


def allowed(graph: ChannelGraph, **rules: object) -> dict[str, tuple[int, ...]]:
    chosen = WidthRules(**{"round_to": 1, "max_remove": 1.0, **rules})  # type: ignore[arg-type]
    return dict(zip((g.name for g in graph.groups), chosen.allowed(graph), strict=True))


@pytest.mark.parametrize(
    ("rules", "first", "second"),
    [
        ({}, tuple(range(1, 9)), tuple(range(1, 13))),
        ({"round_to": 4}, (4, 8), (4, 8, 12)),
        ({"min_channels": 5}, (5, 6, 7, 8), tuple(range(5, 13))),
        ({"min_channels": 9}, (8,), (9, 10, 11, 12)),
        ({"max_remove": 0.25}, (6, 7, 8), (9, 10, 11, 12)),
        ({"max_remove": 0.3}, (6, 7, 8), (9, 10, 11, 12)),  # 2.4 and 3.6 channels may go: two and three
        ({"max_remove": 0.0}, (8,), (12,)),
        ({"max_remove": 0.5, "min_channels": 7, "round_to": 4}, (8,), (8, 12)),
        ({"keep_dense": ["body.0.0"]}, (8,), tuple(range(1, 13))),
    ],
)
def test_all_rules_hold_at_once(rules: dict[str, object], first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Three convs of 8, 12 and 6 channels."""
    widths = allowed(traced("plain")[1], **rules)
    assert (widths["body.0.0"], widths["body.2.0"]) == (first, second)


def test_a_share_that_floats_cannot_write_is_not_rounded_away() -> None:
    graph = traced("mlp")[1]
    assert [g.channels for g in graph.groups] == [10, 7]
    assert allowed(graph, max_remove=0.7)["0"][0] == 3
    assert allowed(graph, max_remove=0.3)["0"][0] == 7
    wide = trace(nn.Sequential(nn.Linear(3, 100), nn.ReLU(), nn.Linear(100, 2)), torch.zeros(1, 3))
    assert 0.29 * 100 < 29
    assert allowed(wide, max_remove=0.29)["0"][0] == 71


def test_min_channels_counts_filters() -> None:
    """The grouped conv's three groups of four filters lose one filter each at a time."""
    graph = traced("grouped")[1]
    tied = next(g for g in graph.groups if g.filters == 3)
    assert tied.channels == 4
    assert allowed(graph, min_channels=7)[tied.name] == (3, 4)


def test_only_residual_branches_may_go_as_a_whole() -> None:
    """The block's inner width may be 0, whatever max_remove says; the stream's may not, and no width in a network without branches."""
    graph = traced("residual")[1]
    widths = allowed(graph, min_channels=0, max_remove=0.5)
    assert widths == {"body.0.0": (4, 5, 6, 7, 8), "body.1.a.0": (0, 4, 5, 6, 7, 8), "body.2.a.0": (0, 4, 5, 6, 7, 8)}
    assert allowed(graph, min_channels=0, round_to=8)["body.1.a.0"] == (0, 8)
    assert allowed(graph, min_channels=0, keep_dense=["body.1.*"])["body.1.a.0"] == (8,)
    assert allowed(graph, min_channels=0, keep_dense=["body.1.b.1.bias"])["body.1.a.0"][0] == 1, "its last layer was to stay"
    assert allowed(graph, min_channels=1)["body.1.a.0"] == tuple(range(1, 9))
    plain = traced("plain")[1]
    assert allowed(plain, min_channels=0) == allowed(plain)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("body.2.0", {"body.2.0"}),
        ("body.2.0.weight", {"body.0.0", "body.2.0"}),  # a parameter stays whole: what it reads and what it makes
        ("body.2.*", {"body.0.0", "body.2.0"}),
        ("fc.weight", {"body.3.0"}),
        ("fc", set()),  # what it makes is frozen anyway
        ("body.?.0", {"body.0.0", "body.2.0", "body.3.0"}),
        ("*", {"body.0.0", "body.2.0", "body.3.0"}),
    ],
)
def test_patterns_name_groups_layers_and_parameters(pattern: str, expected: set[str]) -> None:
    assert WidthRules(keep_dense=[pattern]).dense_groups(traced("plain")[1]) == expected


def test_any_layer_that_makes_the_channels_of_a_group_names_it() -> None:
    graph = traced("residual")[1]
    stream = graph.groups[0].name
    assert WidthRules(keep_dense=["body.1.b.0"]).dense_groups(graph) == {stream}
    assert WidthRules(keep_dense=["body.1.a.0", "body.1.b.0"]).dense_groups(graph) == {stream, "body.1.a.0"}


def test_a_pattern_that_matches_nothing_is_a_usage_error_with_near_matches() -> None:
    graph = traced("plain")[1]
    with pytest.raises(UsageError, match=r"'body\.2\.O' matches no group.* Did you mean body\.2\.0"):
        WidthRules(keep_dense=["body.0.0", "body.2.O"]).allowed(graph)
    with pytest.raises(UsageError, match=r"'bdy\.2\*' matches no group.* Did you mean body\.2\.\*"):
        WidthRules(keep_dense=["bdy.2*"]).allowed(graph)
    with pytest.raises(UsageError, match=r"'\*body\.2\.O' matches no group.* Did you mean body\.2\.0"):
        WidthRules(keep_dense=["*body.2.O"]).allowed(graph)
    with pytest.raises(UsageError, match=r"'' matches no group.* edgeprune inspect lists"):
        WidthRules(keep_dense=[""]).allowed(graph)


def test_values_out_of_range_are_usage_errors() -> None:
    for wrong in ({"round_to": 0}, {"min_channels": -1}, {"max_remove": 1.1}, {"max_remove": -0.1}, {"max_remove": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            WidthRules(**wrong)


def test_rules_are_values() -> None:
    assert WidthRules(keep_dense="a") == WidthRules(keep_dense=["a"]) == WidthRules(keep_dense=("a",))
    assert DEFAULT_RULES.to_json() == {"round_to": 8, "min_channels": 1, "max_remove": 0.9, "keep_dense": []}
    assert WidthRules(**WidthRules(keep_dense=["x"], min_channels=3).to_json()) == WidthRules(keep_dense=["x"], min_channels=3)
