from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeprune import criteria
from tests.networks import build, traced


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "transposed", "twice", "flatten"])
def test_scores_equal_a_transcription_in_numpy(name: str) -> None:
    model, graph = traced(name)
    weights = {key: tensor.detach().numpy() for key, tensor in model.state_dict().items()}
    scores = criteria.score(graph, model, "l2").values
    for group in graph.groups:
        rows = []
        for member in group.members[: group.producing]:
            w = np.moveaxis(weights[member.parameter], member.axis, 0)
            rows.append([np.sqrt(sum((w[i] ** 2).sum() for i in positions)) for positions in member.indices])
        np.testing.assert_allclose(scores[group.name], np.mean(rows, axis=0), rtol=1e-12)


def test_a_channel_of_zeros_scores_zero_and_no_other_does() -> None:
    model, graph = build("plain"), traced("plain")[1]
    with torch.no_grad():
        model.get_parameter("body.2.0.weight")[7] = 0
    values = criteria.score(graph, model, "l2").values["body.2.0"]
    assert values[7] == 0 and (np.delete(values, 7) > 0).all()
