import io
import json
import sys

import pytest
from rich.console import Console

from edgeprune.terminal import complain, print_json, print_table, progress_bars, say


def test_a_complaint_is_one_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    complain("first line\n\n   second " + "word " * 60 + "--a-b-c-" + "x" * 150)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("edgeprune: first line second word")
    assert all(len(line) <= 110 for line in lines[:-1])
    assert lines[-1] == "--a-b-c-" + "x" * 150  # what may be copied is not broken
    say("once")
    assert capsys.readouterr() == ("", "edgeprune: once\n")


def test_json_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, None]})
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"a": [1, None]}, "")


def test_tables_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "n"], [["layer[0].[red]x[/red]\\", 3], ["y" * 150, 4]])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "n"]
    assert first.split() == ["layer[0].[red]x[/red]\\", "3"]
    assert second.split() == ["y" * 150, "4"]


def test_a_table_that_no_terminal_shows_has_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "what it does"], [["a", "x " * 200], ["b", "y"]])
    head, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["a", *["x"] * 200]
    assert not any(line.endswith(" ") for line in (head, first, second))


def test_figures_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["layer", "ms"], [["conv1", "10.738"], ["2", "0.017"]])
    print_table(["", ""], [["a key", "its value"]])
    assert capsys.readouterr().out.splitlines() == ["layer      ms", "conv1  10.738", "2       0.017", "a key  its value"]


def test_progress_without_a_terminal_is_a_line_per_task(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as progress:
        for done in range(3):
            progress("training", done, 2)
        progress("exporting", 0, 1)
    assert capsys.readouterr() == ("", "edgeprune: training …\nedgeprune: exporting …\n")


def test_progress_on_a_terminal_shows_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    assert Console(file=screen).is_terminal
    with progress_bars() as progress:
        progress("training", 5, 10)
        progress("training", 10, 10)
    assert "training" in screen.getvalue()
    assert "10/10" in screen.getvalue()
    assert "edgeprune:" not in screen.getvalue()
