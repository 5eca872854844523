"""`compare` and `report`: results from disk, judged and written up again."""

import json
from collections.abc import Sequence
from pathlib import Path

from hasten.bench.pick import Decision, Gate, decide
from hasten.bench.result import BenchResult, read_result
from hasten.bench.served import Served
from hasten.config import from_mapping
from hasten.errors import ResultError
from hasten.pipeline.config import ReportConfig
from hasten.pipeline.run_folder import RunFolder
from hasten.report.compare import Row, comparison_rows
from hasten.report.savings import Prices
from hasten.report.write import ReportFiles, write_report


def read_results(paths: Sequence[Path]) -> list[BenchResult]:
    """The results in files and run folders, in the order given; a run's baseline comes first.

    Raises:
        ResultError: a path holds no result.
    """
    results: list[BenchResult] = []
    for path in paths:
        found = [read_result(path)] if path.is_file() else _results_of_run(path)
        if not found:
            raise ResultError(f"{path} holds no results: give a result file or a run folder of hasten optimize")
        results += found
    return results


def served_of(path: Path) -> Served | None:
    """What was measured behind a server in a run folder; None for anything else."""
    run = RunFolder(path)
    return run.read_served() if run.plan_path.is_file() else None


def compare(paths: Sequence[Path]) -> list[Row]:
    """The results in files and run folders side by side; the first is the reference.

    Raises:
        ResultError: a path holds no result.
    """
    return comparison_rows(read_results(paths))


def report(config: ReportConfig) -> ReportFiles:
    """Writes the report of a run folder, or of result files, of which the first is the baseline.

    Raises:
        ResultError: there is nothing to report on.
    """
    results = read_results(config.results)
    run = RunFolder(config.results[0])
    baseline, gate = results[0].candidate.name, Gate()
    out = config.output or Path("report")
    if run.plan_path.is_file():
        gate = from_mapping(Gate, read_plan(run)["gate"], str(run.plan_path))
        out = config.output or run.path
    decision: Decision = decide(results, baseline, gate)
    prices = Prices(config.price_per_hour, load_tokens_per_s=config.load)
    return write_report(results, decision, out, prices, served_of(run.path))


def read_plan(run: RunFolder) -> dict[str, dict[str, object]]:
    """plan.json of a run folder.

    Raises:
        ResultError: it is not as `optimize` wrote it.
    """
    try:
        plan = json.loads(run.plan_path.read_text())
        if not isinstance(plan["gate"], dict) or not isinstance(plan["plan"]["baseline"], str):
            raise ValueError("gate or baseline have the wrong type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultError(f"{run.plan_path} cannot be read: run hasten optimize again") from error
    return plan


def _results_of_run(path: Path) -> list[BenchResult]:
    run = RunFolder(path)
    if not run.plan_path.is_file():
        return run.results()
    baseline = read_plan(run)["plan"]["baseline"]
    return sorted(run.results(), key=lambda result: result.candidate.name != baseline)
