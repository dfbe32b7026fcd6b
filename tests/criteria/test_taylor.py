from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import criteria
from edgeprune.errors import DataError, UsageError
from tests.networks import build, images, traced


def labelled(name: str, n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    return images(name, n, seed)[0], torch.arange(n) % 5


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model.eval()(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def scored(model: nn.Module, name: str, data: Any, **options: Any) -> Any:
    return criteria.score(traced(name)[1], model, "taylor", data=data, **options).values


def test_scores_are_the_mean_square_of_weight_times_gradient() -> None:
    model = build("residual")
    data = [labelled("residual", 6, 1), labelled("residual", 2, 2)]
    stream = traced("residual")[1].groups[0]
    expected, absolute = np.zeros(stream.channels), np.zeros(stream.channels)
    for x, y in data:
        found = gradients(model, x, y)
        for member in stream.members[: stream.producing]:
            change = (model.get_parameter(member.parameter) * found[member.parameter]).sum((1, 2, 3)).detach().numpy()
            expected += len(x) / 8 / stream.producing * change**2
            absolute += len(x) / 8 / stream.producing * np.abs(change)
    model.zero_grad()
    np.testing.assert_allclose(scored(model, "residual", data)[stream.name], expected, rtol=1e-9)
    np.testing.assert_allclose(scored(model, "residual", data, squared=False)[stream.name], absolute, rtol=1e-9)


def test_it_predicts_what_the_loss_does_when_a_channel_fades() -> None:
    model = build("plain")
    x, y = labelled("plain", 8)
    change = np.sqrt(scored(model, "plain", [(x, y)])["body.2.0"])
    step = 1e-5
    for channel in range(12):
        faded = build("plain")
        with torch.no_grad():
            faded.get_parameter("body.2.0.weight")[channel] *= 1 - step
            moved = float(F.cross_entropy(faded(x), y) - F.cross_entropy(model(x), y)) / step
        assert abs(moved) == pytest.approx(change[channel], rel=1e-2, abs=1e-5)


def test_on_norms_it_is_the_derivative_by_a_gate_behind_the_norm() -> None:
    model = build("plain")
    x, y = labelled("plain", 8)
    gate = torch.ones(12, dtype=torch.float64, requires_grad=True)
    hook = model.get_submodule("body.2.1").register_forward_hook(lambda _m, _i, out: out * gate[:, None, None])
    (by_gate,) = torch.autograd.grad(F.cross_entropy(model(x), y), [gate])
    hook.remove()
    np.testing.assert_allclose(scored(model, "plain", [(x, y)], on="norms")["body.2.0"], by_gate.square().numpy(), rtol=1e-9)


def test_groups_without_norms_keep_their_weights() -> None:
    model, data = build("literal_flatten"), [labelled("literal_flatten", 4)]
    by_norms, by_weights = (scored(model, "literal_flatten", data, on=on) for on in ("norms", "weights"))
    assert all((by_norms[name] == by_weights[name]).all() for name in by_norms)


def test_a_channel_of_zeros_changes_nothing() -> None:
    model, data = build("plain"), [labelled("plain", 4)]
    with torch.no_grad():
        model.get_parameter("body.2.0.weight")[7] = 0
    values = scored(model, "plain", data)["body.2.0"]
    assert values[7] == 0 and (values >= 0).all() and values.max() > 0


def test_what_has_no_gradient_is_said() -> None:
    model, data = build("plain"), [labelled("plain", 4)]
    with pytest.raises(DataError, match="labels"):
        scored(model, "plain", [data[0][0]])
    with pytest.raises(UsageError, match="on must be weights or norms"):
        scored(model, "plain", data, on="biases")
    model.get_parameter("body.3.0.weight").requires_grad_(False)
    with pytest.raises(UsageError, match=r"body\.3\.0\.weight has requires_grad off"):
        scored(model, "plain", data)
