"""The report in a real browser: no complaint, no request, no sideways scrolling, names shown as they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeprune import report
from tests.report.report_samples import EVIL, Facts, full, hostile, large, minimal


class Browser:
    """Headless Chromium spoken to over a pipe (DevTools protocol, messages end with a zero byte): no extra package, no port."""

    def __init__(self, program: str, profile: Path) -> None:
        self.events: list[Facts] = []
        self.number = 0
        self.session: dict[str, str] = {}
        send_read, self.send = os.pipe()
        receive, receive_write = os.pipe()
        self.replies = os.fdopen(receive, "rb")
        self.unread = b""
        switches = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
        switches += [
            "--disable-component-update",
            "--disable-quic",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        # Chromium reads commands from file 3 and answers on file 4.
        command = ["bash", "-c", f'exec 3<&{send_read} 4>&{receive_write}; exec "$0" "$@"', program, *switches]
        ours = (send_read, receive_write)
        self.process = subprocess.Popen(command, pass_fds=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for handle in ours:
            os.close(handle)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Facts:
        self.number += 1
        command = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.send, json.dumps(command).encode() + b"\0")
        while (message := self.receive()).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        result: Facts = message["result"]
        return result

    def receive(self) -> Facts:
        while b"\0" not in self.unread:
            piece = self.replies.read1()
            assert piece, "the browser went away"
            self.unread += piece
        text, _, self.unread = self.unread.partition(b"\0")
        message: Facts = json.loads(text)
        return message

    def show(self, page: Path, width: int, height: int, theme: str) -> None:
        self.events.clear()
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Page.navigate", url=page.as_uri())
        self.wait_for("document.readyState === 'complete' && !!window.Plotly")

    def wait_for(self, expression: str, seconds: float = 90) -> None:
        """Returns once the expression is true; fails when it never becomes so."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"never true in the browser: {expression}"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.replies.close()
        os.close(self.send)


# the words beside the bars of a chart that its right edge cuts
CUT = """(chart) => [...chart.querySelectorAll('.bartext')].filter(
    (text) => text.getBoundingClientRect().right > chart.getBoundingClientRect().right).map((text) => text.textContent)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine: install the chromium package to look at the report in a browser")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), [(320, "light"), (390, "dark"), (1280, "light")])
@pytest.mark.parametrize("make", [full, large, minimal, hostile])
def test_a_browser_shows_it_without_complaint(tmp_path: Path, browser: Browser, make: Any, width: int, theme: str) -> None:
    html, _ = report.write(make(), tmp_path)
    browser.show(html, width, 900, theme)
    browser.value("document.querySelectorAll('details').forEach((d) => d.open = true)")
    assert browser.value("document.documentElement.scrollWidth") == width
    charts = 0 if make is minimal else 9
    assert browser.value("document.querySelectorAll('.chart').length") == charts
    assert browser.value("document.querySelectorAll('.chart .main-svg .trace').length") >= charts
    assert browser.value(f"[...document.querySelectorAll('.chart')].flatMap({CUT})") == []
    requests = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [html.as_uri()]
    complaints = [
        e
        for e in browser.events
        if e.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening")
    ]
    assert complaints == []


@pytest.mark.slow
def test_chart_labels_show_names_as_they_are(tmp_path: Path, browser: Browser) -> None:
    facts = full()
    names = ["<b>bold</b>", '<a href="https://a.b">x</a>', EVIL, "&lt;i&gt;", "%{x}"]
    facts["groups"] = [{"name": name, "channels": 16, "kept": 8, "members": 1} for name in names]
    html, _ = report.write(facts, tmp_path)
    browser.show(html, 1280, 900, "light")
    shown = browser.value("[...document.querySelectorAll('#chart-groups .ytick text')].map((t) => t.textContent)")
    assert [text.strip() for text in shown] == names
    for number, name in enumerate(names):
        browser.value(f"Plotly.Fx.hover('chart-groups', [{{curveNumber: 1, pointNumber: {number}}}])")
        browser.wait_for(f"document.querySelector('#chart-groups .hovertext tspan')?.textContent === {json.dumps(name)}")
    assert browser.value("document.querySelectorAll('.chart a, .chart [style*=bold]').length") == 0


@pytest.mark.slow
def test_charts_follow_a_change_of_theme(tmp_path: Path, browser: Browser) -> None:
    html, _ = report.write(full(), tmp_path)
    browser.show(html, 1280, 900, "light")
    bar = "getComputedStyle(document.querySelectorAll('#chart-groups .trace.bars')[1].querySelector('path')).fill"
    light = browser.value(bar)
    assert light.startswith("rgb")
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.wait_for(f"{bar} !== {json.dumps(light)}")


@pytest.mark.slow
def test_charts_follow_the_width_of_their_box(tmp_path: Path, browser: Browser) -> None:
    html, _ = report.write(full(), tmp_path)
    browser.show(html, 1280, 900, "light")
    drawn = "c.querySelector('.main-svg').getAttribute('width')"
    fits = f"[...document.querySelectorAll('.chart')].every((c) => {drawn} === String(c.clientWidth))"
    browser.wait_for(fits)
    wide = browser.value("document.querySelector('.chart').clientWidth")
    browser.value("document.querySelector('main').style.width = '360px'")  # the window stays as wide as it was
    browser.wait_for(f"document.querySelector('.chart').clientWidth < {wide} && {fits}")
