"""The served engine in a report: beside itself without a server, in words, tables and pictures."""

import json
from dataclasses import replace

import pytest
import synthetic_results

from hasten.bench.pick import Decision
from hasten.bench.result import BenchResult
from hasten.bench.served import Served
from hasten.cli import terminal
from hasten.report.charts import all_charts
from hasten.report.html import render_html
from hasten.report.markdown import render_markdown
from hasten.report.savings import Prices
from hasten.report.served import served_columns, served_finding, served_row
from hasten.report.view import ReportView, report_view

OFFLINE = synthetic_results.result("native", "w8a16")
SERVED = synthetic_results.served(OFFLINE, 0.9)
NO_ANSWER = replace(SERVED.over_http, runs=(), memory=None, missing={}, failure="the server was killed by SIGKILL")
FAILED = Served(NO_ANSWER, OFFLINE)


@pytest.fixture(scope="module")
def served_view(nine: list[BenchResult], decision: Decision) -> ReportView:
    return report_view(nine, decision, Prices(), SERVED)


def test_the_share_is_of_the_same_candidate_without_a_server() -> None:
    row = served_row(SERVED)
    assert row is not None
    cells = {column.key: column.cell(row) for column in served_columns(8)}
    assert cells["of_offline"].value == pytest.approx(0.9)
    assert cells["of_offline"].text == "90"
    rate, requests = cells["tokens_per_s"].value, cells["requests_per_s"].value
    assert rate is not None and requests is not None
    assert rate / requests == pytest.approx(16)  # tokens of each request
    assert served_finding(row).startswith("native-w8a16 served over HTTP: ")
    assert served_finding(row).endswith(" output tokens/s at concurrency 8, 90 % of its speed without a server")


def test_a_share_within_the_spread_says_so() -> None:
    row = served_row(synthetic_results.served(OFFLINE, 0.999))
    assert row is not None
    assert next(column for column in served_columns(1) if column.key == "of_offline").cell(row).detail == "tie"
    assert served_finding(row).endswith(" of its speed without a server, within the spread")


def test_nothing_served_is_nothing_reported(view: ReportView) -> None:
    assert served_row(None) is None
    assert "Served over HTTP" not in render_html(view) + render_markdown(view, [])


def test_page_and_markdown_have_a_row_for_each_concurrency(served_view: ReportView) -> None:
    assert served_view.served is not None
    page, text = render_html(served_view), render_markdown(served_view, [])
    assert '<a href="#served">' in page
    section = page[page.index('id="served"') : page.index('id="charts"')]
    assert section.count("<tr") == 2 + 4
    table = text[text.index("## Served over HTTP") : text.index("hasten serve runs/qwen")]
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:] == list("1248")
    for rendered in (section, table):
        assert served_finding(served_view.served) in rendered
        assert "90" in rendered and "nan" not in rendered


def test_its_line_has_the_colour_of_its_candidate_in_hollow_marks(served_view: ReportView, view: ReportView) -> None:
    def scaling(of: ReportView) -> str:
        return next(str(chart.svg) for chart in all_charts(of) if chart.title == "Throughput over concurrency")

    index = next(index for index, row in enumerate(served_view.rows) if row.label == "native-w8a16")
    assert scaling(served_view).count(f"marker k{index} hollow") == 4
    assert "native-w8a16 served" in scaling(served_view)
    assert "hollow" not in scaling(view)


def test_a_server_that_failed_is_said_in_a_sentence(nine: list[BenchResult], decision: Decision) -> None:
    view = report_view(nine, decision, Prices(), FAILED)
    sentence = "native-w8a16 was not measured behind a server: the server was killed by SIGKILL"
    assert sentence in render_html(view)
    assert [problem.label for problem in view.problems if "SIGKILL" in problem.reason] == ["native-w8a16 served"]


def test_the_terminal_has_a_table_and_json(
    nine: list[BenchResult], decision: Decision, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.print_comparison(nine, decision, SERVED)
    printed = capsys.readouterr().out
    assert "native-w8a16 served" in [line.strip() for line in printed.splitlines()]
    assert "90 % of its speed without a server" in printed
    terminal.print_comparison(nine, decision, SERVED, as_json=True)
    served = json.loads(capsys.readouterr().out)["served"]
    assert (served["candidate"], served["failure"]) == ("native-w8a16", None)
    assert [load["concurrency"] for load in served["loads"]] == [1, 2, 4, 8]
    assert served["loads"][3]["of_offline"] == pytest.approx(0.9)
