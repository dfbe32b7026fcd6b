"""What a network costs on a device it was never run on: latency with an interval, energy, memory, size. No torch here.

The model is additive with nonnegative constants per kernel kind (device cards hold them): one kernel takes the sum of its constants
times what they count (MACs, bytes, bytes beyond the cache, gathered patches, groups, calls: `terms`), a network the sum of its kernels
and a constant. MACs are those of whole blocks of channels where a runtime computes such (`in_blocks`). Nonnegative means that removing
channels never raises a prediction. nn-Meter (Zhang et al., MobiSys 2021) taught us to count fused kernels, one regressor per kind;
plain sums replace its forests because public tables are too small to feed those.
The interval is split conformal: quantiles of measured / predicted on held-out networks, wider where the network leaves what the
fit has seen, and the notes say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeprune.device.arena import arena_bytes
from edgeprune.device.card import Device, Memory, Power, Profile
from edgeprune.device.kernels import FLOAT_BYTES, Kernels, KernelsAt, kernels
from edgeprune.errors import UsageError
from edgeprune.graph.channels import ChannelGraph
from edgeprune.graph.lengths import Floats

# The constants of a Rate, in the order of `terms`.
RATES = ("mac_ns", "byte_ns", "weight_byte_ns", "patch_byte_ns", "far_byte_ns", "far_weight_byte_ns", "group_us", "call_us")
Bound = Literal["compute", "memory", "call overhead"]
_BOUNDS: dict[Bound, tuple[int, ...]] = {"compute": (0,), "memory": (1, 2, 3, 4, 5), "call overhead": (6, 7)}
# Widening of the interval, as a share of the prediction: per share of the time in kernels that the fitted networks spent less time
# in (all of it for kinds they had none of), and per doubling of the distance from the latencies, channels and sizes they had. The
# evidence is in benchmarks/results/cost_models.md (transfer).
UNSEEN_WIDENING = 0.5
RANGE_WIDENING = 0.15
# Taps of a kernel whose kind tells them, and the kinds that compute channels in blocks.
_TAPS = {"conv1x1": 1, "conv3x3": 9}
_BLOCKED = frozenset({"conv1x1", "conv3x3", "conv_other", "depthwise", "depthwise_large"})
_NOTABLE_SHARE = 0.02
_LARGEST = (("channels", "layers wider than the {:.0f} channels"), ("activation_bytes", "feature maps larger than the {:.3g} bytes"))
_PLANS_AT_ONCE = 1024


@dataclass(frozen=True)
class Estimate:
    """A predicted figure; the true one lies in [low, high] about nine times out of ten."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerCost:
    """One kernel of the network: its part of the latency in ms, and as a share (0..1) of the whole.

    `bytes_moved`: activations and weights, each once; `bound`: what takes most of its time.
    """

    name: str
    kind: str
    latency_ms: float
    macs: int
    bytes_moved: int
    share: float
    bound: Bound


@dataclass(frozen=True)
class Cost:
    """What one inference (batch 1) costs. The energies are None where the board's power is not known.

    `energy_mj` is above idle, `total_energy_mj` includes what the board draws anyway. `basis` says how the figures were obtained,
    `notes` what makes them less certain.
    """

    latency_ms: Estimate
    energy_mj: Estimate | None
    total_energy_mj: Estimate | None
    peak_memory_bytes: int
    size_bytes: int
    macs: int
    params: int
    per_layer: tuple[LayerCost, ...]
    basis: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CostModel:
    """Predicts latency on a device. `correction` multiplies every prediction: the closed loop sets it from measurements."""

    device: Device
    correction: float = 1.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.correction) and self.correction > 0):
            raise UsageError(f"the correction of a cost model must be a positive number, got {self.correction!r}.")

    @property
    def network_ms(self) -> float:
        """What every inference costs beyond its kernels, in ms."""
        return self.correction * self.device.constants.network_us / 1e3

    def latency_ms(self, at: KernelsAt) -> Floats:
        """Predicted milliseconds of every kernel, (plans, kernels); `network_ms` comes on top of their sum."""
        return self.correction * kernel_ms(self.device.constants, at)

    def total_ms(self, at: KernelsAt) -> Floats:
        """Predicted milliseconds of the whole network, (plans,)."""
        return np.asarray(self.latency_ms(at).sum(axis=1) + self.network_ms, dtype=np.float64)

    def of_widths_ms(self, made: Kernels, widths: NDArray[Any]) -> Floats:
        """Predicted milliseconds of the network under many plans: widths (plans, groups) -> (plans,), tens of thousands a second."""
        parts = np.array_split(np.atleast_2d(widths), -(-len(np.atleast_2d(widths)) // _PLANS_AT_ONCE))
        return np.concatenate([self.total_ms(made.at(part)) for part in parts])

    def interval_ms(self, at: KernelsAt) -> tuple[Floats, Floats]:
        """The 90 % interval around `total_ms`: (low, high), each (plans,). A latency budget must hold for `high`.

        `high` rises with every width, as `total_ms` does: the widening is a small part of a sum of kernel times.
        """
        total, (low, high) = self.total_ms(at), interval_factors(self.device.constants, at)
        return total * low, total * high

    def energy_mj(self, at: KernelsAt) -> Floats:
        """Upper end of the energy of one inference above idle, (plans,). Raises UsageError for a board whose power is not known."""
        power = _power(self.device)
        if power is None:
            raise UsageError(f"an energy budget cannot be predicted for {self.device.profile}: its card has no power figures.")
        return self.interval_ms(at)[1] * power.active_mw / 1e3 * (1 + power.uncertainty)

    def peak_memory_bytes(self, made: Kernels, widths: NDArray[Any]) -> Floats:
        """What an inference keeps resident beyond the imported runtime, see card.Memory: (plans, groups) -> (plans,).

        It rises with every width where the runtime plans by liveness; ONNX Runtime's arena has steps, see arena.py.
        """
        memory = self.device.constants.memory
        if memory is None:
            return made.peak_memory_bytes(widths)
        fixed = memory.base_bytes + memory.kernel_bytes * made.calls(widths) + memory.pointers * made.pointer_bytes
        activations = arena_bytes(made, widths, memory.copied) if memory.arena else made.live_bytes(widths, memory.copied)
        return np.floor(fixed + memory.weights * made.weight_bytes(widths) + memory.activations * activations)

    def notes(self, at: KernelsAt) -> tuple[str, ...]:
        """Why the interval of the first plan is wider than the fit's own, in words."""
        profile, found = self.device.constants, []
        widened = [(cause.words, float(cause.extra[0])) for cause in _widenings(profile, at)]
        unseen = sum(extra for words, extra in widened if words.startswith("kernels"))
        for words, extra in widened:
            about_kernels = words.startswith("kernels")
            if (unseen if about_kernels else extra) > _NOTABLE_SHARE * UNSEEN_WIDENING and extra > 0.2 * _NOTABLE_SHARE:
                found.append(f"{words} (profile {self.device.profile}): interval widened by {extra:.0%}.")
        return tuple(found)


class _Widening(NamedTuple):
    words: str
    extra: Floats  # (plans,)


def terms(at: KernelsAt, cache_bytes: float) -> Floats:
    """What each constant of RATES multiplies, so that the products are nanoseconds: (rates, plans, kernels)."""
    activation = FLOAT_BYTES * (at.input_elements + at.output_elements)
    weight = FLOAT_BYTES * at.weight_elements
    counted = (
        at.macs,
        activation,
        weight,
        FLOAT_BYTES * at.patch_elements,
        np.maximum(activation - cache_bytes, 0.0),
        np.maximum(weight - cache_bytes, 0.0),
        1e3 * at.groups,
        1e3 * np.broadcast_to(at.calls, at.macs.shape),
    )
    return np.stack(counted)


def in_blocks(profile: Profile, at: KernelsAt) -> KernelsAt:
    """The kernels with the MACs that are computed: a part of a block of channels takes as long as all of it.

    ONNX Runtime on x86-64 keeps feature maps in blocks of as many channels as a vector holds, so it computes whole blocks of what it
    reads and of what it makes. Less than one block it copies into the plain layout and reads as it is: with the copy, up to half a
    block costs about half (measured in ResNet-56). LiteRT fills up what it makes. Inputs are counted for the kinds whose taps are
    known, 1x1 and 3x3. The result rises with every width, like MACs themselves.
    """
    read_block, made_block = profile.input_block, profile.output_block
    if read_block == made_block == 1:
        return at
    taps = np.array([_TAPS.get(kind, 0) for kind in at.kinds])
    read = at.macs / np.maximum(at.output_elements * taps, 1.0)
    least = np.where(read <= read_block / 2 + 1e-6, max(read_block / 2, 1.0), float(read_block))
    filled = np.where(taps > 0, _filled(read, least), 1.0) * _filled(at.channels, made_block)
    return replace(at, macs=at.macs * np.where([kind in _BLOCKED for kind in at.kinds], filled, 1.0))


def _filled(channels: Floats, block: Floats | int) -> Floats:
    """How much larger whole blocks are than the channels in them."""
    return np.asarray(np.ceil(channels / block - 1e-6) * block / np.maximum(channels, 1e-9))


def kernel_ms(profile: Profile, at: KernelsAt) -> Floats:
    """Milliseconds of every kernel by a profile's constants, (plans, kernels)."""
    return np.asarray(_parts_ns(profile, at).sum(axis=0) / 1e6, dtype=np.float64)


def share_of_kinds(profile: Profile, at: KernelsAt) -> dict[str, Floats]:
    """Share of a network's time that its kernels of each kind take, (plans,) each."""
    per_kernel = kernel_ms(profile, at)
    total = per_kernel.sum(axis=1) + profile.network_us / 1e3
    kinds = np.array(at.kinds)
    return {kind: per_kernel[:, kinds == kind].sum(axis=1) / total for kind in dict.fromkeys(at.kinds)}


def range_of(several: Sequence[KernelsAt], name: str) -> tuple[float, float]:
    """(least, most) `channels` or `activation_bytes` of any kernel in the first plans of `several`."""
    values = np.concatenate([_measures(at)[name][0] for at in several])
    return float(values.min()), float(values.max())


def interval_factors(profile: Profile, at: KernelsAt) -> tuple[Floats, Floats]:
    """Factors (low, high), (plans,) each, that times the prediction give the 90 % interval."""
    extra = sum((cause.extra for cause in _widenings(profile, at)), np.zeros(len(at.macs)))
    return profile.fit.low_factor / (1 + extra), profile.fit.high_factor * (1 + extra)


def _parts_ns(profile: Profile, at: KernelsAt) -> Floats:
    """(rates, plans, kernels)."""
    rates = profile.rates
    constants = np.array([[getattr(rates[kind], rate) for kind in at.kinds] for rate in RATES])
    return np.asarray(terms(in_blocks(profile, at), profile.cache_bytes) * constants.reshape(len(RATES), 1, -1))


def _measures(at: KernelsAt) -> dict[str, Floats]:
    return {"channels": at.channels, "activation_bytes": FLOAT_BYTES * (at.input_elements + at.output_elements)}


def _widenings(profile: Profile, at: KernelsAt) -> Iterator[_Widening]:
    """Each way in which the network leaves what the fit has seen, and by how much that widens the interval."""
    per_kernel, fit = kernel_ms(profile, at), profile.fit
    total = per_kernel.sum(axis=1) + profile.network_us / 1e3
    for kind, share in share_of_kinds(profile, at).items():
        seen = profile.rates[kind].seen_share
        words = f"kernels of kind {kind} take {share[0]:.0%} of the time, more than the {seen:.0%} in any network of the fit"
        borrowed = f"kernels of kind {kind} take {share[0]:.0%} of the time and no network of the fit had any: constants from another board"
        yield _Widening(words if seen else borrowed, UNSEEN_WIDENING * np.maximum(share - seen, 0.0))
    low, high = fit.latency_ms
    beyond = np.log2(np.maximum(np.maximum(low / total, total / high), 1.0))
    yield _Widening(f"{total[0]:.2f} ms is outside the {low:.3g} to {high:.4g} ms that the fit has seen", RANGE_WIDENING * beyond)
    for name, words in _LARGEST:
        most = getattr(fit, name)[1]
        beyond = np.log2(np.maximum(_measures(at)[name] / most, 1.0))
        yield _Widening(f"{words.format(most)} that the fit has seen", RANGE_WIDENING * (per_kernel * beyond).sum(axis=1) / total)


def predict_graph(graph: ChannelGraph, widths: NDArray[Any] | None, device: Device, *, correction: float = 1.0) -> Cost:
    """The cost on `device` of the network whose groups keep `widths` channels, (groups,); None: the dense network."""
    made = kernels(graph)
    chosen = np.atleast_2d(graph.dense_widths if widths is None else widths)
    if len(chosen) != 1:
        raise UsageError(f"predict_graph takes one plan, widths of shape ({len(graph.groups)},), got {chosen.shape}.")
    model, at = CostModel(device, correction), made.at(chosen)
    per_kernel, total = model.latency_ms(at)[0], float(model.total_ms(at)[0])
    low, high = (float(bound[0]) for bound in model.interval_ms(at))
    latency = Estimate(total, low, high)
    energy, total_energy, energy_notes = _energy(device, latency)
    return Cost(
        latency_ms=latency,
        energy_mj=energy,
        total_energy_mj=total_energy,
        peak_memory_bytes=int(model.peak_memory_bytes(made, chosen)[0]),
        size_bytes=int(made.size_bytes(chosen)[0]),
        macs=int(made.macs(chosen)[0]),
        params=int(made.params(chosen)[0]),
        per_layer=tuple(_layers(device.constants, at, per_kernel, total)),
        basis=_basis(device, correction),
        notes=(*model.notes(at), *energy_notes, _memory_note(device.constants.memory)),
    )


def _basis(device: Device, correction: float) -> str:
    fit = device.constants.fit
    text = (
        f"predicted, not measured: profile {device.profile}, error on held-out networks {fit.mape:.1f} % on average, "
        f"{fit.within_10:.0f} % within ±10 % ({fit.held_out})"
    )
    return text if correction == 1 else f"{text}; multiplied by {correction:.3f}, the ratio of measured to predicted on this device"


def _memory_note(memory: Memory | None) -> str:
    if memory is None:
        return "memory is weights and live activations; what the runtime keeps besides is not known for this profile."
    return (
        f"memory is what the process has in an inference beyond the imported runtime, predicted: {memory.mape:.0f} % off on average, "
        f"{memory.worst:.0f} % at worst, on {memory.networks} networks that did not set the constants ({memory.source})."
    )


def _layers(profile: Profile, at: KernelsAt, per_kernel: Floats, total: float) -> Iterator[LayerCost]:
    parts = _parts_ns(profile, at)[:, 0, :]
    moved = FLOAT_BYTES * (at.input_elements + at.output_elements + at.weight_elements)[0]
    bounds = tuple(_BOUNDS)
    most = np.argmax([parts[list(rows)].sum(axis=0) for rows in _BOUNDS.values()], axis=0)
    for number, (name, kind) in enumerate(zip(at.names, at.kinds, strict=True)):
        ms = float(per_kernel[number])
        yield LayerCost(name, kind, ms, int(at.macs[0, number]), int(moved[number]), ms / total, bounds[most[number]])


def _power(device: Device) -> Power | None:
    return device.constants.power or device.card.power


def _energy(device: Device, latency: Estimate) -> tuple[Estimate | None, Estimate | None, tuple[str, ...]]:
    """(above idle, with idle, what to know about them)."""
    power = _power(device)
    if power is None:
        return None, None, ()

    spread = power.uncertainty

    def times(milliwatts: float) -> Estimate:
        watts = milliwatts / 1e3  # mW * ms is µJ
        return Estimate(latency.value * watts, latency.low * watts * (1 - spread), latency.high * watts * (1 + spread))

    how = f"{power.active_mw / 1e3:.2f} W above idle, {power.idle_mw / 1e3:.2f} W idle, times the latency ({power.source})."
    kind = f"energy is predicted and was validated against {power.validated}" if power.validated else "energy is an estimate, not validated"
    return times(power.active_mw), times(power.active_mw + power.idle_mw), (f"{kind}: {how}",)
