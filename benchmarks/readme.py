"""Puts the tables of benchmarks/results into README.md and docs/, between their markers: `python -m benchmarks.readme`."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
# By page and marker: the file in benchmarks/results, and the words of the line that its table stands behind.
TABLES = {
    "README.md": {
        "accuracy": ("accuracy.md", ""),
        "imagenet": ("imagenet.md", ""),
        "criteria": ("criteria.md", "### Best on validation"),
        "speed": ("graph_speed.md", ""),
        "depth": ("graph_depth.md", ""),
        "start": ("graph_start.md", ""),
        "cost": ("cost_models.md", ""),
        "style": ("style.md", ""),
    },
    "docs/allocators.md": {
        "verdict": ("allocation.md", "against plain global ranking"),
    },
    "docs/cost-models.md": {
        "profiles": ("cost_models.md", ""),
        "others": ("cost_models.md", "Other boards and other networks"),
        "staircase": ("cost_staircase.md", ""),
    },
    "docs/criteria.md": {
        "resnet56": ("criteria.md", "### resnet56, 50%"),
        "resnet20": ("criteria.md", "### resnet20, 50%"),
        "di": ("di_study.md", ""),
        "seconds": ("criteria_cost.md", ""),
        "sparsity": ("sparsity.md", ""),
    },
    "docs/quantization.md": {
        "int8": ("quantize.md", "### int8"),
        "channels": ("quantize.md", "### channels"),
        "mixed": ("quantize.md", "### mixed"),
        "ways": ("artifacts_latency.md", "### Ways to ask"),
    },
    "docs/robustness.md": {
        "hostile": ("robustness.md", ""),
        "whole": ("whole.md", ""),
        "packages": ("packages.md", ""),
    },
}


def table_behind(text: str, words: str) -> str:
    """The first Markdown table of a text behind the first appearance of some words."""
    lines = text[text.index(words) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join(lines[start:stop])


def with_tables(page: str, text: str) -> str:
    """A page with the present tables."""
    for name, (file, words) in TABLES[page].items():
        table = table_behind((ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8"), words)
        before, _, rest = text.partition(f"<!-- {name} -->")
        after = rest.partition(f"<!-- end of {name} -->")[2]
        text = f"{before}<!-- {name} -->\n\n{table}\n\n<!-- end of {name} -->{after}"
    return text


if __name__ == "__main__":
    for page in TABLES:
        path = ROOT / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8")), encoding="utf-8")
