from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import QUICK, Command


def test_report_is_written_again(edgeprune: Command, here: Path) -> None:
    assert edgeprune("compress", *QUICK, "--macs", "0.5", "--out", "run").code == 0
    page = Path("run/report.html")
    before = page.read_text()
    page.unlink()
    done = edgeprune("report", "run")
    assert (done.code, done.out.strip()) == (0, "run/report.html")
    assert page.read_text() == before
    nothing = edgeprune("report", "nowhere")
    assert nothing.code == 2
    assert nothing.message.startswith("edgeprune: nowhere holds no finished run")
    Path("run/result.json").write_text("{")
    assert "damaged" in edgeprune("report", "run").message


def test_reports_of_several_runs_are_one_comparison(edgeprune: Command, here: Path) -> None:
    for folder, criterion in (("one", "l1"), ("deep/two", "l2"), ("three", "l1")):
        budgets = "0.6,0.5" if folder == "three" else "0.5"
        assert edgeprune("compress", *QUICK, "--macs", budgets, "--criterion", criterion, "--out", folder).code == 0
    done = edgeprune("report", "one", "deep/two", "three", "--out", "compared")
    assert (done.code, done.out.strip()) == (0, "compared/report.html")
    page, words = Path("compared/report.html").read_text(), Path("compared/report.md").read_text()
    for link in ("../one/report.html", "../deep/two/report.html", "../three/macs-0.6/report.html"):
        assert f'href="{link}"' in page
        assert (Path("compared") / link).is_file()
    assert "4 networks." in words and "| two (criterion l2) |" in words and "| dense |" in words
    assert "Criterion differs, allocator knapsack" in words
    alone = edgeprune("report", "one", "one")
    assert alone.code == 2 and "one is the only run given" in alone.message
    assert edgeprune("report", "one", "nowhere").code == 2
