"""The candidates' results of one run so far, on disk and here, and what of each is still to be measured.

The baseline is loaded in every group of the plan; the rounds of its runs are counted on from group to group.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from hasten.bench.result import BenchResult
from hasten.bench.workload import PlannedRun
from hasten.pipeline.describe import bench_arguments, blank_result
from hasten.pipeline.plan import PlannedCandidate
from hasten.pipeline.prepare_plan import PreparedPlan
from hasten.pipeline.run_folder import RunFolder


class RunResults(Mapping[str, BenchResult]):
    """Results by candidate, in the order of the plan.

    Args:
        runs: the planned runs of one group.
        folder: where an interrupted run left results, and where these are written.
    """

    def __init__(self, prepared: PreparedPlan, runs: tuple[PlannedRun, ...], folder: RunFolder) -> None:
        self._prepared = prepared
        self._runs = runs
        self._folder = folder
        self._planned = {cost.candidate.name: cost for cost in prepared.plan.candidates}
        self._results = {name: self._known_or_blank(cost) for name, cost in self._planned.items()}

    def __getitem__(self, name: str) -> BenchResult:
        return self._results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def update(self, name: str, **changes: Any) -> None:
        """Changes fields of a result, and writes it."""
        self._results[name] = dataclasses.replace(self._results[name], **changes)
        self._folder.write_result(self._results[name])

    @property
    def is_quality_missing(self) -> bool:
        """Whether any candidate that works has not been scored."""
        return any(result.quality is None and result.failure is None for result in self.values())

    def has_work(self, name: str) -> bool:
        """Whether anything of a candidate is still to be measured in the first group that it is in."""
        groups = self._prepared.plan.groups
        return self.has_work_in(name, next(index for index, group in enumerate(groups) if name in group))

    def has_work_in(self, name: str, index: int) -> bool:
        """Whether anything of a candidate is still to be measured in a group."""
        result = self[name]
        has_profile = result.profile is not None or "profile" in result.missing
        is_measured = all(run.is_warmup for run in self._missing_runs(name, index))
        return not (is_measured and result.quality is not None and has_profile)

    def runs_of_group(self, index: int) -> tuple[PlannedRun, ...]:
        """All planned runs, those that were made included."""
        offset = index * self._prepared.bench.num_runs
        return tuple(
            run if run.is_warmup else dataclasses.replace(run, round_index=run.round_index + offset)
            for run in self._runs
        )

    def expected_speed_s(self, index: int) -> float:
        """Seconds that a group's missing runs will take."""
        total_s = 0.0
        for name in self._prepared.plan.groups[index]:
            run_s = dict(zip(self._prepared.bench.concurrency, self._planned[name].run_s, strict=True))
            total_s += sum(run_s[run.concurrency] for run in self._missing_runs(name, index))
        return total_s

    def _missing_runs(self, name: str, index: int) -> list[PlannedRun]:
        made = {(run.concurrency, run.round_index) for run in self[name].runs}
        return [run for run in self.runs_of_group(index) if (run.concurrency, run.round_index) not in made]

    def _known_or_blank(self, cost: PlannedCandidate) -> BenchResult:
        prepared = self._prepared
        known = self._folder.read_result(cost.candidate.name)
        if known is not None and known.failure is None:
            return dataclasses.replace(known, config=prepared.bench)
        arguments = bench_arguments(prepared.config.model, cost.candidate, prepared.bench)
        return blank_result(cost.candidate, prepared.model, prepared.hardware, prepared.bench, arguments)
