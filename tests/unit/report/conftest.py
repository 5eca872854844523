from pathlib import Path

import pytest
import synthetic_results

from hasten.bench.pick import Decision, Gate, decide
from hasten.bench.result import BenchResult
from hasten.report.savings import Prices
from hasten.report.view import ReportView, report_view
from hasten.report.write import ReportFiles, write_report


@pytest.fixture(scope="session")
def nine() -> list[BenchResult]:
    return synthetic_results.nine_results()


@pytest.fixture(scope="session")
def decision(nine: list[BenchResult]) -> Decision:
    return decide(nine, "transformers-fp32", Gate())


@pytest.fixture(scope="session")
def view(nine: list[BenchResult], decision: Decision) -> ReportView:
    return report_view(nine, decision, Prices(0.35, "EUR"))


@pytest.fixture(scope="session")
def files(nine: list[BenchResult], decision: Decision, tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    """The whole report of nine candidates, written once."""
    out: Path = tmp_path_factory.mktemp("report")
    return write_report(nine, decision, out, Prices(0.35, "EUR"))
