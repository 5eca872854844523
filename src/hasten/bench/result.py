"""The result of measuring one candidate: raw samples, what they were measured on, and quality.

Written as one JSON file per candidate, read back by `compare` and `report`. Only what was
observed is stored; medians, percentiles and speed-ups are derived by `bench.metrics`, so a
result can be judged again by other rules. `result.schema.json` beside this file is the JSON
schema of these classes (msgspec writes it; a test keeps it equal).

What could not be measured is None, with the reason in `BenchResult.missing`. Ranges are checked
when a file is read, so a result that was read has finite times and counts that fit 64 bits.
"""

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from hasten.errors import ResultError

SCHEMA_VERSION = 1

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclass(frozen=True)
class Candidate:
    """A runtime with a scheme: what is measured and compared.

    Args:
        runtime: of `bench online`, the name given to the server, or its host and port.
        scheme: "" for a server, which does not tell.
    """

    runtime: str
    scheme: str

    @property
    def name(self) -> str:
        return f"{self.runtime}-{self.scheme}" if self.scheme else self.runtime


@dataclass(frozen=True)
class ModelInfo:
    """The model behind a result, as the user gave it.

    Args:
        revision: hub revision, or the sha256 of the folder's config and weight headers.
        linear_parameters: weights that one decode step reads: every linear layer and the
            head, without the embedding table (a tied head counts).

    All but the name are None for a server's model whose folder is not known.
    """

    name: str
    revision: str | None = None
    architecture: str | None = None
    num_parameters: Count | None = None
    linear_parameters: Count | None = None
    max_context_tokens: Count | None = None
    vocab_size: Count | None = None


@dataclass(frozen=True)
class Environment:
    """The machine and the versions behind a result; of `bench online`, those of the client.

    Args:
        gpus: those that the process may use, the one that it uses first.
        read_bandwidth_bytes_per_s: measured, of the memory that config.device computes from, see
            hardware.measure_read_bandwidth and profiling.device_memory.
        versions: distribution name to version, those that the runtime uses.
    """

    hostname_hash: str
    cpu: str
    num_cpus: AtLeastOne
    cpu_flags: tuple[str, ...]
    memory_bytes: Count
    os: str
    python: str
    gpus: tuple[str, ...]
    read_bandwidth_bytes_per_s: Positive | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Objective:
    """What a request must keep to count as good; None asks for nothing."""

    ttft_s: Positive | None = None
    tpot_s: Positive | None = None
    e2e_latency_s: Positive | None = None


@dataclass(frozen=True)
class Load:
    """How requests reach a server.

    Args:
        api: "completions", "chat" or "kserve".
        arrivals: "closed" (each client sends its next request when its last has ended),
            "poisson", "constant" or "trace".
        rate_per_s: offered requests a second; None for a closed loop.
        requests_per_run: for each client of a closed loop, else in all.
        prompts: "text" or "random".
        prompt_lengths, output_lengths: as they were asked for, such as "64-256".
    """

    url: str
    api: str
    arrivals: str
    rate_per_s: Positive | None
    requests_per_run: AtLeastOne
    prompts: str
    prompt_lengths: str
    output_lengths: str
    objective: Objective


@dataclass(frozen=True)
class BenchConfig:
    """How speed is measured: one value for all candidates of a run.

    Args:
        prompt_tokens, new_tokens: of each request; their mean where lengths differ.
        concurrency: of an open loop, the most requests that are sent at the same time.
        num_threads: None for a server, which has its own.
        device: "cpu" or "cuda"; "unknown" for a server that is not on this machine.
        load: None where requests are handed to a runtime without a server.
    """

    prompt_tokens: AtLeastOne
    new_tokens: AtLeastOne
    concurrency: tuple[AtLeastOne, ...]
    num_runs: AtLeastOne
    num_warmup: Count
    num_threads: AtLeastOne | None
    seed: int
    device: str = "cpu"
    load: Load | None = None

    @property
    def arrivals(self) -> str:
        """When requests come, in words; what was measured without a server compares with a closed loop."""
        if self.load is None or self.load.arrivals == "closed":
            return "closed loop"
        rate = "" if self.load.rate_per_s is None else f", {self.load.rate_per_s:g} requests/s"
        return f"open loop, {self.load.arrivals}{rate}"


@dataclass(frozen=True)
class RequestRecord:
    """One measured request.

    Args:
        submitted_s: when it was handed to the runtime.
        token_times_s: when each output token was known; same clock as submitted_s.
        num_cached_tokens: of the prompt, which a server had in its prefix cache; None where it is not told.
    """

    request_id: str
    num_prompt_tokens: Count
    submitted_s: NotNegative
    token_times_s: tuple[NotNegative, ...]
    finish_reason: str
    error: str | None = None
    num_cached_tokens: Count | None = None


@dataclass(frozen=True)
class GpuUse:
    """What a server's GPUs did during a run; of several, the sum (share: the mean).

    Args:
        busy_share: of the time, in which a kernel ran; mean of the driver's samples.
        peak_memory_bytes: the most that was taken, by all programs on the GPU.
        power_w: mean, from the driver's energy counter; None for a run too short to tell.
    """

    busy_share: Share
    peak_memory_bytes: Count
    power_w: NotNegative | None


@dataclass(frozen=True)
class BenchRun:
    """Requests at one concurrency, once: handed over together, or sent to a server as `config.load` says.

    Args:
        round_index: runs of all candidates with the same index were made one after the other.
        cpu_s: CPU time, all threads of the runtime's process (a server's with its children),
            between start and end. None for a server that is not on this machine.
        gpu: None without a server on this machine that uses one.
        client_share: CPU time of the load generator's busiest process over the run's; near 1
            the load generator limits what is measured. None without a load generator.
    """

    concurrency: AtLeastOne
    round_index: Count
    start_s: NotNegative
    end_s: NotNegative
    cpu_s: NotNegative | None
    requests: tuple[RequestRecord, ...]
    gpu: GpuUse | None = None
    client_share: NotNegative | None = None


@dataclass(frozen=True)
class Memory:
    """Memory of the runtime's own process (a server's with its children), in bytes.

    Args:
        loaded_rss_bytes: resident after loading, before the first request.
        peak_rss_bytes: the most that was resident at any time, loading included.
        peak_device_bytes: the most of the GPU's memory that its tensors took, None on a CPU.
    """

    loaded_rss_bytes: Count
    peak_rss_bytes: Count
    peak_device_bytes: Count | None = None

    @property
    def peak_bytes(self) -> int:
        """The most of the memory that the model was computed in."""
        return self.peak_rss_bytes if self.peak_device_bytes is None else self.peak_device_bytes


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

    disk_bytes: Count
    weight_bytes_per_token: Count | None
    prepare_s: NotNegative
    load_s: NotNegative


@dataclass(frozen=True)
class Quality:
    """How a candidate's distributions compare with the baseline's on held-out text.

    Args:
        perplexity: exp of the mean negative log-likelihood of a token.
        bits_per_byte: the same likelihood in bits for each UTF-8 byte of the text.
        mean_kl: mean over positions of KL(baseline || candidate), in nats; 0 for the baseline.
        top1_agreement: share of positions with the same most probable token.
        greedy_match_tokens: median number of leading greedy tokens equal to the baseline's.
        greedy_tokens: length of each compared continuation, the most that greedy_match_tokens can be.
        num_tokens: scored tokens behind perplexity, KL divergence and agreement.
        text: where the held-out text came from.
    """

    perplexity: Positive
    bits_per_byte: NotNegative
    mean_kl: float
    top1_agreement: Share
    greedy_match_tokens: NotNegative
    greedy_tokens: Count
    num_tokens: Count
    text: str


@dataclass(frozen=True)
class OperatorTime:
    """Time of one group of operators in a profiled decode, a token."""

    group: str
    time_s: NotNegative
    calls: NotNegative


@dataclass(frozen=True)
class ProfileResult:
    """Where the time of one decode step at batch 1 goes.

    Args:
        step_s: wall time of a step without the profiler.
        operators: groups by time, largest first, scaled to step_s; "outside operators" is
            what no operator accounts for (Python, the engine's own work).
        bottleneck: one sentence.
    """

    step_s: NotNegative
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

    @property
    def processor(self) -> str:
        """What computed it, by name."""
        on_gpu = self.config.device == "cuda" and self.environment.gpus
        return self.environment.gpus[0] if on_gpu else self.environment.cpu


def write_result(result: BenchResult, path: Path) -> None:
    """Writes the JSON file whole or not at all.

    Raises:
        ResultError: a value that no result may have, such as one that is not a number.
    """
    encoded = msgspec.json.encode(result)
    try:
        msgspec.json.decode(encoded, type=BenchResult)
    except msgspec.DecodeError as error:
        raise ResultError(f"the result of {result.candidate.name} is not valid: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")
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
    except (msgspec.DecodeError, RecursionError) as error:
        raise ResultError(f"{path} is not a hasten result: {error}") from error
    if result.schema_version > SCHEMA_VERSION:
        raise ResultError(
            f"{path} has schema version {result.schema_version}; this hasten reads up to {SCHEMA_VERSION}"
        )
    return result


def json_schema() -> dict[str, Any]:
    """The JSON schema of a result file, draft 2020-12."""
    schema = msgspec.json.schema(BenchResult)
    for definition in schema["$defs"].values():
        definition["description"] = inspect.cleandoc(definition["description"])  # Python 3.13 does so by itself
    # through JSON, which has no tuples, so that it equals what is read from the file
    return json.loads(
        json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hasten result", **schema})
    )
