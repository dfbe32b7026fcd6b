from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.distance import pdist, squareform
from torch import Tensor, nn

from edgeprune import criteria
from edgeprune.graph.trace import trace
from tests.networks import traced


def filters(rows: Tensor) -> nn.Module:
    """Two linears; the rows of the first are the filters."""
    model = nn.Sequential(nn.Linear(rows.shape[1], rows.shape[0]), nn.Linear(rows.shape[0], 2)).double()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(rows)
    return model


def scored(rows: Tensor) -> list[float]:
    model = filters(rows)
    graph = trace(model, torch.zeros(1, rows.shape[1], dtype=torch.float64))
    found: list[float] = criteria.score(graph, model, "fpgm").values["0"].tolist()
    return found


def test_scores_equal_pairwise_distances() -> None:
    model, graph = traced("residual")
    stream = graph.groups[0]
    state = model.state_dict()
    weights = [state[m.parameter].flatten(1).numpy() for m in stream.members[: stream.producing]]
    expected = np.mean([squareform(pdist(w)).sum(axis=1) for w in weights], axis=0)
    np.testing.assert_allclose(criteria.score(graph, model, "fpgm").values[stream.name], expected, rtol=1e-9)


def test_the_filter_in_the_middle_goes_first_whatever_its_size() -> None:
    corners = torch.tensor([[9.0, 9], [11, 9], [9, 11], [11, 11], [10, 10]], dtype=torch.float64)
    values = scored(corners)
    assert values.index(min(values)) == 4
    assert scored(corners - 10) == values  # only differences count: the filter of zeros is in the middle too
    assert scored(torch.tensor([[0.0, 0], [5, 0]], dtype=torch.float64)) == [5, 5]
