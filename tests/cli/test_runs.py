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
