from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import criteria
from edgeprune.criteria import reconstruction
from edgeprune.errors import DataError, UsageError
from edgeprune.graph.trace import trace
from edgeprune.plan import Scores
from tests.networks import build, images, traced

EVERYWHERE = 10_000
EXACT = {"ridge": 1e-9, "shrink": False, "positions": EVERYWHERE, "measure": "layer"}
Floats = NDArray[np.float64]


def scored(model: nn.Module, x: Tensor, **options: Any) -> Scores:
    return criteria.score(trace(model, x[:1]), model, "reconstruction", data=[x], **{**EXACT, **options})


def inputs_of(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    return seen[0]


def lost(rows: Floats, weight: Floats, gone: list[int], *, centred: bool = True) -> float:
    """Share of the output's energy that a refit without some columns leaves unexplained, by numpy's least squares."""
    if centred:
        rows = rows - rows.mean(axis=0)
    y = rows @ weight.T
    rest = np.delete(rows, gone, axis=1)
    refit = np.linalg.lstsq(rest, y, rcond=None)[0] if rest.shape[1] else np.zeros((0, y.shape[1]))
    return float(((y - rest @ refit) ** 2).sum() / (y**2).sum())


def conv_rows(model: nn.Module, layer: str, x: Tensor) -> tuple[Floats, Floats]:
    conv: Any = model.get_submodule(layer)
    patches = F.unfold(inputs_of(model, layer, x), conv.kernel_size, padding=conv.padding, stride=conv.stride)
    return patches.movedim(1, 2).flatten(0, 1).numpy(), conv.weight.detach().flatten(1).numpy()


def test_correlations_are_drawn_to_none_where_few_rows_make_them_up() -> None:
    """Of independent and of mixed columns: what is shrunk is nearer to the truth; the more rows, the less is shrunk."""
    generator = torch.Generator().manual_seed(0)
    for mixed in (torch.eye(40, dtype=torch.float64), torch.randn(40, 40, generator=generator, dtype=torch.float64)):
        true = _correlation(mixed @ mixed.T)
        drawn = []
        for rows in (20, 80, 2000):
            found = _correlation(torch.cov((torch.randn(rows, 40, generator=generator, dtype=torch.float64) @ mixed.T).T))
            drawn.append(reconstruction.shrinkage(found[None], rows))
            shrunk = (1 - drawn[-1]) * found + drawn[-1] * torch.eye(40)
            assert (shrunk - true).norm() < (found - true).norm()
    assert 1 >= drawn[0] > drawn[1] > drawn[2] > 0


def _correlation(second: Tensor) -> Tensor:
    spread = second.diagonal().sqrt()
    return second / spread[:, None] / spread


def test_few_images_do_not_make_wide_layers_look_redundant() -> None:
    """With fewer images than channels, all of which matter alike, unshrunk scores call most of them worthless."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(24, 64)
    drawn, plain = (
        np.sort(criteria.score(trace(model, x[:1]), model, "reconstruction", data=[x], shrink=shrink, ridge=1e-3).values["0"])
        for shrink in (True, False)
    )
    assert plain[32] < 0.05 * plain[-1]
    assert drawn[32] > 0.1 * drawn[-1]


def test_alone_a_channel_scores_what_least_squares_without_it_leave() -> None:
    model, x = build("plain"), images("plain", 24)[0]
    rows, weight = conv_rows(model, "body.3.0", x)
    expected = [lost(rows, weight, list(range(9 * c, 9 * c + 9))) for c in range(12)]
    found = scored(model, x, order="single")
    np.testing.assert_allclose(found.values["body.2.0"], expected, rtol=1e-4)
    assert found.facts == {"images": 24, "tap_by_tap": [], "left_out": [], "unread": []}
    feature = inputs_of(model, "fc", x).numpy()
    fc = model.get_parameter("fc.weight").detach().numpy()
    np.testing.assert_allclose(found.values["body.3.0"], [lost(feature, fc, [c]) for c in range(6)], rtol=1e-4)


def test_greedy_scores_add_up_to_what_is_lost_by_all_that_went_before() -> None:
    model, x = build("plain"), images("plain", 24)[0]
    rows, weight = conv_rows(model, "body.3.0", x)
    values = scored(model, x).values["body.2.0"]
    order = np.argsort(values)
    cumulative = [lost(rows, weight, [9 * c + t for c in order[: n + 1] for t in range(9)]) for n in range(12)]
    steps = np.diff([0.0, *cumulative])
    assert (np.diff(steps) > 0).all(), "the example is one where every loss is larger than the one before"
    np.testing.assert_allclose(values[order], steps, rtol=1e-3)
    assert values.sum() == pytest.approx(1, rel=1e-3)
    for n in range(11):  # no other channel would have been cheaper at that step
        gone = [9 * c + t for c in order[:n] for t in range(9)]
        others = [lost(rows, weight, gone + list(range(9 * c, 9 * c + 9))) for c in order[n:]]
        assert min(others) == pytest.approx(cumulative[n], rel=1e-6)


class Two(nn.Module):
    """conv -> ReLU -> conv."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.a(x)))
        return out


def two() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Two().double()


def test_of_two_equal_channels_one_goes_for_nothing_and_the_other_then_counts() -> None:
    model, x = two(), images("plain", 20)[0]
    with torch.no_grad():
        for name in ("a.weight", "a.bias"):
            model.get_parameter(name)[4] = model.get_parameter(name)[1]
    alone, greedy = (scored(model, x, order=order, ridge=1e-6).values["a"] for order in ("single", "greedy"))
    assert max(alone[1], alone[4]) < 1e-4 < np.delete(alone, [1, 4]).min()
    assert min(greedy[1], greedy[4]) < 1e-4 and max(greedy[1], greedy[4]) > 0.01


def linears(rows: list[list[float]], weight: list[list[float]]) -> nn.Module:
    """Two linears without bias; the first computes `rows` of its input, the second reads them."""
    model = nn.Sequential(nn.Linear(len(rows[0]), len(rows), bias=False), nn.Linear(len(rows), len(weight), bias=False)).double()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor(rows))
        model.get_parameter("1.weight").copy_(torch.tensor(weight))
    return model


def test_a_layer_that_cannot_add_a_constant_loses_the_mean_too() -> None:
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.tensor([0.0, 3.0])
    model = linears([[1, 0], [0, 1]], [[1.0, 1.0], [1.0, -2.0]])
    weight = model.get_parameter("1.weight").detach().numpy()
    expected = [lost(x.numpy(), weight, [c], centred=False) for c in range(2)]
    np.testing.assert_allclose(scored(model, x, order="single").values["0"], expected, rtol=1e-6)


def test_a_channel_that_went_later_never_scores_less() -> None:
    """The output is the small difference of two channels: once one is gone, the other is worth less than that one was."""
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = linears([[9.0, 1.0], [9.0, 0.0]], [[1.0, -1.0]])
    alone, greedy = (scored(model, x, order=order).values["0"] for order in ("single", "greedy"))
    assert alone[1] < alone[0] and greedy[1] == pytest.approx(alone[1]) and 1 - alone[1] < alone[1]
    assert greedy[1] < greedy[0] < greedy[1] * 1.001


def test_wide_groups_lose_several_channels_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("plain"), images("plain", 24)[0]
    rows, weight = conv_rows(model, "body.3.0", x)
    monkeypatch.setattr(reconstruction, "STEPS", 4)
    values = scored(model, x).values["body.2.0"]
    order = np.argsort(values)
    for start in range(0, 12, 3):  # three go at a time, each scored by what it alone would take with it
        before = [9 * c + t for c in order[:start] for t in range(9)]
        base = lost(rows, weight, before) if before else 0.0
        alone = [lost(rows, weight, before + list(range(9 * c, 9 * c + 9))) - base for c in order[start : start + 3]]
        np.testing.assert_allclose(values[order[start : start + 3]], alone, rtol=1e-3)


@pytest.mark.parametrize("order", ["single", "greedy"])
def test_a_dead_or_constant_channel_is_the_least(order: str) -> None:
    model, x = two(), images("plain", 20)[0]
    with torch.no_grad():
        model.get_parameter("a.weight")[2] = 0
        for bias in (-1, 3):  # behind the ReLU: zero, or the same everywhere
            model.get_parameter("a.bias")[2] = bias
            values = scored(model, x, order=order, ridge=1e-3).values["a"]
            assert values[2] == 0 and (np.delete(values, 2) > 0).all()


def test_a_rescaling_that_the_network_does_not_notice_changes_nothing() -> None:
    model, x = two(), images("plain", 20)[0]
    before = scored(model, x, ridge=0.1).values["a"]
    with torch.no_grad():
        for name in ("a.weight", "a.bias"):
            model.get_parameter(name)[3] *= 100
        model.get_parameter("b.weight")[:, 3] /= 100
    np.testing.assert_allclose(scored(model, x, ridge=0.1).values["a"], before, rtol=1e-6)


def test_every_layer_that_reads_a_stream_adds_its_share() -> None:
    model, x = build("residual"), images("residual", 24)[0]
    expected = np.zeros(8)
    for layer in ("body.1.a.0", "body.2.a.0"):
        rows, weight = conv_rows(model, layer, x)
        expected += [lost(rows, weight, list(range(9 * c, 9 * c + 9))) for c in range(8)]
    feature, fc = inputs_of(model, "fc", x).numpy(), model.get_parameter("fc.weight").detach().numpy()
    expected += [lost(feature, fc, [c]) for c in range(8)]
    np.testing.assert_allclose(scored(model, x, order="single").values["body.0.0"], expected, rtol=1e-4)


def test_a_depthwise_conv_is_passed_through() -> None:
    model, x = build("mobile"), images("mobile", 12)[0]
    rows, weight = conv_rows(model, "body.1.c.0", x)
    expected = [lost(rows, weight, [c]) for c in range(16)]
    np.testing.assert_allclose(scored(model, x, order="single").values["body.1.a.0"], expected, rtol=1e-4)


def test_a_channel_of_a_grouped_conv_is_lost_in_every_conv_group() -> None:
    model, x = build("grouped"), images("grouped", 24)[0]
    feature = inputs_of(model, "body.1.b.0", x)
    conv: Any = model.get_submodule("body.1.b.0")
    error, energy = np.zeros(4), 0.0
    for part, weight in zip(feature.chunk(3, 1), conv.weight.detach().flatten(1).chunk(3), strict=True):
        rows = F.unfold(part, 3, padding=1, stride=2).movedim(1, 2).flatten(0, 1).numpy()
        own = float((((rows - rows.mean(0)) @ weight.numpy().T) ** 2).sum())
        error += own * np.array([lost(rows, weight.numpy(), list(range(9 * c, 9 * c + 9))) for c in range(4)])
        energy += own
    np.testing.assert_allclose(scored(model, x, order="single").values["body.1.a.0"], error / energy, rtol=1e-4)


def test_a_transposed_conv_reads_one_pixel_for_every_tap() -> None:
    model, x = build("transposed"), images("transposed", 24)[0]
    feature = inputs_of(model, "up", x)
    rows = feature.movedim(1, 3).flatten(0, 2).numpy()
    with torch.no_grad():
        unit = F.conv_transpose2d(torch.eye(8, dtype=torch.float64)[:, :, None, None], model.get_parameter("up.weight"), stride=2)
    expected = [lost(rows, unit.flatten(1).T.numpy(), [c]) for c in range(8)]
    np.testing.assert_allclose(scored(model, x, order="single").values["down.0"], expected, rtol=1e-4)


def test_a_large_layer_is_measured_tap_by_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "COLUMNS", 60)
    model, x = build("plain"), images("plain", 24)[0]
    found = scored(model, x, order="single")
    assert found.facts["tap_by_tap"] == ["body.2.0.weight", "body.3.0.weight"]
    feature = inputs_of(model, "body.3.0", x)
    rows = feature.movedim(1, 3).flatten(0, 2).numpy()
    by_tap = model.get_parameter("body.3.0.weight").detach().flatten(2).movedim(2, 0).reshape(-1, 12).numpy()
    np.testing.assert_allclose(found.values["body.2.0"], [lost(rows, by_tap, [c]) for c in range(12)], rtol=1e-4)
    flat, x = build("flatten"), images("flatten", 40)[0]
    found = scored(flat, x, order="single")
    assert found.facts["tap_by_tap"] == ["fc1.weight"]
    rows = inputs_of(flat, "fc1", x).reshape(40, 9, 16).movedim(1, 2).reshape(-1, 9).numpy()
    by_tap = flat.get_parameter("fc1.weight").detach().reshape(12, 9, 16).movedim(2, 0).reshape(-1, 9).numpy()
    np.testing.assert_allclose(found.values["conv2"], [lost(rows, by_tap, [c]) for c in range(9)], rtol=1e-4)


def test_memory_is_bounded_and_a_group_that_no_measured_layer_reads_has_its_share_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("plain"), images("plain", 8)[0]
    monkeypatch.setattr(reconstruction, "MEMORY_BYTES", 8 * (8**2 + 12**2 + 6**2))
    assert scored(model, x).facts["left_out"] == []
    monkeypatch.setattr(reconstruction, "MEMORY_BYTES", 8 * (8**2 + 6**2))
    found = scored(model, x)
    assert found.facts["left_out"] == ["body.3.0.weight"] and found.facts["unread"] == ["body.2.0"]
    squares = model.get_parameter("body.2.0.weight").detach().square().sum((1, 2, 3)).numpy()
    np.testing.assert_allclose(found.values["body.2.0"], squares / squares.sum())


def test_sampled_positions_give_nearly_the_same_scores_and_batches_exactly_the_same() -> None:
    model, x = build("residual"), images("residual", 200)[0]
    graph = traced("residual")[1]
    every, some = (scored(model, x, positions=p, ridge=1e-3).values for p in (EVERYWHERE, 16))
    for name in every:
        np.testing.assert_allclose(some[name], every[name], rtol=0.2)
    whole, parts = (criteria.score(graph, model, "reconstruction", data=data, positions=4).values for data in ([x], list(x.split(33))))
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-9)


def test_options_and_inputs_that_make_no_sense_are_refused() -> None:
    model, graph = traced("plain")
    x = images("plain", 2)[0]
    for options in ({"order": "random"}, {"ridge": 0.0}, {"ridge": float("nan")}, {"positions": 0}):
        with pytest.raises(UsageError, match="must be"):
            criteria.score(graph, model, "reconstruction", data=[x], **options)
    with pytest.raises(DataError, match="NaN or Inf"):
        criteria.score(graph, model, "reconstruction", data=[torch.full_like(x, float("nan"))])


def chain(scale: float) -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5), nn.Linear(5, 3)).double()
    with torch.no_grad():
        net.get_parameter("5.weight").mul_(scale)
    return net


def test_in_the_unit_of_the_outputs_scores_follow_what_comes_behind() -> None:
    x = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once, twice = (scored(chain(s), x, measure="outputs") for s in (1.0, 2.0))
    own = [scored(chain(s), x, measure="layer") for s in (1.0, 2.0)]
    assert once.additive and not own[0].additive
    for name in once.values:
        np.testing.assert_allclose(own[0].values[name], own[1].values[name], rtol=1e-9)
        np.testing.assert_allclose(4 * once.values[name], twice.values[name], rtol=1e-9)


def test_in_the_unit_of_the_outputs_a_score_is_the_mean_squared_change_of_the_outputs() -> None:
    """Behind a channel of the last group there is only a linear map: the loss after a refit is known exactly."""
    model = chain(1.0)
    x = torch.randn(4000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = scored(model, x, measure="outputs", order="single").values["2"]
    hidden = inputs_of(model, "4", x).numpy()
    hidden = hidden - hidden.mean(axis=0)
    first, last = (model.get_parameter(f"{i}.weight").detach().numpy() for i in (4, 5))
    y = hidden @ first.T
    for channel in range(7):
        rest = np.delete(hidden, channel, axis=1)
        error = y - rest @ np.linalg.lstsq(rest, y, rcond=None)[0]
        change = float(((error**2) * (last**2).sum(axis=0)).sum(axis=1).mean())  # the diagonal of J^T J, as the criterion takes it
        assert found[channel] == pytest.approx(change, rel=0.25)


def test_measures_without_differentiable_outputs_or_visible_weights() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = chain(1.0)

        def forward(self, x: Tensor) -> Any:
            return self.net(x).argmax(1)

    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inner = {f"net.{k}": v for k, v in scored(chain(1.0), x).values.items()}
    found = scored(Rounded(), x, measure="outputs")
    assert not found.additive
    for name, values in found.values.items():
        np.testing.assert_allclose(values, inner[name], rtol=1e-9)
    with pytest.raises(UsageError, match="measure must be"):
        scored(chain(1.0), x, measure="energy")
