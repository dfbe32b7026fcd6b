"""What the README tells people to type exists: commands, options, make targets, names of the library, files it links to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

import edgeprune as ep
from benchmarks.readme import TABLES, with_tables
from edgeprune.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?:^    |`)(edgeprune [^`\n]+)", README, flags=re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_options_exist(line: str) -> None:
    words = line.split()
    commands = typer.main.get_group(app).commands
    assert words[1] in commands
    command = commands[words[1]]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {w for w in words if w.startswith("--")} <= options


def test_options_named_in_the_text_exist() -> None:
    group = typer.main.get_group(app)
    options = {o for c in group.commands.values() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= options


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, flags=re.MULTILINE))
    assert named and named <= targets


def test_names_of_the_library_exist() -> None:
    named = set(re.findall(r"\bep\.([A-Za-z_]+)", README))
    assert named and all(hasattr(ep, name) for name in named)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_those_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert with_tables(page, text) == text
    assert all(text.count(f"<!-- {name} -->") == 1 for name in TABLES[page])
