"""The result of measuring one candidate: raw samples, what they were measured on, and quality.

Written as one JSON file per candidate, read back by `compare` and `report`. Only what was
observed is stored; medians, percentiles and speed-ups are derived by `bench.metrics`, so a
result can be judged again by other rules. `result.schema.json` beside this file is the JSON
schema of these classes (msgspec writes it; a test keeps it equal).

What could not be measured is None, with the reason in `BenchResult.missing`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from hasten.errors import ResultError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Candidate:
    """A runtime with a scheme: what is measured and compared."""

    runtime: str
    scheme: str

    @property
    def name(self) -> str:
        return f"{self.runtime}-{self.scheme}"


@dataclass(frozen=True)
class ModelInfo:
    """The model behind a result, as the user gave it.

    Args:
        revision: hub revision, or the sha256 of the folder's config and weight headers.
        linear_parameters: weights that one decode step reads: every linear layer and the
            head, without the embedding table (a tied head counts).
    """

    name: str
    revision: str
    architecture: str
    num_parameters: int
    linear_parameters: int
    max_context_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class Environment:
    """The machine and the versions behind a result.

    Args:
        read_bandwidth_bytes_per_s: measured, all threads, see hardware.measure_read_bandwidth.
        versions: distribution name to version, those that the runtime uses.
    """

    hostname_hash: str
    cpu: str
    num_cpus: int
    cpu_flags: tuple[str, ...]
    memory_bytes: int
    os: str
    python: str
    gpus: tuple[str, ...]
    read_bandwidth_bytes_per_s: float | None
    versions: dict[str, str]


@dataclass(frozen=True)
class BenchConfig:
    """How speed is measured: one value for all candidates of a run."""

    prompt_tokens: int
    new_tokens: int
    concurrency: tuple[int, ...]
    num_runs: int
    num_warmup: int
    num_threads: int
    seed: int


@dataclass(frozen=True)
class RequestRecord:
    """One measured request.

    Args:
        submitted_s: when it was handed to the runtime.
        token_times_s: when each output token was known; same clock as submitted_s.
    """

    request_id: str
    num_prompt_tokens: int
    submitted_s: float
    token_times_s: tuple[float, ...]
    finish_reason: str
    error: str | None = None


@dataclass(frozen=True)
class BenchRun:
    """Requests handed over together at one concurrency, once.

    Args:
        round_index: runs of all candidates with the same index were made one after the other.
        cpu_s: CPU time, all threads of the runtime's process, between start and end.
    """

    concurrency: int
    round_index: int
    start_s: float
    end_s: float
    cpu_s: float
    requests: tuple[RequestRecord, ...]


@dataclass(frozen=True)
class Memory:
    """Memory of the runtime's own process, in bytes.

    Args:
        loaded_rss_bytes: resident after loading, before the first request.
        peak_rss_bytes: the most that was resident at any time, loading included.
    """

    loaded_rss_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class Footprint:
    """What a candidate costs before its first token.

    Args:
        disk_bytes: everything that must be kept to run it again.
        weight_bytes_per_token: weights that one decode step at batch 1 must read, as stored;
            None where the runtime's format does not tell.
        prepare_s: conversion from the Hugging Face folder, 0 where none is needed.
        load_s: from nothing to ready for the first request.
    """

    disk_bytes: int
    weight_bytes_per_token: int | None
    prepare_s: float
    load_s: float


@dataclass(frozen=True)
class Quality:
    """How a candidate's distributions compare with the baseline's on held-out text.

    Args:
        perplexity: exp of the mean negative log-likelihood of a token.
        bits_per_byte: the same likelihood in bits for each UTF-8 byte of the text.
        mean_kl: mean over positions of KL(baseline || candidate), in nats; 0 for the baseline.
        top1_agreement: share of positions with the same most probable token.
        greedy_match_tokens: median number of leading greedy tokens equal to the baseline's.
        greedy_tokens: number of greedy tokens that were compared.
        text: where the held-out text came from.
    """

    perplexity: float
    bits_per_byte: float
    mean_kl: float
    top1_agreement: float
    greedy_match_tokens: float
    greedy_tokens: int
    num_tokens: int
    text: str


@dataclass(frozen=True)
class OperatorTime:
    """Time of one group of operators in a profiled decode, a token."""

    group: str
    time_s: float
    calls: float


@dataclass(frozen=True)
class ProfileResult:
    """Where the time of one decode step at batch 1 goes.

    Args:
        step_s: wall time of a step without the profiler.
        operators: groups by time, largest first, scaled to step_s; "outside operators" is
            what no operator accounts for (Python, the engine's own work).
        bottleneck: one sentence.
    """

    step_s: float
    operators: tuple[OperatorTime, ...]
    bottleneck: str


@dataclass(frozen=True)
class BenchResult:
    """One candidate, measured.

    Args:
        command: the command line that makes this result again.
        failure: why the candidate could not be measured to the end, None if it was.
        missing: field name to the reason why it is None.
    """

    candidate: Candidate
    model: ModelInfo
    environment: Environment
    config: BenchConfig
    command: str
    created_at: str
    hasten_version: str
    runs: tuple[BenchRun, ...] = ()
    footprint: Footprint | None = None
    memory: Memory | None = None
    quality: Quality | None = None
    profile: ProfileResult | None = None
    failure: str | None = None
    missing: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def write_result(result: BenchResult, path: Path) -> None:
    """Writes the JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    partial.replace(path)


def read_result(path: Path) -> BenchResult:
    """Reads and validates a result file.

    Raises:
        ResultError: it cannot be read, is not JSON, does not fit the schema, or was written by
            a newer schema version.
    """
    try:
        result = msgspec.json.decode(path.read_bytes(), type=BenchResult)
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ResultError(f"{path} is not a hasten result: {error}") from error
    if result.schema_version > SCHEMA_VERSION:
        raise ResultError(f"{path} has schema version {result.schema_version}; this hasten reads up to {SCHEMA_VERSION}")
    return result


def json_schema() -> dict[str, object]:
    """The JSON schema of a result file, draft 2020-12."""
    return msgspec.json.schema(BenchResult)
