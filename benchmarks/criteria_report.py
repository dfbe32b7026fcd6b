"""The rows of benchmarks/criteria.py as Markdown tables and as a chart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import peer_pruning

STAGES = ("pruned", "recalibrated", "reconstructed", "fine-tuned")
Rows = list[dict[str, Any]]
Dense = dict[str, dict[str, float]]


def table(rows: Rows, dense: Dense) -> str:
    """One table per network and budget, best criterion first, then the winners with their test accuracy."""
    parts = []
    for network, removed in _parts(rows):
        mine = [r for r in rows if (r["network"], r["removed"]) == (network, removed)]
        allocations = list(dict.fromkeys(r["allocation"] for r in sorted(mine, key=lambda r: r["allocation"] == "its own global")))
        parts.append(
            f"### {network}, {removed}% of the MACs removed (dense: {dense[network]['validation']:.2f})\n\n"
            "Validation accuracy in percent: right after pruning / after BN recalibration / after reconstruction (/ after fine-tuning); "
            "criteria with several seeds: mean, and the range of the last figure without training.\n\n"
            f"| criterion | {' | '.join(allocations)} | scoring, CPU-s |\n|---|{'---|' * (len(allocations) + 1)}"
        )
        for criterion in _ordered(mine):
            of = [r for r in mine if r["criterion"] == criterion]
            columns = [_figures([r for r in of if r["allocation"] == a]) for a in allocations]
            seconds = sum(r["scoring_cpu_seconds"] for r in of) / len(of)
            parts[-1] += f"\n| {criterion} | {' | '.join(columns)} | {seconds:.1f} |"
    return "\n\n".join([*parts, _winners(rows, dense)]) + "\n"


def _parts(rows: Rows) -> list[tuple[str, int]]:
    return sorted({(r["network"], r["removed"]) for r in rows})


def _mean(rows: Rows, stage: str) -> float | None:
    found = [r["validation"][stage] for r in rows if stage in r["validation"]]
    return sum(found) / len(found) if found else None


def best(rows: Rows, stage: str) -> float:
    """The best allocation's mean over seeds."""
    by_allocation = {r["allocation"] for r in rows}
    return max((m for a in by_allocation if (m := _mean([r for r in rows if r["allocation"] == a], stage)) is not None), default=0.0)


def _ordered(rows: Rows) -> list[str]:
    return sorted({r["criterion"] for r in rows}, key=lambda c: (-best([r for r in rows if r["criterion"] == c], "reconstructed"), c))


def _figures(rows: Rows) -> str:
    if not rows:
        return "-"
    text = " / ".join(f"{m:.1f}" for stage in STAGES if (m := _mean(rows, stage)) is not None)
    last = [r["validation"]["reconstructed"] for r in rows]
    return text + (f" ({min(last):.1f} to {max(last):.1f})" if len(rows) > 1 else "")


def winners(rows: Rows) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, stage): for every network, budget and stage the best of ours and the best of the peer, by validation."""
    for network, removed in sorted({(r["network"], r["removed"]) for r in rows}):
        for stage in STAGES[1:]:
            mine = [r for r in rows if (r["network"], r["removed"]) == (network, removed) and stage in r["validation"]]
            for side in (False, True):
                if side_rows := [r for r in mine if (r["criterion"] in peer_pruning.PEERS) is side]:
                    yield max(side_rows, key=lambda r: r["validation"][stage]), stage


def _winners(rows: Rows, dense: Dense) -> str:
    lines = [
        "### Best on validation, on the 10,000 test images\n",
        "| network | MACs | after | criterion | allocation | validation | test |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for network, figures in sorted(dense.items()):
        if "test" in figures:
            lines.append(f"| {network} | dense | - | - | - | {figures['validation']:.2f} | {figures['test']:.2f} |")
        for row, stage in winners([r for r in rows if r["network"] == network]):
            if stage not in row.get("test", {}):
                continue
            seed = f" (seed {row['seed']})" if row["seed"] else ""
            lines.append(
                f"| {network} | {100 * (row['macs_share'] - 1):+.1f}% | {stage} | {row['criterion']}{seed} | {row['allocation']} | "
                f"{row['validation'][stage]:.2f} | {row['test'][stage]:.2f} |"
            )
    return "\n".join(lines)


def chart(rows: Rows, dense: Dense) -> str:
    """A self-contained HTML page: for every network and budget the criteria's validation accuracy, a mark per allocation and seed."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    parts = _parts(rows)
    titles = [f"{network}, -{removed}% MACs (dense {dense[network]['validation']:.1f})" for network, removed in parts]
    figure = make_subplots(rows=max(1, len(parts)), cols=1, subplot_titles=titles, vertical_spacing=0.25 / max(1, len(parts)))
    styles = {"pruned": "circle-open", "recalibrated": "diamond-open", "reconstructed": "circle", "fine-tuned": "star"}
    shades = dict(zip(sorted({r["allocation"] for r in rows}), ("#4269d0", "#efb118", "#6cc5b0", "#ff725c"), strict=False))
    for number, (network, removed) in enumerate(parts, start=1):
        mine = [r for r in rows if (r["network"], r["removed"]) == (network, removed)]
        for allocation, shade in shades.items():
            for stage, symbol in styles.items():
                shown = [r for r in mine if r["allocation"] == allocation and stage in r["validation"]]
                marks = graph_objects.Scatter(
                    x=[r["criterion"] for r in shown],
                    y=[r["validation"][stage] for r in shown],
                    mode="markers",
                    marker={"symbol": symbol, "color": shade, "size": 9},
                    name=f"{allocation}, {stage}",
                    legendgroup=f"{allocation}{stage}",
                    showlegend=number == 1,
                )
                figure.add_trace(marks, row=number, col=1)
        figure.update_xaxes(categoryorder="array", categoryarray=_ordered(mine), row=number, col=1)
        figure.update_yaxes(title="validation accuracy, %", row=number, col=1)
    figure.update_layout(height=140 + 420 * len(parts), template="plotly_white", title="Criteria on CIFAR-10")
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page
