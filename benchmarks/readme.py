"""Puts the tables of benchmarks/results into the README, between their markers: `python -m benchmarks.readme`."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLES = {"accuracy": "accuracy.md", "cost": "cost_models.md"}


def first_table(text: str) -> str:
    """The first Markdown table of a text."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join(lines[start:stop])


def with_tables(readme: str) -> str:
    """The README with the present tables."""
    for name, file in TABLES.items():
        table = first_table((ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8"))
        before, _, rest = readme.partition(f"<!-- {name} -->")
        after = rest.partition(f"<!-- end of {name} -->")[2]
        readme = f"{before}<!-- {name} -->\n\n{table}\n\n<!-- end of {name} -->{after}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
