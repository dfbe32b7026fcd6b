"""The rows of benchmarks/allocation.py as Markdown tables and as a chart."""

from __future__ import annotations

import statistics
from typing import Any

LEARNED = "layer-compensated"
TUNED = "macs-50"  # the budget at which networks are also fine-tuned
PLAIN = ("global", "global per cost", "knapsack")
STAGES = {"recalibrated": "after BN recalibration", "reconstructed": "after reconstruction", "fine-tuned": "after one epoch"}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5)
Rows = list[dict[str, Any]]
Dense = dict[str, dict[str, float]]


def table(rows: Rows, dense: Dense) -> str:
    """One table per network and budget, the least loss after recalibration first; before them whether the learned ranking beats others."""
    parts = []
    for network, budget in _parts(rows):
        mine = [r for r in rows if (r["network"], r["budget"]) == (network, budget) and "recalibrated" in r["after"]]
        tuned = any("fine-tuned" in r["after"] for r in mine)
        heads = ["allocator", "seeds", "KL, recalibrated", "top-1", "KL, reconstructed", "top-1", *(["top-1, one epoch"] * tuned)]
        heads += ["MACs", "search, CPU-s", "candidates", "candidates/s"]
        limit = ", ".join(f"{name} {value:g}" for name, value in mine[0]["limit"].items())
        lines = [
            f"### {network}, {budget} ({limit}; dense: {dense[network]['accuracy']:.2f}%)\n",
            f"| {' | '.join(heads)} |",
            "|---" * len(heads) + "|",
        ]
        lines += [_line(name, [r for r in mine if r["allocator"] == name], tuned=tuned) for name in _ordered(mine)]
        parts.append("\n".join(lines))
    return "\n\n".join(part for part in (_about(rows), _verdict(rows), *parts, _tested(rows, dense)) if part) + "\n"


def _about(rows: Rows) -> str:
    options = {(r["allocator"], r["network"]): r for r in rows}
    searches = "; ".join(
        f"{name}: {row['search']['evaluations']} candidates on {row['options'].get('images', '-')} images, recovered on "
        f"{row['options'].get('recalibration_images', '-')} (on {row['network']})"
        for (name, _), row in sorted(options.items())
        if row["search"].get("evaluations")
    )
    revisions = ", ".join(sorted({r["revision"] for r in rows}))
    return (
        "KL: divergence from the dense network's answers in nats, mean over 2,000 augmented training images that neither scores nor "
        "searches saw; top-1 in percent on the same images. Mean over seeds, and the range where there are several. An allocator that "
        f"learns has learned at the hardest budget of each network only. {searches}. Revision {revisions}."
    )


def _parts(rows: Rows) -> list[tuple[str, str]]:
    found = {(r["network"], r["budget"]) for r in rows if "recalibrated" in r["after"]}
    return sorted(found, key=lambda part: (part[0], part[1] == "latency", part[1]))


def _values(rows: Rows, stage: str, figure: str) -> list[float]:
    return [r["after"][stage][figure] for r in rows if stage in r["after"]]


def _ordered(mine: Rows) -> list[str]:
    return sorted({r["allocator"] for r in mine}, key=lambda a: (_mean_loss(mine, a), a))


def _mean_loss(mine: Rows, allocator: str, stage: str = "recalibrated") -> float:
    found = _values([r for r in mine if r["allocator"] == allocator], stage, "divergence")
    return statistics.mean(found) if found else float("inf")


def _line(name: str, rows: Rows, *, tuned: bool) -> str:
    cells = [name, str(len(rows))]
    for stage in list(STAGES)[:2]:
        cells += [_ranged(_values(rows, stage, "divergence"), 3), _ranged(_values(rows, stage, "accuracy"), 1)]
    cells += [_ranged(_values(rows, "fine-tuned", "accuracy"), 1)] * tuned
    cells += [f"{statistics.mean(r['macs_share'] for r in rows):.1%}", *_speed([r["search"] for r in rows])]
    return f"| {' | '.join(cells)} |"


def _speed(searches: list[dict[str, Any]]) -> list[str]:
    """Seconds, candidates, and candidates per second: of CPU time, or of the clock where several processes searched."""
    alone = [s for s in searches if s["jobs"] == 1] or searches
    jobs = alone[0]["jobs"]
    seconds = statistics.mean(s["cpu_seconds" if jobs == 1 else "seconds"] for s in alone)
    candidates = statistics.mean(s.get("evaluations", 0) for s in alone)
    told = f"{seconds:.1f}" + (f" on the clock, {jobs} processes" if jobs > 1 else "")
    return [told, f"{candidates:.0f}", f"{candidates / seconds:.2f}"] if candidates else [told, "-", "-"]


def _ranged(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _verdict(rows: Rows) -> str:
    """Whether the learned ranking beats both forms of plain global ranking, and the integer program."""
    heads = ["network", "budget", "loss", f"{LEARNED}, seeds", "mean and range", *PLAIN, "beats"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for network, budget in _parts(rows):
        mine = [r for r in rows if (r["network"], r["budget"]) == (network, budget)]
        for stage in list(STAGES)[:2]:
            ours = _values([r for r in mine if r["allocator"] == LEARNED], stage, "divergence")
            others = {plain: _mean_loss(mine, plain, stage) for plain in PLAIN}
            if not ours or max(others.values()) == float("inf"):
                continue
            beaten = [plain for plain, loss in others.items() if statistics.mean(ours) < loss]
            told = [f"{loss:.3f}" for loss in others.values()]
            cells = [network, budget, STAGES[stage], str(len(ours)), _ranged(ours, 3), *told, ", ".join(beaten) or "none of them"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"### {LEARNED} against plain global ranking\n", *lines]) if len(lines) > 2 else ""


def _tested(rows: Rows, dense: Dense) -> str:
    lines = ["| network | budget | allocator | validation | test |", "|---|---|---|---|---|"]
    for network, figures in sorted(dense.items()):
        if "test" in figures:
            lines.append(f"| {network} | dense | - | {figures['accuracy']:.2f} | {figures['test']:.2f} |")
        for row in sorted((r for r in rows if r["network"] == network and "test" in r), key=lambda r: (r["budget"], r["allocator"])):
            cells = [network, row["budget"], f"{row['allocator']}, seed {row['seed']}"]
            lines.append(f"| {' | '.join(cells)} | {row['after']['reconstructed']['accuracy']:.2f} | {row['test']:.2f} |")
    head = (
        "### On the 10,000 test images: the least KL after reconstruction at each budget, and plain global ranking (top-1, reconstructed)\n"
    )
    return "\n".join([head, *lines]) if len(lines) > 2 else ""


def chart(rows: Rows, dense: Dense) -> str:
    """A self-contained HTML page: for every network and budget the allocators' loss, a mark per stage, a line over the seeds."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    parts = _parts(rows)
    titles = [f"{network}, {budget} (dense top-1 {dense[network]['accuracy']:.1f})" for network, budget in parts]
    figure = make_subplots(rows=max(1, len(parts)), cols=1, subplot_titles=titles, vertical_spacing=0.24 / max(1, len(parts)))
    styles = {"recalibrated": ("diamond", "#efb118"), "reconstructed": ("circle", "#4269d0"), "fine-tuned": ("star", "#3ca951")}
    for number, (network, budget) in enumerate(parts, start=1):
        mine = [r for r in rows if (r["network"], r["budget"]) == (network, budget)]
        names = _ordered([r for r in mine if "recalibrated" in r["after"]])
        for stage, (symbol, shade) in styles.items():
            shown = [r for r in mine if stage in r["after"]]
            marks = graph_objects.Scatter(
                x=[r["after"][stage]["divergence"] for r in shown],
                y=[r["allocator"] for r in shown],
                mode="markers",
                marker={"symbol": symbol, "color": shade, "size": 10, "opacity": 0.8},
                name=STAGES[stage],
                legendgroup=stage,
                showlegend=number == 1,
            )
            figure.add_trace(marks, row=number, col=1)
        figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], row=number, col=1)
        figure.update_xaxes(type="log", tickvals=TICKS, ticktext=[f"{t:g}" for t in TICKS], row=number, col=1)
    figure.update_xaxes(title="KL from the dense network's answers, nats (less is better)", row=max(1, len(parts)), col=1)
    figure.update_layout(
        height=160 + 340 * max(1, len(parts)),
        template="plotly_white",
        title="Allocators on CIFAR-10: same scores, same budget",
        legend={"orientation": "h", "y": 1.0, "yref": "container", "yanchor": "top", "x": 1.0, "xanchor": "right"},
        margin={"t": 110},
    )
    page: str = figure.to_html(include_plotlyjs=True, full_html=True, config={"displayModeBar": False})
    return page
