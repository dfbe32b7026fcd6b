"""Commands that look at a network, an artifact, or what there is to choose from, and leave everything as it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli.options import AsJson, Factory, Model, Shape, TrustPickle, load, shape_of
from edgeprune.terminal import print_json, print_table

if TYPE_CHECKING:
    from edgeprune.graph import ChannelGraph

NAMED = 4  # parameter axes that a line names


def inspect(
    path: Model,
    factory: Factory = None,
    input_shape: Shape = None,
    layers: Annotated[bool, typer.Option("--layers", help="list every conv and linear too")] = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """The groups of channels that can go, and what stays and why.

    With what each group weighs, and how much of the network can go at all.
    """
    from edgeprune.graph.trace import trace
    from edgeprune.report import quantity

    loaded = load(path, factory, shape_of(input_shape), trust_pickle)
    graph = trace(loaded.model, loaded.example_inputs)
    found = _anatomy(graph)
    if as_json:
        print_json(found)
        return
    rows = [[g["name"], g["channels"], len(g["members"]), *_weight(g, "macs"), *_weight(g, "params")] for g in found["groups"]]
    print_table(["group", "channels", "parameter axes", "MACs", "of all", "parameters", "of all"], rows)
    macs, params = (math.floor(1000 * share) / 10 for share in graph.prunable)  # 99.98% must not read as everything
    typer.echo(
        f"\n{quantity(graph.macs)} MACs, {quantity(graph.params)} parameters, "
        f"{len(graph.groups)} {'group' if len(graph.groups) == 1 else 'groups'} of channels can shrink\n"
        f"With one channel left in every group, {macs}% of the MACs and {params}% of the parameters are gone: no plan removes more.\n"
        f"{_branches(graph)}"
        "A group's figures are what goes with all of it alone; a layer between two groups counts for both, so shares exceed 100%."
    )
    if layers:
        typer.echo()
        rows = [[x["name"], x["kind"], x["weight"], quantity(x["macs"]), quantity(x["params"])] for x in found["layers"]]
        print_table(["layer", "kind", "weight", "MACs", "parameters"], rows)
    if graph.frozen:
        typer.echo("\nStays dense:")
        print_table(
            ["reason", "parameter axes", "which"], [[why, len(axes), _some(axes)] for why, axes in found["frozen_by_reason"].items()]
        )


def _branches(graph: ChannelGraph) -> str:
    """What whole residual branches would add; nothing where there are none."""
    import numpy as np

    if not graph.branches or not graph.macs:
        return ""
    widths = np.array([g.name not in graph.branches for g in graph.groups], dtype=np.int64)
    gone = math.floor(1000 * (1 - float(graph.macs_at(widths)[0]) / graph.macs)) / 10
    return f"With --min-channels 0 {len(graph.branches)} of them may go whole, with their residual branches: up to {gone}% of the MACs.\n"


def criteria(as_json: AsJson = False) -> None:
    """Importance criteria: what each needs and where it comes from."""
    _registry("criteria", as_json)


def allocators(as_json: AsJson = False) -> None:
    """Ways to decide how much of each layer stays."""
    _registry("allocate", as_json)


def _anatomy(graph: ChannelGraph) -> dict[str, Any]:
    """Everything `inspect` knows, as JSON."""
    reasons: dict[str, list[str]] = {}
    for axis, reason in graph.frozen.items():
        reasons.setdefault(reason, []).append(axis)
    macs, params = graph.prunable
    return {
        "macs": graph.macs,
        "params": graph.params,
        "prunable": {"macs": macs, "params": params, "definition": "share that is gone with one channel left in every group"},
        "groups": [
            {
                "name": g.name,
                "channels": g.channels,
                "branch": g.name in graph.branches,
                "members": [{"parameter": m.parameter, "axis": m.axis, "positions_per_channel": m.indices.shape[1]} for m in g.members],
                **share._asdict(),
                "macs_share": share.macs / graph.macs if graph.macs else 0.0,
                "params_share": share.params / graph.params if graph.params else 0.0,
            }
            for g, share in zip(graph.groups, graph.shares, strict=True)
        ],
        "layers": [
            {
                "name": weight.removesuffix(".weight"),
                "kind": op.kind,
                "weight": list(graph.shapes[weight]),
                "macs": op.positions * math.prod(graph.shapes[weight]),
                "params": math.prod(graph.shapes[weight]) + math.prod(graph.shapes.get(op.stem + "bias", (0,))),
            }
            for op in graph.multiplying
            if (weight := op.weight)
        ],
        "frozen": dict(graph.frozen),
        "frozen_by_reason": dict(sorted(reasons.items(), key=lambda entry: -len(entry[1]))),
    }


def _weight(group: Mapping[str, Any], figure: str) -> tuple[str, str]:
    from edgeprune.report import quantity

    return quantity(group[figure]), f"{group[figure + '_share']:.1%}"


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - NAMED} more (--json has all)" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def _registry(folder: str, as_json: bool) -> None:
    from edgeprune.registry import entries

    found = entries(folder)
    if as_json:
        known = {e.name: {"summary": e.summary, "needs": e.constants.get("NEEDS"), "source": e.constants.get("PAPER")} for e in found}
        return print_json(known)
    rows = [[e.name, ", ".join(e.constants.get("NEEDS", ())) or "-", e.summary, e.constants.get("PAPER", "")] for e in found]
    print_table(["name", "needs", "what it does", "source"], rows)
