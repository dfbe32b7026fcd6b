"""Norms and reductions: where they compute over the set of channels, the dense twin computes over the kept ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import SlimError
from edgeprune.graph.slim import mask, prove, slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.graph.test_rules import Between, Operation, channels_left
from tests.networks import outputs


def slid_over(means: Tensor) -> Tensor:
    """Efficient channel attention: one kernel along the channels."""
    return F.conv1d(means[:, None], torch.tensor([[[1.0, -2.0, 0.5]]], dtype=means.dtype), padding=1)[:, 0]


# What computes over the set of channels: the dense twin computes it over the kept ones. With the channels that stay free of 8.
OVER_KEPT: dict[str, tuple[Operation, int]] = {
    "mean over channels": (lambda h: h * h.mean(1, keepdim=True), 8),
    "sum of everything": (lambda h: h * h.sum(), 8),
    "largest channel": (lambda h: h * torch.sigmoid(torch.cat([h.amax(1, keepdim=True), h.mean(1, keepdim=True)], 1)[:, :1]), 8),
    "unit length": (lambda h: F.normalize(h, dim=1), 8),
    "root mean square": (lambda h: h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-6), 8),
    "layer norm over channels and space": (lambda h: F.layer_norm(h, h.shape[1:]), 8),
    "layer norm over the last axis": (lambda h: F.layer_norm(h.permute(0, 2, 3, 1), h.shape[1:2]).permute(0, 3, 1, 2), 8),
    "RMS norm": (lambda h: F.rms_norm(h.permute(0, 2, 3, 1), h.shape[1:2]).permute(0, 3, 1, 2), 8),
    "hand-written layer norm": (lambda h: (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True) + 1e-5).sqrt(), 8),
    "group norm of two groups": (lambda h: F.group_norm(h, 2), 4),
    "group norm of one group": (lambda h: F.group_norm(h, 1), 8),
    "instance norm": (F.instance_norm, 8),
    "a convolution along the channels": (lambda h: h * torch.sigmoid(slid_over(h.mean((2, 3))))[:, :, None, None], 8),
    "global response norm": (lambda h: h * (h.norm(dim=(2, 3), keepdim=True) / h.norm(dim=(2, 3), keepdim=True).mean(1, keepdim=True)), 8),
}


@pytest.mark.parametrize("name", OVER_KEPT)
def test_what_computes_over_the_set_of_channels_does_so_over_the_kept_ones(name: str) -> None:
    operation, expected = OVER_KEPT[name]
    assert channels_left(operation) == expected


class Standardised(nn.Conv2d):
    """Weights of mean 0 and variance 1 over the inputs, by batch norm as libraries do it, or by hand."""

    by_hand = False

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand:
            centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            weight = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        else:
            weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True).reshape_as(self.weight)
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


class ByHand(Standardised):
    by_hand = True


def weight_norm(i: int, o: int, k: int) -> nn.Module:
    layer: nn.Module = nn.utils.parametrizations.weight_norm(nn.Conv2d(i, o, k))
    return layer


@pytest.mark.parametrize("kind", [Standardised, ByHand, weight_norm])
def test_standardised_weights_are_standardised_over_the_kept_inputs(kind: type[nn.Conv2d]) -> None:
    model = nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).double().eval()
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = trace(model, x)
    assert [g.channels for g in graph.groups] == [8, 6]
    plan = Plan.uniform(graph, keep=0.5)
    small = slim(model, graph, plan)
    assert prove(model, graph, plan, small, x).max_relative_error < 1e-10
    wrong = slim(model, graph, Plan({name: tuple(c + 1 for c in keep) for name, keep in plan.keep.items()}))
    with pytest.raises(SlimError, match="differ by"):
        prove(model, graph, plan, wrong, x)


def test_norms_are_computed_from_scratch_over_the_kept_channels() -> None:
    """An independent count: the group norm of the kept channels alone."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1, groups=8), nn.Flatten(), nn.Linear(8, 8)).double()
    x = torch.randn(1, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    graph = trace(model, x)
    keep = (0, 2)
    kept = [0, 2, 4, 6]  # the same places in both norm groups
    twin = mask(model, graph, Plan({graph.groups[0].name: keep}))
    made = model[0](x)[0, :, 0, 0][kept].view(2, 2)
    expected = (made - made.mean(1, keepdim=True)) / (made.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    seen: list[Tensor] = []
    twin.get_submodule("1").register_forward_hook(lambda _m, _i, out: seen.append(out))
    outputs(twin, (x,))
    assert torch.allclose(seen[0][0, kept, 0, 0], expected.flatten(), rtol=1e-12, atol=0)
    assert not seen[0][0, [1, 3, 5, 7]].any()


def test_a_wrong_choice_of_channels_is_caught_behind_a_norm() -> None:
    """The negative control: the same widths, other channels."""
    model = Between(lambda h: F.layer_norm(h, h.shape[1:]), 8).double().eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    graph = trace(model, x)
    plan, other = Plan({"make": (0, 1, 2)}), Plan({"make": (1, 2, 3)})
    assert prove(model, graph, plan, slim(model, graph, plan), x).kept_only == 1
    with pytest.raises(SlimError, match="differ by"):
        prove(model, graph, plan, slim(model, graph, other), x)
