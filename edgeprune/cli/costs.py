"""What `profile` prints of a board that is not attached: the predicted cost, as a table of layers and what stands below it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from edgeprune.terminal import print_json, print_table

if TYPE_CHECKING:
    from edgeprune.device.card import Device
    from edgeprune.device.cost import Cost, Estimate
    from edgeprune.load import LoadedModel


def predicted(loaded: LoadedModel, target: Device, as_json: bool) -> None:
    """The predicted cost of a network, in words or as JSON."""
    from edgeprune.api import predict

    cost = predict(loaded.model, loaded.example_inputs, target)
    if as_json:
        print_json(asdict(cost))
    else:
        print_cost(cost, target)


def print_cost(cost: Cost, device: Device) -> None:
    """Every kernel with its share and what bounds it, then the figures with their intervals, how they were obtained and the notes."""
    head = ["layer", "kind", "bound by", "ms", "M MACs", "KB moved", "share"]
    rows = [
        [c.name, c.kind, c.bound, f"{c.latency_ms:.3f}", f"{c.macs / 1e6:.2f}", f"{c.bytes_moved / 1e3:,.0f}", f"{c.share:.1%}"]
        for c in cost.per_layer
    ]
    latency = cost.latency_ms
    if (fixed := latency.value - sum(c.latency_ms for c in cost.per_layer)) > 0:
        rows.append(["(once per inference)", "", "call overhead", f"{fixed:.3f}", "", "", f"{fixed / latency.value:.1%}"])
    print_table(head, rows)
    if device.resolved:
        typer.echo(f"\n{device.resolved}: {device.description}")
    typer.echo(f"\nlatency {_interval(latency, 'ms')}, 90% interval; {cost.basis}")
    if cost.energy_mj and cost.total_energy_mj:
        typer.echo(f"energy {_interval(cost.energy_mj, 'mJ')} above idle, {_interval(cost.total_energy_mj, 'mJ')} in total")
    typer.echo(f"memory {cost.peak_memory_bytes / 1e6:.2f} MB in an inference, size {cost.size_bytes / 1e6:.2f} MB")
    for note in cost.notes:
        typer.echo(f"- {note}")


def _interval(estimate: Estimate, unit: str) -> str:
    return f"{estimate.value:.2f} {unit} ({estimate.low:.2f} to {estimate.high:.2f})"
