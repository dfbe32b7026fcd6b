"""The report: every fact arrives in both files, nothing from the model is read as markup, and a browser shows it without complaint."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgeprune import report
from edgeprune.errors import UsageError

EVIL = "<script>alert(1)</script>"
PREDICTED = "predicted, not measured: upper end of the 90% interval, profile rpi4-ort"
Facts = dict[str, Any]


def resnet_groups() -> list[Facts]:
    """The 27 removable groups of a ResNet-56: the first conv of every block, three stages of nine."""
    widths = {1: 16, 2: 32, 3: 64}
    return [
        {"name": f"layer{s}.{b}.conv1", "channels": c, "kept": max(8, c - 8 * ((s * b) % (c // 8 + 1))), "members": 4}
        for s, c in widths.items()
        for b in range(9)
    ]


def full() -> Facts:
    """A run of ResNet-56 with everything in it."""
    return {
        "title": "resnet56 for rpi4",
        "edgeprune": "0.1.0",
        "created": "2026-11-21T08:00:00+00:00",
        "command": "edgeprune compress resnet56-4bfd9763.th --model nets.py:resnet56 --data cifar10 --device rpi4 --latency-ms 30 --epochs 12",
        "device": {"name": "rpi4", "profile": "rpi4-ort", "description": "Raspberry Pi 4 Model B, 4 × Cortex-A72", "attached": False},
        "criterion": "nuclear_norm",
        "allocator": "knapsack",
        "round_to": 8,
        "seed": 0,
        "budgets": [
            {"name": "latency_ms", "asked": 30.0, "reached": 29.6, "unit": "ms", "met": True, "how": PREDICTED},
            {
                "name": "macs",
                "asked": 62_742_853.0,
                "reached": 61_480_960.0,
                "unit": "",
                "met": True,
                "how": "counted from the traced operations",
            },
        ],
        "figures": [
            {
                "name": "accuracy",
                "unit": "%",
                "before": {"value": 93.39, "low": None, "high": None},
                "after": {"value": 92.81, "low": None, "high": None},
                "basis": "measured",
                "how": "10,000 validation images, measured with torch",
            },
            {
                "name": "latency",
                "unit": "ms",
                "before": {"value": 55.1, "low": 51.9, "high": 58.4},
                "after": {"value": 28.1, "low": 26.4, "high": 29.6},
                "basis": "predicted",
                "how": PREDICTED,
            },
            {
                "name": "macs",
                "unit": "",
                "before": {"value": 125_485_706, "low": None, "high": None},
                "after": {"value": 61_480_960, "low": None, "high": None},
                "basis": "counted",
                "how": "multiply-accumulates of the traced operations",
            },
            {
                "name": "params",
                "unit": "",
                "before": {"value": 853_018, "low": None, "high": None},
                "after": {"value": 441_226, "low": None, "high": None},
                "basis": "counted",
                "how": "elements of the parameters",
            },
            {
                "name": "size",
                "unit": "bytes",
                "before": {"value": 3_445_120, "low": None, "high": None},
                "after": {"value": 1_790_233, "low": None, "high": None},
                "basis": "measured",
                "how": "bytes of the ONNX file",
            },
            {
                "name": "peak_memory",
                "unit": "bytes",
                "before": {"value": 6_700_000, "low": None, "high": None},
                "after": {"value": 4_410_000, "low": None, "high": None},
                "basis": "predicted",
                "how": "weights plus the largest live activations",
            },
        ],
        "accuracy_steps": [
            {"step": "dense", "accuracy": 0.9339, "images": 10_000},
            {"step": "right after pruning", "accuracy": 0.6412, "images": 10_000},
            {"step": "after BN recalibration", "accuracy": 0.8577, "images": 10_000},
            {"step": "after fine-tuning", "accuracy": 0.9281, "images": 10_000},
        ],
        "groups": resnet_groups(),
        "curve": [
            {
                "epoch": e,
                "train_loss": 0.12 + 0.4 * math.exp(-e / 3),
                "val_loss": 0.27 + 0.2 * math.exp(-e / 4),
                "val_accuracy": 0.93 - 0.05 * math.exp(-e / 3),
                "lr": 0.01 * (1 - e / 13),
                "seconds": 605.0,
            }
            for e in range(1, 13)
        ],
        "rounds": [
            {"round": 1, "predicted_ms": 29.0, "measured_ms": 33.1, "low_ms": 32.5, "high_ms": 33.9, "correction": 1.14},
            {"round": 2, "predicted_ms": 29.4, "measured_ms": 29.6, "low_ms": 29.1, "high_ms": 29.9, "correction": 1.007},
        ],
        "frozen": [
            {"parameter": "fc.weight[0]", "reason": "output of the network"},
            *({"parameter": f"layer{s}.{b}.conv2.weight[0]", "reason": "feeds a residual sum"} for s in (1, 2, 3) for b in range(9)),
            {"parameter": "fc.bias[0]", "reason": "output of the network"},
        ],
        "artifacts": [
            {
                "format": "onnx",
                "path": "model.onnx",
                "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                "size_bytes": 1_790_233,
                "parity_max_abs": 1.1e-6,
                "parity_relative": 1.3e-7,
            },
        ],
        "proof": {"max_relative_error": 2e-15, "samples": 2, "dtype": "float64"},
        "stages": [
            {"name": n, "seconds": s, "cached": n == "trace"}
            for n, s in (("trace", 0.4), ("score", 12.1), ("fine-tune", 7260.0), ("export", 3.2))
        ],
        "environment": {"python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.22.0", "cpu": "2 cores"},
        "preprocessing": {"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616], "size": [32, 32]},
        "notes": ["stripped the prefix module. from 56 keys"],
    }


def large() -> Facts:
    """500 groups, long names."""
    groups = [
        {
            "name": f"backbone.features.stage_{i // 50}.block_{i % 50}.depthwise_separable.conv",
            "channels": 64 + 64 * (i // 100),
            "kept": 8 + (i * 37) % 56,
            "members": 3,
        }
        for i in range(500)
    ]
    return full() | {"title": "a network of 500 groups", "groups": groups}


def minimal() -> Facts:
    """No data, no board, no training: most lists empty, most values None."""
    empty: Facts = {name: [] for name in ("accuracy_steps", "groups", "curve", "rounds", "frozen", "artifacts", "stages", "notes")}
    nothing = {"value": None, "low": None, "high": None}
    return empty | {
        "title": "net", "edgeprune": "0.1.0", "created": "2026-11-21T08:00:00+00:00", "command": None,
        "device": {"name": "host", "profile": None, "description": None, "attached": True},
        "criterion": None, "allocator": None, "round_to": None, "seed": None,
        "budgets": [{"name": "macs", "asked": 5e6, "reached": None, "unit": "", "met": None, "how": None}],
        "figures": [{"name": "accuracy", "unit": "%", "before": None, "after": nothing, "basis": None, "how": None}],
        "proof": None, "environment": {}, "preprocessing": None,
    }  # fmt: skip


def hostile() -> Facts:
    """Markup wherever the model, its data or its files can put a name."""

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                k: (v if k in ("name", "unit", "basis") and "before" in value or k in ("asked", "unit") else poison(v))
                for k, v in value.items()
            }
        if isinstance(value, list):
            return [poison(v) for v in value]
        return f"{EVIL}<b>|`*_{value}" if isinstance(value, str) else value

    poisoned: Facts = poison(full())
    for budget, clean in zip(poisoned["budgets"], full()["budgets"], strict=True):
        budget["name"] = clean["name"]
    poisoned["environment"][EVIL] = "<img src=x onerror=alert(2)>"
    poisoned["groups"][0]["name"] = '</script><a href="javascript:alert(3)">%{x} &lt;b&gt;'
    return poisoned


class Page(HTMLParser):
    """Tags with their attributes, visible text, and the scripts' contents."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def charts(self) -> Facts:
        loaded: Facts = json.loads(self.scripts[0])
        return loaded


def written(facts: Facts, folder: Path) -> tuple[Page, str]:
    html, markdown = report.write(facts, folder)
    return Page(html.read_text(encoding="utf-8")), markdown.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (125_485_706, "", "125.5 M"), (853_018, "", "853.0 k"), (999_990, "", "1 M"), (512, "", "512"), (1.2e9, "MACs", "1.2 G MACs"),
        (3_412_000, "bytes", "3.4 MB"), (999, "bytes", "999 B"), (29.6, "ms", "29.6 ms"), (30.0, "ms", "30 ms"), (1250.25, "ms", "1,250.2 ms"),
        (0.4213, "ms", "0.421 ms"), (93.39, "%", "93.39%"), (0, "", "0"), (None, "ms", "not given"), (True, "", "not given"),
    ],
)  # fmt: skip
def test_quantity(value: object, unit: str, words: str) -> None:
    assert report.quantity(value, unit) == words


def test_change_is_percent_or_points_and_empty_without_both() -> None:
    assert report.change(55.1, 28.1, "ms") == "−49%"
    assert report.change(100, 99, "") == "−1.0%"
    assert report.change(93.39, 92.81, "%") == "−0.58 points"
    assert report.change(0.0, 10.0, "%") == "+10.00 points"
    assert [report.change(*pair) for pair in ((None, 1), (1, None), (0, 5))] == ["", "", ""]


def test_duration() -> None:
    assert [report.duration(s) for s in (0.4, 59, 605.0, 12_000, None)] == ["0.4 s", "59 s", "10 min 5 s", "3 h 20 min", "not given"]


def test_headline_says_asked_reached_and_how_sure() -> None:
    assert report.headline(full()) == (
        "Asked for latency of at most 30 ms and MACs of at most 62.7 M; reached 29.6 ms (predicted, not measured) and 61.5 M (counted). "
        "Accuracy went from 93.39% to 92.81%."
    )


def test_headline_owns_up_to_a_missed_budget() -> None:
    facts = full()
    facts["budgets"] = [facts["budgets"][0] | {"reached": 33.1, "met": False}]
    assert "reached 33.1 ms (predicted, not measured), which misses the budget." in report.headline(facts)


def test_headline_without_data_or_budget() -> None:
    assert report.headline({"budgets": [], "figures": []}) == "No budget was asked for. Accuracy is not given."


def test_every_fact_is_in_both_files(tmp_path: Path) -> None:
    page, markdown = written(full(), tmp_path)
    plain = re.sub(r"\\(.)", r"\1", markdown)
    for fact in (
        "resnet56 for rpi4", "29.6 ms", "125.5 M", "61.5 M", "853.0 k", "3.4 MB", "−49%", "93.39%", "92.81%", "64.12%", "85.77%", "−0.58 points",
        "26.4 ms to 29.6 ms", "layer3.8.conv1", "33.1 ms", "32.5 ms to 33.9 ms", "fc.weight[0]", "Output of the network", "9f86d081884c7d65", "1.1e-06",
        "1.3e-07", "2.0e-15", "float64", "10,000 validation images, measured with torch", PREDICTED, "2 h 1 min", "10 min 5 s", "onnxruntime", "1.22.0",
        "0.4914, 0.4822, 0.4465", "stripped the prefix module. from 56 keys", "--latency-ms 30 --epochs 12", "nuclear_norm", "knapsack",
        "Raspberry Pi 4 Model B", report.headline(full()),
    ):  # fmt: skip
        assert fact in page.text, f"{fact} is not in report.html"
        assert fact in plain, f"{fact} is not in report.md"


def test_every_predicted_figure_wears_its_badge(tmp_path: Path) -> None:
    page, _ = written(full(), tmp_path)
    badges = [attrs.get("class") for tag, attrs in page.tags if tag == "span" and "badge" in (attrs.get("class") or "")]
    # the verdict, the latency budget, two cards (latency, memory), and the same two in the evidence table
    assert badges.count("badge predicted") == 6


def test_the_page_is_one_small_file_that_asks_nobody(tmp_path: Path) -> None:
    page, _ = written(large(), tmp_path)
    assert (tmp_path / "report.html").stat().st_size <= 6_000_000
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "action", "srcset")]
    assert links and all(link and link.startswith(("#", "data:")) for link in links)


@pytest.mark.parametrize("make", [full, large, minimal, hostile])
def test_nothing_from_the_model_is_markup(tmp_path: Path, make: Any) -> None:
    page, markdown = written(make(), tmp_path)
    tags = [tag for tag, _ in page.tags]
    assert (tags.count("script"), tags.count("img"), len(page.scripts)) == (3, 0, 3)
    assert {attrs.get("nonce") for tag, attrs in page.tags if tag == "script"} != {None}
    assert page.charts["groups"] == make()["groups"]
    outside_code = re.sub(r"(?<!\\)(`+).*?(?<!`)\1(?!`)|^    .*$", "", markdown, flags=re.M)
    assert not re.search(r"(?<!\\)<", outside_code)


def test_a_name_cannot_break_a_markdown_table(tmp_path: Path) -> None:
    _, markdown = written(hostile(), tmp_path)
    _, calm = written(full(), tmp_path)
    columns = [[len(re.findall(r"(?<!\\)\|", row)) for row in text.splitlines() if row.startswith("|")] for text in (markdown, calm)]
    assert columns[0] == columns[1]


def test_minimal_says_not_given_and_drops_the_empty_sections(tmp_path: Path) -> None:
    page, markdown = written(minimal(), tmp_path)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert ids == {"content", "facts", "budgets", "figures", "evidence"}
    assert "not given" in page.text and "None" not in page.text
    assert "not given" in markdown and "None" not in markdown and "## Widths" not in markdown


def test_an_empty_result_object_still_gives_a_page(tmp_path: Path) -> None:
    page, _ = written({"title": "net", "edgeprune": "0.1.0"}, tmp_path)
    assert "No budget was asked for." in page.text


def test_a_diverged_loss_is_null_in_the_chart_data(tmp_path: Path) -> None:
    facts = full()
    facts["curve"][0]["train_loss"] = math.nan
    facts["curve"][1]["val_loss"] = math.inf
    page, _ = written(facts, tmp_path)
    assert (page.charts["curve"][0]["train_loss"], page.charts["curve"][1]["val_loss"]) == (None, None)


def test_a_file_name_that_is_not_unicode_is_written(tmp_path: Path) -> None:
    facts = full()
    facts["artifacts"][0]["path"] = facts["groups"][0]["name"] = os.fsdecode(b"caf\xe9.onnx")
    page, _ = written(facts, tmp_path)
    assert "caf\\udce9.onnx" in page.text


def test_writing_again_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    first = report.write(full(), folder)
    assert report.write(minimal(), folder) == first == (folder / "report.html", folder / "report.md")
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.md"]
    assert "# net" in first[1].read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_written_to_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UsageError, match="taken"):
        report.write(full(), tmp_path / "taken")


def test_an_older_report_survives_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    html, markdown = report.write(full(), tmp_path)
    before = html.read_bytes(), markdown.read_bytes()
    real = Path.write_text

    def full_disk(self: Path, text: str, *args: Any, **options: Any) -> int:
        if "report.md" in self.name:
            raise OSError(28, "No space left on device")
        return real(self, text, *args, **options)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UsageError, match="No space left"):
        report.write(minimal(), tmp_path)
    assert (html.read_bytes(), markdown.read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]


class Browser:
    """Headless Chromium spoken to over a pipe (DevTools protocol, messages end with a zero byte): no extra package, no port."""

    def __init__(self, program: str, profile: Path) -> None:
        self.events: list[Facts] = []
        self.number = 0
        (to_read, self.to), (self.back, back_write) = os.pipe(), os.pipe()
        switches = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        switches += ["--disable-sync", "--disable-quic", "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        handles = f'exec 3<&{to_read} 4>&{back_write}; exec "$0" "$@"'
        command = ["bash", "-c", handles, program, *switches]
        self.process = subprocess.Popen(command, pass_fds=(to_read, back_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read), os.close(back_write)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session: str | None = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    session = None

    def call(self, method: str, **params: Any) -> Facts:
        self.number += 1
        where = {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps({"id": self.number, "method": method, "params": params} | where).encode() + b"\0")
        while True:
            message = self.receive()
            if message.get("id") == self.number:
                assert "error" not in message, message
                result: Facts = message["result"]
                return result
            self.events.append(message)

    def receive(self) -> Facts:
        text = b""
        while not text.endswith(b"\0"):
            piece = os.read(self.back, 1)
            assert piece, "the browser went away"
            text += piece
        message: Facts = json.loads(text[:-1])
        return message

    def show(self, page: Path, width: int, height: int, theme: str) -> None:
        self.events.clear()
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Page.navigate", url=page.as_uri())
        while not self.value("document.readyState === 'complete' && !!window.Plotly"):
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to), os.close(self.back)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine: install the chromium package to look at the report in a browser")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("make", [full, large, minimal, hostile])
def test_a_browser_shows_it_without_complaint(tmp_path: Path, browser: Browser, make: Any, width: int, theme: str) -> None:
    html, _ = report.write(make(), tmp_path)
    browser.show(html, width, 900, theme)
    browser.value("document.querySelectorAll('details').forEach((d) => d.open = true)")
    assert browser.value("document.documentElement.scrollWidth") == width
    charts = 0 if make is minimal else 5
    assert browser.value("document.querySelectorAll('.chart').length") == charts
    assert browser.value("document.querySelectorAll('.chart .main-svg .trace').length") >= charts
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
    names = ["<b>bold</b>", '<a href="https://example.org">x</a>', EVIL, "&lt;i&gt;", "%{x}"]
    facts["groups"] = [{"name": name, "channels": 16, "kept": 8, "members": 1} for name in names]
    html, _ = report.write(facts, tmp_path)
    browser.show(html, 1280, 900, "light")
    shown = browser.value("[...document.querySelectorAll('#chart-groups .ytick text')].map((t) => t.textContent)")
    assert [text.strip() for text in shown] == names
    assert browser.value("document.querySelectorAll('#chart-groups .ytick a, #chart-groups .ytick [style*=bold]').length") == 0


@pytest.mark.slow
def test_charts_follow_a_change_of_theme(tmp_path: Path, browser: Browser) -> None:
    html, _ = report.write(full(), tmp_path)
    browser.show(html, 1280, 900, "light")
    bar = "getComputedStyle(document.querySelectorAll('#chart-groups .trace.bars')[1].querySelector('path')).fill"
    light = browser.value(bar)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.value("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
    assert light and browser.value(bar) not in (None, light)
