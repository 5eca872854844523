"""The folder that `optimize` writes, and how an interrupted run is found again.

plan.json                what is measured and how; a run is resumed only by an equal one
results/NAME.json        one BenchResult a candidate, rewritten whole after each sample
candidates/NAME/         converted models while they are measured
logs/NAME.log            what the runtime's process printed
engine/, native/         what the winner's runtime loads; the best native candidate where that is another one
recommended.json         which candidates these are, how much faster than the baseline, and of which model
served.json              the BenchResult of the native candidate behind `hasten serve`
served_offline.json      that of the same without a server, in turns with it
report.html, PERFORMANCE_REPORT.md, plots/*.png, reproduce.sh
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hasten.bench.result import BenchResult, Candidate, read_result, write_result
from hasten.bench.served import Served
from hasten.errors import ResultError, UsageError


@dataclass(frozen=True)
class Kept:
    """A candidate that a run keeps.

    Args:
        speedup: over the baseline, in what the run's target judges.
        artifact: the folder that its runtime loads.
    """

    candidate: Candidate
    speedup: float
    artifact: Path


@dataclass(frozen=True)
class Recommended:
    """What a run recommends.

    Args:
        native: the best native candidate that passed the gate, which is the one to serve; None if none did.
        source: the model that both were made from.
    """

    winner: Kept
    native: Kept | None
    source: Path


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
    def scratch_path(self) -> Path:
        return self.path / "scratch"

    @property
    def recommended_path(self) -> Path:
        return self.path / "recommended.json"

    @property
    def served_path(self) -> Path:
        return self.path / "served.json"

    @property
    def served_offline_path(self) -> Path:
        return self.path / "served_offline.json"

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

    def read_served(self) -> Served | None:
        """What the served engine gave, None if it was not measured."""
        paths = (self.served_path, self.served_offline_path)
        return Served(*map(read_result, paths)) if all(path.exists() for path in paths) else None

    def write_served(self, served: Served) -> None:
        write_result(served.offline, self.served_offline_path)
        write_result(served.over_http, self.served_path)

    def forget_served(self) -> None:
        """Removes what an earlier run measured."""
        for path in (self.served_path, self.served_offline_path):
            path.unlink(missing_ok=True)

    def recommend(self, winner: Kept, native: Kept | None, source: Path) -> None:
        """Moves what was converted to engine/ and native/; a model that runs as it is stays where it is.

        Args:
            native: the best native candidate, equal to the winner where that is one.
            source: the model that they were made from.
        """
        self.recommended_path.unlink(missing_ok=True)  # a folder and what is said of it never disagree
        other = None if native is None or native == winner else self._moved(native, "native")
        engine = self._moved(winner, "engine")
        if other is None:
            shutil.rmtree(self.path / "native", ignore_errors=True)
        served = engine if native == winner else other
        recommended = {
            "source": str(source),
            "winner": _as_json(engine),
            "native": None if served is None else _as_json(served),
        }
        self.recommended_path.write_text(json.dumps(recommended, indent=1) + "\n")

    def _moved(self, kept: Kept, name: str) -> Kept:
        """The same with its folder below this one called `name`, and told relative to this one."""
        place = self.path / name
        if not kept.artifact.is_relative_to(self.path):
            return kept
        if kept.artifact != place:
            shutil.rmtree(place, ignore_errors=True)
            kept.artifact.rename(place)
        return replace(kept, artifact=Path(name))

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


def read_recommended(path: Path) -> Recommended | None:
    """What a run folder recommends; None if `path` is not a run that recommends anything.

    Raises:
        ResultError: recommended.json is not as `optimize` wrote it.
    """
    recommended_path = RunFolder(path).recommended_path
    if not recommended_path.is_file():
        return None
    try:
        values = json.loads(recommended_path.read_text())
        native = None if values["native"] is None else _from_json(values["native"], path)
        return Recommended(_from_json(values["winner"], path), native, Path(values["source"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultError(f"{recommended_path} cannot be read: run hasten optimize again") from error


def _as_json(kept: Kept) -> dict[str, Any]:
    return {
        "runtime": kept.candidate.runtime,
        "scheme": kept.candidate.scheme,
        "speedup": kept.speedup,
        "artifact": str(kept.artifact),
    }


def _from_json(values: dict[str, Any], run_path: Path) -> Kept:
    candidate = Candidate(values["runtime"], values["scheme"])
    return Kept(candidate, float(values["speedup"]), run_path / values["artifact"])
