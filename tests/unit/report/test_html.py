import re
from html.parser import HTMLParser

import pytest
import synthetic_results

from hasten.bench.pick import Gate, decide
from hasten.bench.result import BenchResult
from hasten.report.glossary import GLOSSARY
from hasten.report.html import render_html
from hasten.report.savings import Prices
from hasten.report.view import ReportView, report_view

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects tags, text and attributes; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def html(view: ReportView) -> str:
    return render_html(view)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_is_well_formed(page: Page) -> None:
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_nothing_is_loaded_from_elsewhere(html: str, page: Page) -> None:
    assert not re.search(r"https?://|@import|url\(", html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")


def test_links_lead_to_sections_in_the_stated_order(page: Page) -> None:
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    links = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
    assert links == sections
    assert sections[:3] == ["numbers", "candidates", "charts"]


def test_the_verdict_is_the_headline(page: Page, view: ReportView) -> None:
    assert view.verdict.startswith("Recommended: native-w8a16, 4.")
    assert view.verdict in page.words


def test_every_candidate_its_command_and_verdict_are_there(page: Page, view: ReportView) -> None:
    for row in view.rows:
        assert row.label in page.words
        assert row.result.command in page.words
        if row.role == "candidate":
            assert row.verdict.reason in page.words


def test_numbers_have_units(page: Page, view: ReportView) -> None:
    focus = view.focus.speed_at(1)
    assert f"{focus.output_throughput_per_s.median:.1f} tokens/s" in page.words
    assert f"{focus.ttft_s.p50 * 1e3:.0f} ms" in page.words
    for unit in ("MiB", "nats/token", "GB/s", "EUR"):
        assert unit in page.words
    assert not re.search(r"\b(nan|None|inf)\b", page.words)


def test_every_chart_has_a_description_and_is_drawn(page: Page) -> None:
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 10
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in charts)


def test_tables_have_headers_and_sortable_values(page: Page) -> None:
    headers = [attributes for tag, attributes in page.tags if tag == "th"]
    assert all("scope" in attributes for attributes in headers)
    values = [attributes["data-value"] for tag, attributes in page.tags if tag == "td" and "data-value" in attributes]
    assert values
    assert all(value == "" or float(value) == float(value) for value in values)


def test_every_term_is_explained(page: Page) -> None:
    for term, meaning in GLOSSARY:
        assert term in page.words
        assert meaning in page.words


def test_hostile_names_stay_text() -> None:
    results = synthetic_results.partial_results()
    page = Page(render_html(report_view(results, decide(results, "transformers-fp32", Gate()), Prices())))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert synthetic_results.HOSTILE in page.words


def partial_cases() -> dict[str, list[BenchResult]]:
    baseline = synthetic_results.result("transformers", "fp32")
    return {
        "failures": synthetic_results.partial_results(),
        "baseline alone": [baseline],
        "one concurrency": [
            synthetic_results.result("transformers", "fp32", concurrency=(4,)),
            synthetic_results.result("native", "bf16", concurrency=(4,), with_profile=False),
        ],
        "one run": [
            synthetic_results.result("transformers", "fp32", num_runs=1),
            synthetic_results.result("native", "bf16", num_runs=1),
        ],
        "failed baseline": [synthetic_results.failed(baseline), synthetic_results.result("native", "bf16")],
        "all failed": [
            synthetic_results.failed(baseline),
            synthetic_results.failed(synthetic_results.result("native", "bf16")),
        ],
    }


@pytest.mark.parametrize("case", partial_cases())
def test_partial_results_are_reported_without_nan(case: str) -> None:
    results = partial_cases()[case]
    view = report_view(results, decide(results, "transformers-fp32", Gate()), Prices(1.0))
    page = Page(render_html(view))
    assert page.open == []
    assert not re.search(r"\b(nan|None|inf)\b", page.words)
    assert view.verdict in page.words
    for problem in view.problems:
        assert " ".join(problem.reason.split()) in page.words
