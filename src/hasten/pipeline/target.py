"""What a user means by a model: which folder, in which runtime and scheme.

A Hugging Face folder or hub id runs in the runtime and scheme that are asked for; an engine
folder has its scheme, and a run folder of `optimize` stands for the winner that it kept.
"""

from dataclasses import dataclass
from pathlib import Path

from hasten.bench.result import Candidate
from hasten.engine.folder import is_engine_folder, read_engine_manifest
from hasten.errors import UsageError
from hasten.hub import resolve_model
from hasten.pipeline.run_folder import RunFolder, read_winner
from hasten.runtimes.registry import runtime_for

DEFAULT_RUNTIME = "native"
DEFAULT_SCHEME = "bf16"


@dataclass(frozen=True)
class Target:
    """A folder with the runtime that loads it and its scheme.

    Args:
        source: the folder with config.json, tokenizer and safetensors weights: the path itself,
            or the model that a winner was converted from.
        is_converted: whether the path is what the runtime's `prepare` wrote.
    """

    candidate: Candidate
    path: Path
    source: Path
    is_converted: bool


def resolve_target(model: str, runtime: str | None = None, scheme: str | None = None) -> Target:
    """Finds out what to load.

    Raises:
        ModelError: there is no such model.
        UsageError: the runtime or scheme contradicts the folder, or a run without a winner.
    """
    path = resolve_model(model)
    winner = read_winner(path)
    if winner is not None:
        _check_same(path, "runtime", runtime, winner.candidate.runtime)
        _check_same(path, "scheme", scheme, winner.candidate.scheme)
        source = winner.artifact if is_engine_folder(winner.artifact) else winner.source
        return Target(winner.candidate, winner.artifact, source, is_converted=True)
    if RunFolder(path).plan_path.is_file():
        raise UsageError(f"{path} is a run without a winner: finish it with hasten optimize, or name a model")
    if is_engine_folder(path):
        found = read_engine_manifest(path).scheme
        _check_same(path, "runtime", runtime, DEFAULT_RUNTIME)
        _check_same(path, "scheme", scheme, found)
        return Target(Candidate(DEFAULT_RUNTIME, found), path, path, is_converted=True)
    return Target(Candidate(runtime or DEFAULT_RUNTIME, scheme or DEFAULT_SCHEME), path, path, is_converted=False)


def _check_same(path: Path, what: str, asked: str | None, found: str) -> None:
    if asked is not None and asked != found:
        raise UsageError(f"{path} holds {what} {found}, not {asked}: leave out --{what} or name the original model")


def prepared(target: Target, out: Path) -> Path:
    """The folder as the target's runtime wants it, converted into `out` if it must be."""
    runtime = runtime_for(target.candidate.runtime, target.candidate.scheme)
    if target.is_converted or runtime.capabilities.loads_source:
        return target.path
    return runtime.prepare(target.path, target.candidate.scheme, out)
