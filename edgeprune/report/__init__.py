"""The facts of one run as two files people read: report.html, which needs no network, and report.md.

The templates beside this file hold the pages; here are only the wording of numbers, the escaping, and the writing. Every string may
come from a stranger's model (layer names, labels, file names): HTML is escaped by the template engine, Markdown by `_markdown_text`
and `_markdown_code`, chart labels by `plain` in charts.js. Both files are written whole under a temporary name, then renamed.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import UsageError
from edgeprune.run import disk_is_full, write_error

if TYPE_CHECKING:
    import jinja2

NOT_GIVEN = "not given"
LABELS = {"macs": "MACs", "params": "parameters", "size": "artifact size"}
MINUS = "\N{MINUS SIGN}"
BYTES = ("B", "kB", "MB", "GB", "TB")
COUNTS = ("", "k", "M", "G", "T")
SCALED_UNITS = ("ms", "s", "mJ", "mW", "Hz", "°C")  # units people read without a k or M in front


def write(result: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Paths of report.html and report.md, written into `folder`, which is made if it is missing.

    `result` is the JSON object of a run; lists may be empty and values None: the section goes, or says "not given".
    An older report stays untouched unless both new ones could be written. Raises UsageError when the folder cannot be written to.
    """
    from plotly.offline import get_plotlyjs

    facts = _finite(result)
    page = {
        "result": facts,
        "headline": headline(facts),
        "frozen": _by_reason(facts.get("frozen") or []),
        "bits": next((bits for a in facts.get("artifacts") or [] if (bits := a.get("bits"))), {}),
        # A script runs only with this mark, which a name in the model cannot guess: it would have to contain its own hash.
        "nonce": hashlib.sha256(repr(facts).encode(errors="backslashreplace")).hexdigest()[:32],
        "plotly_js": get_plotlyjs(),
    }
    environment = _environment()
    names = ("report.html", "report.md")
    texts = [environment.get_template(f"{name}.j2").render(page) for name in names]
    targets = [folder / name for name in names]
    drafts = [folder / f".{name}.{os.getpid()}.tmp" for name in names]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for draft, text in zip(drafts, texts, strict=True):
            draft.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        for draft, target in zip(drafts, targets, strict=True):
            draft.replace(target)
    except OSError as error:
        for draft in drafts:
            if draft.parent.is_dir():
                draft.unlink(missing_ok=True)
        if disk_is_full(error):
            raise write_error(error, folder) from error
        raise UsageError(f"the report cannot be written to {folder}: {error.strerror or error}. Choose one you may write to.") from error
    return targets[0], targets[1]


def headline(result: Mapping[str, Any]) -> str:
    """What was asked and what was reached, in one or two sentences; a predicted figure is called so."""
    if points := result.get("points"):
        words = (
            f"{p['name']}: accuracy {quantity(p['accuracy'], '%')}, latency {quantity(p['latency'], 'ms')} {p['latency_basis']}"
            for p in points
        )
        return f"{len(points)} networks. {'; '.join(words)}."
    budgets = result.get("budgets") or []
    asked = " and ".join(f"{label(b['name'])} of at most {quantity(b['asked'], b['unit'])}" for b in budgets)
    reached = " and ".join(_reached(b, result) for b in budgets)
    first = f"Asked for {asked}; reached {reached}." if budgets else "No budget was asked for."
    accuracy: Mapping[str, Any] = next((f for f in result.get("figures") or [] if f["name"] == "accuracy"), {})
    before, after = ((accuracy.get(side) or {}).get("value") for side in ("before", "after"))
    if before is None and after is None:
        return f"{first} Accuracy is not given."
    return f"{first} Accuracy went from {quantity(before, '%')} to {quantity(after, '%')}."


def quantity(value: object, unit: str | None = "") -> str:
    """A number as people read it: 125.5 M, 3.4 MB, 29.6 ms, 93.39%; "not given" for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOT_GIVEN
    if unit == "%":
        return f"{value:.2f}%"
    if unit in SCALED_UNITS:
        return f"{_digits(value)} {unit}"
    scale = BYTES if unit == "bytes" else COUNTS
    step = 0
    while abs(value) >= 999.95 and step < len(scale) - 1:
        value, step = value / 1000, step + 1
    return " ".join(part for part in (_digits(value), scale[step], "" if unit == "bytes" else unit) if part)


def exact(value: float, unit: str | None = "") -> str:
    """A figure with all the digits that may decide whether a limit holds: 24,293,888, 29.9871 ms."""
    digits = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.6g}"
    return f"{digits} {unit}" if unit else digits


def change(before: object, after: object, unit: str | None = "") -> str:
    """How far `after` is from `before`: points for percentages, else percent of `before`; empty where there is nothing to compare."""
    if not (isinstance(before, int | float) and isinstance(after, int | float)) or (not before and unit != "%"):
        return ""
    if unit == "%":
        return f"{after - before:+.2f} points".replace("-", MINUS)
    percent = 100 * (after - before) / before
    return f"{percent:+.{0 if abs(percent) >= 10 else 1}f}%".replace("-", MINUS)


def label(name: str) -> str:
    """A figure's or a budget's name in words: latency_ms -> latency."""
    stem = re.sub(r"_(ms|mj|bytes)$", "", name)
    return LABELS.get(stem, stem.replace("_", " "))


def basis(entry: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """How sure a figure or budget is: its own basis, else that of the figure of the same name, else the first words of its `how`."""
    twins = [f for f in result.get("figures") or [] if label(f["name"]) == label(entry["name"])]
    known = next((word for e in (entry, *twins) if (word := e.get("basis"))), None)
    how = str(entry.get("how") or "")
    word = known or next((w for w in ("predicted", "measured") if how.startswith(w)), "basis not given")
    return "predicted, not measured" if word == "predicted" else str(word)


def duration(seconds: object) -> str:
    """Seconds as people read them: 0.4 s, 10 min 5 s, 3 h 20 min."""
    if not isinstance(seconds, int | float):
        return NOT_GIVEN
    if seconds < 60:
        return f"{_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgeprune", "report"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    words = {"quantity": quantity, "change": change, "label": label, "basis": basis, "duration": duration}
    environment.filters |= words | {"code": _markdown_code, "text": _markdown_text, "small": _small, "headword": _headword, "glue": _glue}
    return environment


def _reached(budget: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if budget["reached"] is None:
        return "a figure that is not given"
    missed = ", which misses the budget" if budget.get("met") is False else ""
    return f"{quantity(budget['reached'], budget['unit'])} ({basis(budget, result)}){missed}"


def _digits(value: float) -> str:
    """Three significant digits below 100, one decimal above; no decimals for whole numbers."""
    if value == round(value):
        return f"{value:,.0f}"
    if abs(value) >= 99.95:
        return f"{value:,.1f}"
    return f"{value:#.3g}" if abs(value) >= 1 else f"{value:.3g}"


def _small(value: object) -> str:
    """An error or a loss: 1.0e-06, 0.413."""
    if not isinstance(value, int | float):
        return NOT_GIVEN
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def _headword(text: str) -> str:
    return text[:1].upper() + text[1:]


def _glue(text: str) -> str:
    """The same text in which a line never breaks between a number and its unit."""
    return re.sub(r"(?<=\d) (?=[A-Za-z°])", "\N{NO-BREAK SPACE}", text)


def _finite(value: Any) -> Any:
    """The same object with None for NaN and infinities, which JSON does not know (a loss after training diverged)."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _by_reason(frozen: list[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """(reason, parameters), the reason with the most parameters first."""
    ordered = sorted(frozen, key=lambda entry: entry["reason"])
    groups = [(reason, [e["parameter"] for e in entries]) for reason, entries in groupby(ordered, key=lambda e: e["reason"])]
    return sorted(groups, key=lambda group: -len(group[1]))


def _markdown_text(text: object) -> str:
    """One line of plain Markdown text: nothing in it is read as markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#!&~$])", r"\\\1", " ".join(str(text).split()))


def _markdown_code(text: object) -> str:
    """A code span that shows exactly `text`, also inside a table cell and with backticks in it."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{space}{line}{space}{fence}"
