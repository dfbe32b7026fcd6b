from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.device.arena import arena_bytes
from edgeprune.device.card import Device, Memory, device, devices
from edgeprune.device.cost import UNSEEN_WIDENING, CostModel, in_blocks, kernel_ms, predict_graph
from edgeprune.device.kernels import FLOAT_BYTES, KernelsAt, kernels
from edgeprune.errors import UsageError
from tests.device.test_kernels import tiny
from tests.networks import traced

PROFILES = [name for name in devices() if device(name).predicts and not device(name).resolved]
GRAPH, MADE = tiny(), kernels(tiny())


def one_kernel(kind: str, macs: float, elements: float = 0.0) -> KernelsAt:
    return KernelsAt(("k",), (kind,), *(np.array([[v]]) for v in (macs, elements, 0.0, 0.0, 0.0, 64.0, 0.0)))


def test_a_kernel_by_hand() -> None:
    pi = device("rpi4")
    rate = pi.constants.kernels["conv3x3"]
    got = CostModel(pi).latency_ms(one_kernel("conv3x3", 1e9, 1e6))
    moved = FLOAT_BYTES * 1e6
    far = (moved - pi.constants.cache_bytes) * rate.far_byte_ns
    expected = (1e9 * rate.mac_ns + moved * rate.byte_ns + far + 1e3 * rate.call_us) / 1e6
    assert got.shape == (1, 1)
    assert got[0, 0] == pytest.approx(expected)


def test_part_of_a_block_of_channels_takes_as_long_as_all_of_it() -> None:
    profile = device("rpi4").constants.model_copy(update={"input_block": 16, "output_block": 16})

    def macs(kind: str, read: int, made: int, **blocks: int) -> float:
        positions, taps = 100.0, {"conv1x1": 1, "conv3x3": 9}.get(kind, 25)
        at = replace(one_kernel(kind, read * made * taps * positions), channels=np.array([[made]]))
        at = replace(at, output_elements=np.array([[made * positions]]))
        return float(in_blocks(profile.model_copy(update=blocks), at).macs[0, 0]) / (taps * positions)

    assert [macs("conv3x3", 16, made) for made in (1, 15, 16, 17, 32)] == pytest.approx([256, 256, 256, 512, 512])
    assert [macs("conv1x1", read, 16) for read in (3, 8, 9, 16, 17, 32)] == pytest.approx([128, 128, 256, 256, 512, 512])
    assert [macs("conv3x3", read, 8, input_block=1) for read in (8, 24)] == pytest.approx([128, 384])
    assert [macs("conv_other", 24, 24), macs("linear", 24, 24)] == pytest.approx([24 * 32, 24 * 24])
    assert macs("conv3x3", 24, 24, input_block=1, output_block=1) == 576
    assert CostModel(device("rpi4")).latency_ms(one_kernel("conv3x3", 1e9)) == kernel_ms(profile, one_kernel("conv3x3", 1e9))


@pytest.mark.parametrize("profile", PROFILES)
@settings(deadline=None, derandomize=True)
@given(widths=st.tuples(st.integers(1, 8), st.integers(1, 4)), more=st.tuples(st.integers(0, 7), st.integers(0, 3)))
def test_cost_rises_with_every_width(profile: str, widths: tuple[int, int], more: tuple[int, int]) -> None:
    wider = np.minimum(np.array(widths) + more, GRAPH.dense_widths)
    plans = np.array([widths, wider])
    at = MADE.at(plans)
    model = CostModel(device(profile))
    low, high = model.interval_ms(at)
    total = model.total_ms(at)
    assert (low <= total).all() and (total <= high).all()
    memory = model.device.constants.memory
    stepped = memory is not None and memory.arena  # see arena.py: fewer channels can take more
    figures = [total, high, model.latency_ms(at), MADE.size_bytes(plans)]
    for figure in figures if stepped else [*figures, model.peak_memory_bytes(MADE, plans)]:
        assert np.all(figure[0] <= figure[1] * (1 + 1e-12))


def test_a_batch_gives_what_single_plans_give() -> None:
    plans = np.array([[8, 4], [3, 2], [1, 1]])
    model = CostModel(device("rpi4"))
    together = model.total_ms(MADE.at(plans))
    assert together.tolist() == pytest.approx([float(model.total_ms(MADE.at(p))[0]) for p in plans])


def test_like_the_fitted_networks_the_interval_is_the_fit_s_own() -> None:
    model, fit = CostModel(device("rpi4")), device("rpi4").constants.fit
    rates = [device("rpi4").constants.kernels[kind] for kind in ("conv1x1", "conv3x3", "conv_other")]
    seen = sum(rate.seen_share for rate in rates)
    assert seen > 1  # no network has the most of every kind at once, so this mix has less of each
    macs = [[rate.seen_share / seen * 4e8 / rate.mac_ns for rate in rates]]
    columns = [macs, *np.zeros((4, 1, 3)), np.full((1, 3), 64.0), np.zeros((1, 3))]
    mix = KernelsAt(("a", "b", "c"), ("conv1x1", "conv3x3", "conv_other"), *map(np.array, columns))
    low, high = model.interval_ms(mix)
    assert high[0] / model.total_ms(mix)[0] == pytest.approx(fit.high_factor)
    assert low[0] / model.total_ms(mix)[0] == pytest.approx(fit.low_factor)
    assert model.notes(mix) == ()


def test_unlike_them_it_is_wider_and_says_why() -> None:
    model, fit = CostModel(device("rpi4")), device("rpi4").constants.fit
    depthwise = one_kernel("depthwise", 1e8)
    ratio = model.interval_ms(depthwise)[1][0] / model.total_ms(depthwise)[0]
    assert ratio == pytest.approx(fit.high_factor * (1 + UNSEEN_WIDENING), rel=0.01)
    assert "depthwise take 100% of the time and no network of the fit had any: constants from another board" in model.notes(depthwise)[0]
    pointwise = one_kernel("conv1x1", 3e9)
    seen = device("rpi4").constants.kernels["conv1x1"].seen_share
    ratio = model.interval_ms(pointwise)[1][0] / model.total_ms(pointwise)[0]
    assert ratio == pytest.approx(fit.high_factor * (1 + UNSEEN_WIDENING * (1 - seen)), rel=0.01)
    assert "another board" not in model.notes(pointwise)[0]
    small = one_kernel("conv3x3", 1e6)
    assert model.interval_ms(small)[1][0] > model.total_ms(small)[0] * fit.high_factor * 1.5
    assert any("outside" in note for note in model.notes(small))


def test_layers_wider_and_maps_larger_than_any_in_the_fit_widen_it() -> None:
    model, fit = CostModel(device("rpi4")), device("rpi4").constants.fit
    usual = one_kernel("conv3x3", 3e9)
    wide = replace(usual, channels=np.array([[4 * fit.channels[1]]]))
    assert _ratio(model, wide, usual) > 1.15
    assert any("layers wider than" in note for note in model.notes(wide))
    large = replace(usual, output_elements=np.array([[fit.activation_bytes[1]]]))
    assert any("feature maps larger than" in note for note in model.notes(large))


def _ratio(model: CostModel, one: KernelsAt, other: KernelsAt) -> float:
    """How much wider the interval of `one` is, as a share of its prediction."""
    widths = [float(model.interval_ms(at)[1][0] / model.total_ms(at)[0]) for at in (one, other)]
    return widths[0] / widths[1]


def test_memory_is_what_the_runtime_makes_of_weights_activations_and_pointers() -> None:
    pi, plans = device("rpi4-litert"), np.array([[8, 4], [4, 2]])
    facts = {"base_bytes": 1e6, "kernel_bytes": 1e3, "weights": 2.0, "activations": 1.5, "pointers": 1.0, "copied": ("conv1x1",)}
    knows = _with_memory(pi, Memory.model_validate({**facts, "networks": 10, "mape": 2.0, "worst": 6.0, "source": "made up"}))
    expected = 1e6 + 4 * 1e3 + 2.0 * MADE.weight_bytes(plans) + 1.5 * MADE.live_bytes(plans, ["conv1x1"]) + MADE.pointer_bytes
    assert CostModel(knows).peak_memory_bytes(MADE, plans).tolist() == expected.tolist()
    arena = Memory.model_validate({**facts, "arena": True, "networks": 10, "mape": 2.0, "worst": 6.0, "source": "made up"})
    stepped = expected + 1.5 * (arena_bytes(MADE, plans, ["conv1x1"]) - MADE.live_bytes(plans, ["conv1x1"]))
    assert CostModel(_with_memory(pi, arena)).peak_memory_bytes(MADE, plans).tolist() == pytest.approx(stepped.tolist())
    cost = predict_graph(GRAPH, None, knows)
    assert cost.peak_memory_bytes == int(expected[0])
    assert any("2 % off on average, 6 % at worst, on 10 networks" in note for note in cost.notes)
    bare = predict_graph(GRAPH, None, _with_memory(pi, None))
    assert bare.peak_memory_bytes == MADE.peak_memory_bytes(plans)[0]
    assert any("not known for this profile" in note for note in bare.notes)


def _with_memory(found: Device, memory: Memory | None) -> Device:
    profiles = {**found.card.profiles, found.profile: found.constants.model_copy(update={"memory": memory})}
    return replace(found, card=found.card.model_copy(update={"profiles": profiles}))


def test_many_plans_at_once_are_as_each_alone() -> None:
    plans = np.random.default_rng(0).integers(1, 5, size=(3000, 2))
    model = CostModel(device("rpi4"))
    together = model.of_widths_ms(MADE, plans)
    assert together.shape == (3000,)
    np.testing.assert_allclose(together[[0, 1500, 2999]], [model.total_ms(MADE.at(plans[i]))[0] for i in (0, 1500, 2999)])
    assert model.of_widths_ms(MADE, plans[0]).shape == (1,)


def test_a_correction_scales_everything_but_not_the_range() -> None:
    at = MADE.at(GRAPH.dense_widths)
    plain, doubled = CostModel(device("rpi4")), CostModel(device("rpi4"), 2.0)
    assert doubled.total_ms(at)[0] == pytest.approx(2 * plain.total_ms(at)[0])
    assert doubled.interval_ms(at)[1][0] == pytest.approx(2 * plain.interval_ms(at)[1][0])
    with pytest.raises(UsageError, match="positive"):
        CostModel(device("rpi4"), 0.0)


def test_latency_and_memory_do_not_rise_when_the_last_channel_of_a_branch_goes() -> None:
    for name in ("residual", "bottleneck", "mobile"):
        graph = traced(name)[1]
        one, none = (np.array([least if g.name in graph.branches else g.channels for g in graph.groups]) for least in (1, 0))
        for profile in PROFILES:
            with_one, without = (predict_graph(graph, widths, device(profile)) for widths in (one, none))
            assert without.latency_ms.value < with_one.latency_ms.value
            assert (without.size_bytes, without.macs) < (with_one.size_bytes, with_one.macs)
            assert without.peak_memory_bytes <= with_one.peak_memory_bytes
            gone = [layer for layer in without.per_layer if layer.latency_ms == 0]
            assert sum(layer.share for layer in without.per_layer) <= 1 + 1e-9 and len(gone) >= 2 * len(graph.branches)


def test_predict_graph_tells_everything() -> None:
    cost = predict_graph(GRAPH, None, device("rpi4"))
    assert (cost.macs, cost.params) == (GRAPH.macs, GRAPH.params)
    assert [layer.name for layer in cost.per_layer] == ["a", "b", "silu", "fc"]
    kernels_ms = sum(layer.latency_ms for layer in cost.per_layer)
    assert kernels_ms + CostModel(device("rpi4")).network_ms == pytest.approx(cost.latency_ms.value)
    assert cost.basis.startswith("predicted, not measured: profile rpi4-ort")
    assert cost.energy_mj is not None and cost.energy_mj.low < cost.energy_mj.value < cost.energy_mj.high
    assert any("not validated" in note for note in cost.notes)
    assert cost.total_energy_mj is not None and cost.total_energy_mj.value > cost.energy_mj.value
    validated = predict_graph(GRAPH, None, device("rpi5-litert"))
    assert any("was validated against" in note for note in validated.notes)
    first = cost.per_layer[0]
    assert first.bytes_moved == 4 * (300 + 800 + 224)
    assert {layer.bound for layer in cost.per_layer} <= {"compute", "memory", "call overhead"}
    assert cost.per_layer[-1].bound != "compute"
    assert predict_graph(GRAPH, None, device("host")).energy_mj is None
    assert predict_graph(GRAPH, np.array([4, 2]), device("rpi4")).latency_ms.value < cost.latency_ms.value
    with pytest.raises(UsageError, match="one plan"):
        predict_graph(GRAPH, np.array([[4, 2], [1, 1]]), device("rpi4"))
