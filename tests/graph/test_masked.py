from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import DataError
from edgeprune.graph.masked import Masked, Prefix, mean_loss, summed_loss
from edgeprune.graph.running import tensors_in
from edgeprune.graph.slim import mask, slim
from edgeprune.graph.trace import trace
from tests.networks import NETWORKS, gap, images, outputs, random_plan, traced


@pytest.mark.parametrize("name", NETWORKS)
def test_switching_channels_is_the_masked_twin_in_any_order_of_masks(name: str) -> None:
    model, graph = traced(name)
    masked = Masked(model, graph)
    x = images(name, 3)
    for seed in (0, 1, 2):
        plan = random_plan(graph, seed)
        switched = masked.set(masked.keep_of(plan))
        for a, b in zip(outputs(switched, x), outputs(mask(model, graph, plan), x), strict=True):
            assert torch.equal(a, b)
    back = masked.set(np.ones(masked.channels, dtype=np.bool_))
    state = model.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in back.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_surgery_computes(name: str) -> None:
    model, graph = traced(name)
    if name == "literal_flatten":  # its code holds the number of channels: it cannot be slimmed as a module
        return
    plan = random_plan(graph, 3)
    masked = Masked(model, graph)
    assert gap(masked.set(masked.keep_of(plan)), slim(model, graph, plan), images(name, 3), images(name, 3, seed=9)) < 1e-9


def test_the_loss_is_that_of_surgery() -> None:
    model, graph = traced("residual")
    masked, plan = Masked(model, graph, memory_format=torch.channels_last), random_plan(graph, 1)
    batches = [(images("residual", 4, seed=s), torch.arange(4)) for s in (1, 2)]
    by_hand = np.mean([float(F.cross_entropy(outputs(slim(model, graph, plan), x)[0], y)) for x, y in batches])
    assert mean_loss(masked.set(masked.keep_of(plan)), batches) == pytest.approx(by_hand, abs=1e-5)
    assert abs(mean_loss(masked.reset(), batches) - by_hand) > 1e-3


def test_the_model_is_untouched_and_a_recalibrated_copy_can_be_reset() -> None:
    model, graph = traced("residual")
    before = {k: t.clone() for k, t in model.state_dict().items()}
    masked = Masked(model, graph)
    masked.set(masked.keep_of(random_plan(graph)))
    masked.model.train()
    masked.model(*images("residual", 8))
    masked.reset()
    assert all(torch.equal(t, before[k]) for k, t in masked.model.state_dict().items())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_a_whole_group_may_be_off_and_other_lengths_are_refused() -> None:
    model, graph = traced("plain")
    masked = Masked(model, graph)
    off = masked.set(np.zeros(masked.channels, dtype=np.bool_))
    (logits,) = outputs(off, images("plain", 2))
    assert torch.allclose(logits, model.fc.bias.detach().expand(2, -1))  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match="a keep vector of this network has 26 values"):
        masked.set(np.ones(3, dtype=np.bool_))


class InPlace(nn.Module):
    """Writes into its maps before and behind the second conv, and reads a view of what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.a(x))  # in place, in the beginning
        short = x[:, :, ::2]
        y = torch.relu_(self.b(x))
        y += x  # in place, behind it
        out: Tensor = (self.c(y)[:, :, ::2] + short.mean(1, keepdim=True)).mean((2, 3))
        return out


@pytest.mark.parametrize("name", NETWORKS)
def test_a_kept_beginning_changes_nothing(name: str) -> None:
    model, graph = traced(name)
    masked, x = Masked(model, graph), images(name, 3)
    for group in graph.groups:
        prefix = Prefix(masked.model, x, masked.tensors([group.name]))
        for seed in (0, 1):
            keep = np.ones(masked.channels, dtype=np.bool_)
            keep[masked.columns[group.name]] = np.random.default_rng(seed).random(group.channels) < 0.5
            whole = outputs(masked.set(keep), x)
            for a, b in zip(tensors_in(prefix.run()), whole, strict=True):
                assert torch.equal(a, b)
        masked.reset()


def test_the_beginning_is_not_computed_again() -> None:
    model, graph = traced("plain")
    masked, x = Masked(model, graph), images("plain", 3)
    last = graph.groups[-1].name
    prefix = Prefix(masked.model, x, masked.tensors([last]))
    assert 0 < prefix.kept_bytes <= 3 * 12 * 4 * 4 * 8
    before = prefix.run()
    with torch.no_grad():
        next(masked.model.parameters()).fill_(float("nan"))  # the first conv
    assert torch.equal(prefix.run(), before)


def test_writing_in_place_is_allowed_on_both_sides() -> None:
    model = InPlace()
    graph = trace(model, torch.randn(1, 3, 8, 8))
    masked, x = Masked(model, graph), torch.randn(4, 3, 8, 8)
    given = x.clone()
    prefix = Prefix(masked.model, (x,), tuple(masked.model.b.parameters()))  # type: ignore[union-attr]
    whole = outputs(masked.model, (x.clone(),))[0]
    for _ in range(3):  # what is kept has its own memory layout, so rounding may differ
        assert torch.allclose(prefix.run(), whole, rtol=1e-5)
    assert torch.equal(x, given)


def test_code_that_depends_on_the_batch_keeps_nothing() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = [self.a(row) for row in x]
            out: Tensor = self.b(torch.stack(rows))
            return out

    model, x = Loop(), torch.randn(5, 4)
    prefix = Prefix(model, (x,), (model.b.weight,))
    assert prefix.kept_bytes == 0
    with torch.no_grad():
        assert torch.equal(prefix.run(), model(x))


@pytest.mark.parametrize("bad", [torch.zeros(3, 2, 4, 4), torch.zeros(2, 5), torch.zeros(3, 2), None])
def test_outputs_that_are_no_logits_are_refused(bad: Any) -> None:
    with pytest.raises(DataError, match="classifier"):
        summed_loss(bad, torch.tensor([0, 1, 4]))
