"""What a network costs on a device it was never run on: latency with an interval, energy, memory, size. No torch here.

The model is additive with nonnegative constants per kernel kind (device cards hold them): one kernel takes
mac_ns * MACs + byte_ns * activation bytes + weight_byte_ns * weight bytes + call_us, a network the sum of its kernels and a
constant. Nonnegative means that removing channels never raises a prediction. nn-Meter (Zhang et al., MobiSys 2021) taught us to
count fused kernels, one regressor per kind; plain sums replace its forests because public tables are too small to feed those.
The interval is split conformal: quantiles of measured / predicted on held-out networks, wider where the network leaves what the
fit has seen, and the notes say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.device.card import Device, KernelKind
from edgeprune.device.kernels import FLOAT_BYTES, KernelsAt, kernels
from edgeprune.errors import UsageError
from edgeprune.graph.channels import ChannelGraph
from edgeprune.graph.lengths import Floats

# Widening of the interval, as a share of the prediction: per share of the time in kernels that the fitted networks spent less time
# in (all of it for kinds they had none of), and per doubling of the distance from the latencies they had. The evidence is in
# benchmarks/results/cost_models.md (transfer).
UNSEEN_WIDENING = 0.5
RANGE_WIDENING = 0.15
# Kernels that only move memory have one set of constants, so they count as one kind.
MEMORY_KINDS = frozenset({"elementwise", "pool", "cat", "resize", "norm", "other"})
_NOTABLE_SHARE = 0.02


@dataclass(frozen=True)
class Estimate:
    """A predicted figure; the true one lies in [low, high] about nine times out of ten."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerCost:
    """One kernel of the network: its part of the latency in ms, and as a share (0..1) of the whole."""

    name: str
    kind: str
    latency_ms: float
    macs: int
    share: float


@dataclass(frozen=True)
class Cost:
    """What one inference (batch 1) costs. `energy_mj` is None where the board's power is not known.

    `basis` says how the figures were obtained, `notes` what makes them less certain.
    """

    latency_ms: Estimate
    energy_mj: Estimate | None
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
        mac_ns, byte_ns, weight_byte_ns, call_us = self._rates(at.kinds)
        activation_bytes = FLOAT_BYTES * (at.input_elements + at.output_elements)
        nanoseconds = at.macs * mac_ns + activation_bytes * byte_ns + FLOAT_BYTES * at.weight_elements * weight_byte_ns + 1e3 * call_us
        return np.asarray(self.correction * nanoseconds / 1e6, dtype=np.float64)

    def total_ms(self, at: KernelsAt) -> Floats:
        """Predicted milliseconds of the whole network, (plans,)."""
        return np.asarray(self.latency_ms(at).sum(axis=1) + self.network_ms, dtype=np.float64)

    def interval_ms(self, at: KernelsAt) -> tuple[Floats, Floats]:
        """The 90 % interval around `total_ms`: (low, high), each (plans,). A latency budget must hold for `high`.

        `high` rises with every width, as `total_ms` does: the widening is a small part of a sum of kernel times.
        """
        per_kernel, fit = self.latency_ms(at), self.device.constants.fit
        total = per_kernel.sum(axis=1) + self.network_ms
        unseen = sum(self._unseen(at.kinds, per_kernel, total).values(), np.zeros(len(total)))
        extra = UNSEEN_WIDENING * unseen + RANGE_WIDENING * self._doublings(total)
        return total * fit.low_factor / (1 + extra), total * fit.high_factor * (1 + extra)

    def energy_mj(self, at: KernelsAt) -> Floats:
        """Upper end of the energy of one inference above idle, (plans,). Raises UsageError for a board whose power is not known."""
        power = self.device.card.power
        if power is None:
            raise UsageError(f"an energy budget cannot be predicted for {self.device.profile}: its card has no power figures.")
        return self.interval_ms(at)[1] * power.active_mw / 1e3 * (1 + power.uncertainty)

    def notes(self, at: KernelsAt) -> tuple[str, ...]:
        """Why the interval of the first plan is wider than the fit's own, in words."""
        constants, per_kernel = self.device.constants, self.latency_ms(at)[:1]
        totals = per_kernel.sum(axis=1) + self.network_ms
        total, found = float(totals[0]), []
        unseen = {kind: float(share[0]) for kind, share in self._unseen(at.kinds, per_kernel, totals).items()}
        if (share := sum(unseen.values())) > _NOTABLE_SHARE:
            kinds = ", ".join(
                f"{kind} {100 * part:.0f} %{'' if constants.kernels[kind].seen_share else ', constants from another board'}"
                for kind, part in unseen.items()
                if part > _NOTABLE_SHARE / 2
            )
            found.append(
                f"{share:.0%} of the predicted time is more than any network in the fit of {self.device.profile} spent in such kernels "
                f"({kinds}): interval widened by {UNSEEN_WIDENING * share:.0%}."
            )
        doublings = float(self._doublings(totals)[0])
        if doublings > 0:
            low, high = constants.fit.latency_ms
            found.append(
                f"{total:.2f} ms is outside the {low:.3g} to {high:.4g} ms that the fit has seen: "
                f"interval widened by {RANGE_WIDENING * doublings:.0%}."
            )
        return tuple(found)

    def _rates(self, kinds: tuple[str, ...]) -> Floats:
        table = self._table
        return np.stack([table[kind] for kind in kinds], axis=1) if kinds else np.zeros((4, 0))

    @cached_property
    def _table(self) -> dict[str, Floats]:
        rates = self.device.constants.kernels
        return {kind: np.array([r.mac_ns, r.byte_ns, r.weight_byte_ns, r.call_us]) for kind, r in rates.items()}

    def _unseen(self, kinds: tuple[str, ...], per_kernel: Floats, total: Floats) -> dict[KernelKind, Floats]:
        """Share of the time that each kind takes beyond what it took in any fitted network, (plans,) each."""
        shares: dict[KernelKind, Floats] = {}
        lumped = np.array(["elementwise" if kind in MEMORY_KINDS else kind for kind in kinds])
        for kind, rate in self.device.constants.kernels.items():
            if (mine := lumped == kind).any():
                shares[kind] = np.maximum(per_kernel[:, mine].sum(axis=1) / total - rate.seen_share, 0.0)
        return shares

    def _doublings(self, total_ms: Floats) -> Floats:
        low, high = self.device.constants.fit.latency_ms
        # The range is about the board as fitted: a correction moves predictions, not what the fit has seen.
        raw = total_ms / self.correction
        return np.asarray(np.log2(np.maximum(np.maximum(low / raw, raw / high), 1.0)), dtype=np.float64)


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
    layers = tuple(
        LayerCost(name, kind, float(ms), int(macs), float(ms / total))
        for name, kind, ms, macs in zip(at.names, at.kinds, per_kernel, at.macs[0], strict=True)
    )
    energy, energy_notes = _energy(device, latency)
    return Cost(
        latency_ms=latency,
        energy_mj=energy,
        peak_memory_bytes=int(made.peak_memory_bytes(chosen)[0]),
        size_bytes=int(made.size_bytes(chosen)[0]),
        macs=int(made.macs(chosen)[0]),
        params=int(made.params(chosen)[0]),
        per_layer=layers,
        basis=_basis(device, correction),
        notes=(*model.notes(at), *energy_notes),
    )


def _basis(device: Device, correction: float) -> str:
    fit = device.constants.fit
    text = (
        f"predicted, not measured: profile {device.profile}, error on held-out networks {fit.mape:.1f} % on average, "
        f"{fit.within_10:.0f} % within ±10 % ({fit.held_out})"
    )
    return text if correction == 1 else f"{text}; multiplied by {correction:.3f}, the ratio of measured to predicted on this device"


def _energy(device: Device, latency: Estimate) -> tuple[Estimate | None, tuple[str, ...]]:
    power = device.card.power
    if power is None:
        return None, ()
    # mW * ms is µJ.
    active, spread = power.active_mw / 1e3, power.uncertainty
    energy = Estimate(latency.value * active, latency.low * active * (1 - spread), latency.high * active * (1 + spread))
    return energy, (f"energy is an estimate, not validated: {active:.2f} W above idle times the latency ({power.source}).",)
