import re
from pathlib import Path

import synthetic_results

from hasten.bench.pick import Gate, decide
from hasten.report.markdown import code_block, escape, render_markdown
from hasten.report.savings import Prices
from hasten.report.view import ReportView, report_view
from hasten.report.write import ReportFiles


def tables(text: str) -> list[list[str]]:
    """The lines of each table."""
    found: list[list[str]] = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith("|"):
            found.append(lines)
    return found


def num_cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def assert_well_formed(text: str) -> None:
    assert tables(text)
    for lines in tables(text):
        assert re.fullmatch(r"\|( -{3}:? \|)+", lines[1])
        assert {num_cells(line) for line in lines} == {num_cells(lines[1])}


def test_tables_are_well_formed(view: ReportView) -> None:
    assert_well_formed(render_markdown(view, []))


def test_hostile_text_breaks_no_table() -> None:
    results = synthetic_results.partial_results()
    text = render_markdown(report_view(results, decide(results, "transformers-fp32", Gate()), Prices()), [])
    assert_well_formed(text)
    assert "<script>" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\\<", "")


def test_plots_are_linked_and_exist(files: ReportFiles) -> None:
    text = files.markdown.read_text(encoding="utf-8")
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(links) == 5
    assert all((files.markdown.parent / Path(link)).is_file() for link in links)


def test_every_candidate_and_command_is_there(view: ReportView) -> None:
    text = render_markdown(view, [])
    for row in view.rows:
        assert row.label in text
        assert row.result.command in text


def test_escape_leaves_no_markup() -> None:
    assert escape("a|b\n*c*") == r"a\|b \*c\*"


def test_a_code_block_outlasts_its_backticks() -> None:
    assert code_block("a ``` b").startswith("````sh\n")
