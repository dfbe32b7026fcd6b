from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

from edgeprune import criteria
from edgeprune.graph import ChannelGroup
from tests.networks import NETWORKS, traced

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def by_hand(group: ChannelGroup, weights: dict[str, Any], output_axis: dict[str, int]) -> Any:
    """Mean over the layers that write the channel of the absolute sum of its filters, one channel and one layer at a time."""
    writers = [m for m in group.members if output_axis.get(m.parameter) == m.axis]
    assert len(writers) == group.producing
    rows = []
    for member in writers:
        w = np.moveaxis(weights[member.parameter], member.axis, 0)
        rows.append([sum(np.abs(w[i]).sum() for i in positions) for positions in member.indices])
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_equal_a_transcription_in_numpy(name: str) -> None:
    model, graph = traced(name)
    weights = {key: tensor.detach().numpy() for key, tensor in model.state_dict().items()}
    layers = {f"{n}.weight": int(isinstance(m, nn.ConvTranspose2d)) for n, m in model.named_modules() if isinstance(m, LAYERS)}
    scores = criteria.score(graph, model, "l1").values
    for group in graph.groups:
        np.testing.assert_allclose(scores[group.name], by_hand(group, weights, layers), rtol=1e-12)


def test_tied_layers_are_scored_together() -> None:
    model, graph = traced("residual")
    stream = graph.groups[0]
    assert [m.parameter for m in stream.members[: stream.producing]] == [
        "body.0.0.weight",
        "body.1.b.0.weight",
        "body.2.b.0.weight",
    ]
    state = model.state_dict()
    expected = np.mean([state[m.parameter].abs().sum((1, 2, 3)).numpy() for m in stream.members[:3]], axis=0)
    np.testing.assert_allclose(criteria.score(graph, model, "l1").values[stream.name], expected)
