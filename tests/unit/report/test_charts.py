from dataclasses import replace

import synthetic_results

from hasten.bench.pick import Gate, decide
from hasten.bench.result import OperatorTime, ProfileResult
from hasten.report.charts import SMALL_GROUPS, all_charts, profile_groups
from hasten.report.compare import comparison_rows
from hasten.report.savings import Prices
from hasten.report.svg import tag
from hasten.report.view import ReportView, report_view


def test_small_groups_are_drawn_as_one_and_no_time_is_lost() -> None:
    operators = tuple(OperatorTime(f"group {index}", (12 - index) * 1e-3, 1.0) for index in range(12))
    step_s = sum(operator.time_s for operator in operators) + 5e-3
    profile = ProfileResult(step_s, (*operators, OperatorTime("outside operators", 5e-3, 0.0)), "")
    results = [replace(synthetic_results.result("transformers", "fp32"), profile=profile)]
    groups = profile_groups(comparison_rows(results))
    assert groups == [*(f"group {index}" for index in range(7)), SMALL_GROUPS, "outside operators"]
    view = report_view(results, decide(results, "transformers-fp32", Gate()), Prices())
    chart = all_charts(view)[-1]
    assert [entry.text for entry in chart.legend] == groups
    assert "smaller groups: 15.0 ms" in str(chart.svg)


def test_each_chart_says_its_finding(view: ReportView) -> None:
    findings = [chart.finding for chart in all_charts(view)]
    assert findings[0] == "native-w8a16: 21.1 output tokens/s at concurrency 1, 4.03× transformers-fp32"
    assert "nan" not in " ".join(findings)


def test_charts_without_data_say_so() -> None:
    results = [synthetic_results.failed(synthetic_results.result("transformers", "fp32"))]
    view = report_view(results, decide(results, "transformers-fp32", Gate()), Prices())
    charts = {chart.title: chart for chart in all_charts(view)}
    assert charts["Throughput over concurrency"].svg is None
    assert "not measured" in str(charts["Time to first token, concurrency 1"].svg)


def test_a_tag_escapes_children_and_attributes() -> None:
    assert str(tag("text", "<b>", data_tip='"&')) == '<text data-tip="&#34;&amp;">&lt;b&gt;</text>'
