"""The report: every fact arrives in both files, and nothing from the model is read as markup."""

from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgeprune import report
from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.report import MINUS
from tests.report.report_samples import PREDICTED, Facts, full, hostile, large, minimal


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
        (125_485_706, "", "125.5 M"), (853_018, "", "853.0 k"), (999_990, "", "1 M"), (512, "", "512"),
        (1.2e9, "MACs", "1.20 G MACs"),
        (3_412_000, "bytes", "3.41 MB"), (999, "bytes", "999 B"), (29.6, "ms", "29.6 ms"), (30.0, "ms", "30 ms"),
        (1250.25, "ms", "1,250.2 ms"),
        (0.4213, "ms", "0.421 ms"), (93.39, "%", "93.39%"), (0, "", "0"), (None, "ms", "not given"), (True, "", "not given"),
    ],
)  # fmt: skip
def test_quantity(value: object, unit: str, words: str) -> None:
    assert report.quantity(value, unit) == words


def test_exact_figures_tell_a_kept_limit_from_a_missed_one() -> None:
    assert [report.exact(24_293_888, ""), report.exact(1_234_567, "bytes")] == ["24,293,888", "1,234,567 bytes"]
    assert report.exact(29.9871, "ms") != report.exact(29.9872, "ms")
    assert report.exact(0.5) == "0.5"


def test_change_is_percent_or_points_and_empty_without_both() -> None:
    assert report.change(55.1, 28.1, "ms") == f"{MINUS}49%"
    assert report.change(100, 99, "") == f"{MINUS}1.0%"
    assert report.change(93.39, 92.81, "%") == f"{MINUS}0.58 points"
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
        "resnet56 for rpi4", "29.6 ms", "125.5 M", "61.5 M", "853.0 k", "3.45 MB", f"{MINUS}49%", "93.39%", "92.81%",
        "64.12%", "85.77%", f"{MINUS}0.58 points",
        "26.4 ms to 29.6 ms", "layer3.8.conv1", "layer2.0.conv2", "conv3x3", "1.25 ms", "0.625 ms", "1.18 M",
        "Bits, layer by layer", "Power and temperature",
        "33.1 ms", "32.5 ms to 33.9 ms", "fc.weight[0]", "Output of the network", "9f86d081884c7d65", "1.1e-06",
        "1.3e-07", "2.0e-15", "float64",
        "10,000 validation images, measured with torch", PREDICTED, "2 h 1 min", "10 min 5 s", "onnxruntime", "1.22.0",
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
    with pytest.raises(EdgepruneError, match="no space left") as error:
        report.write(minimal(), tmp_path)
    assert error.value.exit_code == 1
    assert (html.read_bytes(), markdown.read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]
