from dataclasses import replace

import pytest
import synthetic_results

from hasten.bench.metrics import Spread
from hasten.bench.pick import Decision, Gate, decide
from hasten.bench.result import BenchResult
from hasten.errors import UsageError
from hasten.report.columns import load_columns, table_columns
from hasten.report.compare import caveats, compared, comparison_rows


def test_rows_keep_the_order_and_know_their_role(nine: list[BenchResult], decision: Decision) -> None:
    rows = comparison_rows(nine, decision)
    assert [row.label for row in rows] == [result.candidate.name for result in nine]
    assert rows[0].role == "baseline"
    assert [row.label for row in rows if row.role == "recommended"] == [decision.pick]


def test_ratios_are_against_the_baseline_at_each_concurrency(nine: list[BenchResult], decision: Decision) -> None:
    baseline, *others = comparison_rows(nine, decision)
    assert baseline.throughput_ratios == {}
    row = others[0]
    for level in (1, 2, 4, 8):
        ours, theirs = row.speed_at(level), baseline.speed_at(level)
        expected = ours.output_throughput_per_s.median / theirs.output_throughput_per_s.median
        assert row.throughput_ratios[level].value == pytest.approx(expected)
        assert row.ttft_ratios[level].value == pytest.approx(theirs.ttft_spread_s.median / ours.ttft_spread_s.median)


def test_overlapping_spreads_are_a_tie() -> None:
    assert compared(Spread(12, 9, 15, 10), Spread(10, 8, 11, 10), higher_is_better=True).is_claimed is False
    assert compared(Spread(20, 19, 21, 10), Spread(10, 8, 11, 10), higher_is_better=True).is_claimed is True
    assert compared(Spread(20, 19, 21, 2), Spread(10, 8, 11, 10), higher_is_better=True).is_claimed is False
    assert compared(Spread(20, 19, 21, 2), Spread(10, 8, 11, 10), higher_is_better=True).mark == "few runs"
    assert compared(Spread(12, 9, 15, 10), Spread(10, 8, 11, 10), higher_is_better=True).text == "tie"
    assert compared(Spread(5, 5, 5, 10), Spread(10, 10, 10, 10)).value == 2.0
    assert compared(Spread(0, 0, 0, 10), Spread(10, 10, 10, 10)) is None


def test_the_first_result_is_the_reference_without_a_decision(nine: list[BenchResult]) -> None:
    rows = comparison_rows(nine[3:5])
    assert [row.role for row in rows] == ["baseline", "candidate"]
    assert rows[1].throughput_ratios[1].value > 1


def test_equal_names_are_numbered() -> None:
    one = synthetic_results.result()
    assert [row.label for row in comparison_rows([one, one])] == ["native-w8a16 #1", "native-w8a16 #2"]
    assert [row.label for row in comparison_rows([one, one], labels=["before", "after"])] == ["before", "after"]


def test_mistakes_are_usage_errors(nine: list[BenchResult], decision: Decision) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        comparison_rows([])
    with pytest.raises(UsageError, match="2 labels for 9 results"):
        comparison_rows(nine, labels=["a", "b"])
    with pytest.raises(UsageError, match="no result for the baseline 'transformers-fp32'"):
        comparison_rows(nine[1:], decision)


def test_caveats_name_what_differs(nine: list[BenchResult]) -> None:
    assert caveats(nine) == ()
    other = replace(nine[1], environment=replace(nine[1].environment, hostname_hash="ffffff"))
    assert [text for text in caveats([nine[0], other]) if "different machines" in text]


def test_every_column_gives_text_for_every_row(nine: list[BenchResult], decision: Decision) -> None:
    rows = comparison_rows(nine, decision)
    columns = table_columns(rows, 1)
    assert len({column.key for column in columns}) == len(columns)
    for row in rows:
        for column in (*columns, *load_columns(8)):
            cell = column.cell(row)
            assert cell.is_measured, (row.label, column.key)
            assert "nan" not in cell.text


def test_the_speedup_column_is_the_verdict(nine: list[BenchResult], decision: Decision) -> None:
    rows = comparison_rows(nine, decision)
    speedup = next(column for column in table_columns(rows, 1) if column.key == "speedup")
    verdicts = {verdict.candidate: verdict for verdict in decision.verdicts}
    for row in rows[1:]:
        assert speedup.cell(row).value == verdicts[row.label].speedup


def test_a_slower_candidate_is_no_tie(nine: list[BenchResult]) -> None:
    faster, slower = nine[4], nine[0]
    rows = comparison_rows([faster, slower], decide([faster, slower], faster.candidate.name, Gate()))
    speedup = next(column for column in table_columns(rows, 1) if column.key == "speedup")
    assert speedup.cell(rows[1]).value < 1
    assert speedup.cell(rows[1]).detail == ""


def test_a_tie_is_printed_as_a_tie() -> None:
    baseline, other = synthetic_results.result("native", "fp32"), synthetic_results.result("native", "bf16")
    same = replace(other, runs=baseline.runs)
    decision = decide([baseline, same], "native-fp32", Gate())
    rows = comparison_rows([baseline, same], decision)
    speedup = next(column for column in table_columns(rows, 1) if column.key == "speedup")
    assert (speedup.cell(rows[1]).text, speedup.cell(rows[1]).detail) == ("1.00×", "tie")


def test_what_is_missing_says_why() -> None:
    results = synthetic_results.partial_results()
    rows = {row.label: row for row in comparison_rows(results)}
    columns = {column.key: column for column in table_columns(list(rows.values()), 1)}
    failed = columns["tokens_per_s_1"].cell(rows["onnxruntime-w4a16"])
    assert (failed.text, failed.note) == (
        "not measured",
        "the candidate failed: the process ended with code -9 (out of memory)",
    )
    assert columns["tokens_per_s_8"].cell(rows["native-fp32"]).note == "80 requests failed"
    assert columns["kl"].cell(rows["native-bf16"]).note == "the held-out text is too short"
    assert columns["tpot_p50"].cell(rows["llama_cpp-w8a16"]).note == "a single output token has no gap"
    assert columns["disk"].cell(rows["native-w8a16"]).note == "no reason was recorded"
