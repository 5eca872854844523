"""The folder that `optimize` writes, and how an interrupted run is found again.

plan.json                what is measured and how; a run is resumed only by an equal one
results/NAME.json        one BenchResult a candidate, rewritten whole after each sample
candidates/NAME/         converted models while they are measured
logs/NAME.log            what the runtime's process printed
engine/, winner.json     the winner, and which runtime and scheme it is
report.html, PERFORMANCE_REPORT.md, plots/*.png, reproduce.sh
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.bench.result import BenchResult, Candidate, read_result, write_result
from hasten.errors import ResultError, UsageError


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    def result_path(self, candidate: str) -> Path:
        return self.path / "results" / f"{candidate}.json"

    def candidate_path(self, candidate: str) -> Path:
        return self.path / "candidates" / candidate

    def log_path(self, candidate: str) -> Path:
        return self.path / "logs" / f"{candidate}.log"

    @property
    def engine_path(self) -> Path:
        return self.path / "engine"

    @property
    def scratch_path(self) -> Path:
        return self.path / "scratch"

    @property
    def winner_path(self) -> Path:
        return self.path / "winner.json"

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    def read_result(self, candidate: str) -> BenchResult | None:
        """The candidate's result so far, None if nothing was measured."""
        path = self.result_path(candidate)
        return read_result(path) if path.exists() else None

    def write_result(self, result: BenchResult) -> None:
        write_result(result, self.result_path(result.candidate.name))

    def write_reproduce(self, command: str) -> None:
        """Writes reproduce.sh: the command that makes this run again."""
        path = self.path / "reproduce.sh"
        path.write_text(f"#!/bin/sh\n# makes this run again, in another folder with -o\n{command}\n")
        path.chmod(0o755)

    def keep_winner(self, candidate: Candidate, artifact: Path, source: Path) -> None:
        """Moves a converted winner to engine/; a model that runs as it is stays where it is."""
        if artifact.is_relative_to(self.path):
            shutil.rmtree(self.engine_path, ignore_errors=True)
            artifact.rename(self.engine_path)
            artifact = Path(self.engine_path.name)
        winner = {
            "runtime": candidate.runtime,
            "scheme": candidate.scheme,
            "artifact": str(artifact),
            "source": str(source),
        }
        self.winner_path.write_text(json.dumps(winner, indent=1) + "\n")

    def clean(self) -> None:
        """Removes what was only needed while measuring."""
        shutil.rmtree(self.path / "candidates", ignore_errors=True)
        shutil.rmtree(self.scratch_path, ignore_errors=True)

    def results(self) -> list[BenchResult]:
        """All results in the folder, in the order of their names."""
        return [read_result(path) for path in sorted((self.path / "results").glob("*.json"))]


def open_run_folder(path: Path, identity: dict[str, Any], details: dict[str, Any]) -> RunFolder:
    """Creates a run folder, or opens one that was interrupted.

    Args:
        identity: what must be equal for samples to belong together (model, lengths, seed).
        details: the rest of plan.json, rewritten at each start.

    Raises:
        UsageError: the path holds something else, or a run with another identity.
    """
    run = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: choose another folder with -o")
    if path.is_dir() and any(path.iterdir()):
        if not run.plan_path.is_file():
            raise UsageError(f"{path} exists and is not a run of hasten: choose another folder with -o")
        _check_same_run(run.plan_path, identity)
    path.mkdir(parents=True, exist_ok=True)
    partial = path / "plan.json.partial"
    partial.write_text(json.dumps({"identity": identity, **details}, indent=1, default=str) + "\n")
    partial.replace(run.plan_path)
    return run


def _check_same_run(plan_path: Path, identity: dict[str, Any]) -> None:
    try:
        earlier = json.loads(plan_path.read_text())["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{plan_path} cannot be read: choose another folder with -o or delete this one") from error
    wanted = json.loads(json.dumps(identity, default=str))
    if earlier == wanted:
        return
    changed = [key for key in wanted if not isinstance(earlier, dict) or earlier.get(key) != wanted[key]]
    raise UsageError(
        f"{plan_path.parent} holds a run with another {', '.join(changed) or 'plan'}: "
        "choose another folder with -o or delete this one"
    )


@dataclass(frozen=True)
class Winner:
    """The candidate that a run recommends, the folder that its runtime loads, and the model it was made from."""

    candidate: Candidate
    artifact: Path
    source: Path


def read_winner(path: Path) -> Winner | None:
    """The winner of a run folder; None if `path` is not a run that has one.

    Raises:
        ResultError: winner.json is not as `optimize` wrote it.
    """
    winner_path = RunFolder(path).winner_path
    if not winner_path.is_file():
        return None
    try:
        values = json.loads(winner_path.read_text())
        candidate = Candidate(values["runtime"], values["scheme"])
        return Winner(candidate, path / values["artifact"], Path(values["source"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultError(f"{winner_path} cannot be read: run hasten optimize again") from error
