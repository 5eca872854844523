"""What a user asks of each stage: one frozen dataclass per verb of the command line.

Defaults and help texts live here and nowhere else; the flags are generated from the fields.
Building a config reads nothing and imports nothing heavy.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from hasten.bench.arrivals import Arrivals
from hasten.bench.pick import Gate, Target
from hasten.bench.probe import Api
from hasten.config import Device, LogFormat, option, scheme_named
from hasten.errors import UsageError
from hasten.request import SamplingParams

DEFAULT_RUNTIMES = ("transformers", "native", "onnxruntime")
DEVICE_HELP = "cpu or cuda; auto is the GPU where there is one"


@dataclass(frozen=True)
class BenchOptions:
    """How speed is measured. Shared by `optimize` and `bench offline`.

    Raises:
        UsageError: a value outside its range.
    """

    concurrency: tuple[int, ...] = option((1, 2, 4, 8), "requests at the same time, comma-separated")
    prompt_tokens: int = option(128, "tokens of each prompt")
    new_tokens: int = option(64, "tokens generated for each request")
    runs: int = option(10, "measured runs at each concurrency")
    warmup: int = option(2, "runs before them that do not count")
    threads: int | None = option(None, "CPU threads; default one for each core")
    seed: int = option(0, "draws the prompts")
    device: Device = option("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        if not self.concurrency:
            raise UsageError("--concurrency needs at least one number, such as 1,2,4,8")
        for flag, value, least in (
            ("--concurrency", min(self.concurrency), 1),
            ("--prompt-tokens", self.prompt_tokens, 1),
            ("--new-tokens", self.new_tokens, 2),
            ("--runs", self.runs, 1),
            ("--warmup", self.warmup, 0),
            ("--threads", 1 if self.threads is None else self.threads, 1),
        ):
            if value < least:
                raise UsageError(f"{flag} must be at least {least}, got {value}")


@dataclass(frozen=True)
class OptimizeConfig(BenchOptions):
    """Everything that `optimize` may be told.

    Raises:
        UsageError: an unknown scheme, or a value outside its range.
    """

    model: str = option("", "a Hugging Face model folder or hub id")
    target: Target = option("latency", "what to be fast at: one request, or many at once")
    max_perplexity_increase: float = option(
        Gate.max_perplexity_increase, "worse than this is not recommended; 0.02 is two percent"
    )
    max_kl: float = option(Gate.max_kl, "largest mean KL divergence from the baseline, nats a token")
    runtimes: tuple[str, ...] = option(DEFAULT_RUNTIMES, "runtimes to try, comma-separated")
    schemes: tuple[str, ...] | None = option(None, "precisions to try, comma-separated; default those for the device")
    time_budget: float | None = option(None, "seconds for measuring speed; fewer runs where it is too short")
    price_per_hour: float | None = option(None, "price of one such machine for an hour, for the savings")
    load: float | None = option(None, "output tokens a second that you must serve, for the savings")
    output: Path | None = option(None, "run folder; default runs/MODEL", flags=("-o", "--output"))
    dry_run: bool = option(False, "print the plan with its cost and stop")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runtimes or self.schemes == ():
            raise UsageError("--runtimes and --schemes need at least one name each")
        for scheme in self.schemes or ():
            scheme_named(scheme)
        for flag, value in (
            ("--max-perplexity-increase", self.max_perplexity_increase),
            ("--max-kl", self.max_kl),
            ("--time-budget", self.time_budget),
        ):
            if value is not None and not value >= 0:
                raise UsageError(f"{flag} must be at least 0, got {value}")
        for flag, value in (("--price-per-hour", self.price_per_hour), ("--load", self.load)):
            if value is not None and not value > 0:
                raise UsageError(f"{flag} must be above 0, got {value}")

    @property
    def gate(self) -> Gate:
        return Gate(self.target, self.max_perplexity_increase, self.max_kl)


@dataclass(frozen=True)
class OfflineConfig(BenchOptions):
    """What `bench offline` measures: one runtime in one scheme."""

    model: str = option("", "a Hugging Face model folder, a hub id, an engine folder or a run folder")
    runtime: str | None = option(None, "runtime; default native, or a run folder's winner")
    scheme: str | None = option(None, "precision; default that of the engine or run folder, else bf16")


@dataclass(frozen=True)
class OnlineConfig:
    """What `bench online` sends to a server, and how.

    Raises:
        UsageError: a value outside its range, or options that exclude each other.
    """

    url: str = option("", "the server, such as http://127.0.0.1:8000; KServe's gRPC is grpc://127.0.0.1:8001")
    api: Api = option(
        "completions",
        "OpenAI's completions or chat, or KServe as Triton has it: generate_stream, over gRPC ModelStreamInfer",
    )
    model: str | None = option(None, "the model's name at the server; default the only one that it lists")
    tokenizer: Path | None = option(None, "the model's folder: exact prompt lengths, and its facts in the result")
    name: str | None = option(None, "what the result is called; default the server's host and port")
    concurrency: tuple[int, ...] = option((1, 2, 4, 8), "closed loop: clients, each with one request at a time")
    rate: float | None = option(None, "open loop instead: requests a second, whatever the answers do")
    arrivals: Arrivals = option("poisson", "open loop: at random (poisson) or at equal gaps")
    trace: Path | None = option(None, "open loop: JSON lines with arrival_s, prompt_tokens and output_tokens")
    requests: int | None = option(
        None, "requests of a run; default 4 a client (closed loop), 10 s of arrivals, or the whole trace"
    )
    prompts: Literal["text", "random"] = option(
        "text", "windows of a text, or random tokens (words, without a tokenizer)"
    )
    prompt_tokens: str = option("128", "length of each prompt: 128, 64-256 (uniform) or lognormal:MEDIAN:SIGMA")
    new_tokens: str = option("64", "tokens to ask for, likewise")
    runs: int = option(10, "measured runs at each concurrency")
    warmup: int = option(2, "runs before them that do not count")
    seed: int = option(0, "draws prompts, lengths and arrivals")
    slo_ttft_ms: float | None = option(None, "a request is good if its first token comes within this")
    slo_tpot_ms: float | None = option(None, "a request is good if its time per output token is within this")
    slo_latency_ms: float | None = option(None, "a request is good if its last token comes within this")
    timeout: float = option(600.0, "seconds after which an answer is given up")
    clients: int | None = option(None, "client processes; default one for each core, as far as they help")
    api_key_file: Path | None = option(None, "a file with the server's API key")

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1:
            raise UsageError("--concurrency needs numbers from 1 on, such as 1,2,4,8")
        if self.rate is not None and self.trace is not None:
            raise UsageError("--rate and --trace exclude each other: a trace has its own arrival times")
        if self.trace is not None and self.requests is not None:
            raise UsageError("--requests and --trace exclude each other: a run is the whole trace")
        for flag, value, least in (
            ("--requests", self.requests, 1),
            ("--runs", self.runs, 1),
            ("--warmup", self.warmup, 0),
            ("--clients", self.clients, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"{flag} must be at least {least}, got {value}")
        for flag, seconds in (
            ("--rate", self.rate),
            ("--timeout", self.timeout),
            ("--slo-ttft-ms", self.slo_ttft_ms),
            ("--slo-tpot-ms", self.slo_tpot_ms),
            ("--slo-latency-ms", self.slo_latency_ms),
        ):
            if seconds is not None and not 0 < seconds < math.inf:
                raise UsageError(f"{flag} must be above 0, got {seconds}")


@dataclass(frozen=True)
class EvalConfig:
    """What `eval` compares: one runtime in one scheme against the transformers baseline."""

    model: str = option("", "a Hugging Face model folder or hub id")
    runtime: str = option("native", "runtime to evaluate")
    scheme: str = option("w8a16", "precision to evaluate")
    baseline: str = option("fp32", "precision of the transformers baseline")
    max_perplexity_increase: float | None = option(None, "exit with 4 if perplexity rises by more; 0.02 is two percent")
    max_kl: float | None = option(None, "exit with 4 if the mean KL divergence is larger, nats a token")
    threads: int | None = option(None, "CPU threads; default one for each core")
    device: Device = option("auto", DEVICE_HELP)


@dataclass(frozen=True)
class GenerateConfig(SamplingParams):
    """What `generate` runs. The sampling options are request.SamplingParams's.

    Raises:
        RequestError: a sampling value outside its range.
    """

    model: str = option("", "a Hugging Face model folder, a hub id, an engine folder or a run folder")
    prompt: str | None = option(None, "the prompt")
    file: Path | None = option(None, "a file of prompts, one a line; - is standard input", flags=("-f", "--file"))
    chat: bool = option(False, "put the prompt into the model's chat template")
    system: str | None = option(None, "a system message, with --chat")
    json_schema: str | None = option(None, "JSON schema that the output must match, or a file with one")
    regex: str | None = option(None, "regular expression that the whole output must match")
    grammar_file: Path | None = option(
        None, "file with a grammar that the output must match, in llguidance's dialect of Lark", flags=("--grammar",)
    )
    runtime: str | None = option(None, "runtime; default native, or a run folder's winner")
    scheme: str | None = option(None, "precision; default that of the engine or run folder, else bf16")
    threads: int | None = option(None, "CPU threads; default one for each core")
    device: Device = option("auto", DEVICE_HELP)

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(**{each.name: getattr(self, each.name) for each in fields(SamplingParams)})


@dataclass(frozen=True)
class BuildConfig:
    """What `build` makes: an engine folder of the native runtime."""

    model: str = option("", "a Hugging Face model folder or hub id")
    scheme: str = option("bf16", "precision of the weights")
    profile: str = option("latency", "limits of the engine: latency or throughput")
    device: Device = option("auto", DEVICE_HELP)
    max_num_seqs: int | None = option(None, "most requests that run at the same time; default the profile's")
    max_model_tokens: int | None = option(None, "most tokens of one request, prompt and output; default the profile's")
    output: Path | None = option(None, "engine folder; default MODEL-SCHEME", flags=("-o", "--output"))
    dry_run: bool = option(False, "print the memory plan and stop")


@dataclass(frozen=True)
class ProfileConfig:
    """What `profile` looks at: one request's decode steps in each runtime.

    Raises:
        UsageError: a value outside its range.
    """

    model: str = option("", "a Hugging Face model folder, a hub id, an engine folder or a run folder")
    runtimes: tuple[str, ...] = option(("transformers", "native"), "runtimes to put side by side, comma-separated")
    scheme: str | None = option(
        None, "precision; the baseline has the nearest that it runs; default bf16 or the folder's"
    )
    device: Device = option("auto", DEVICE_HELP)
    prompt_tokens: int = option(128, "tokens of the prompt")
    steps: int = option(32, "decode steps to trace")
    threads: int | None = option(None, "CPU threads; default one for each core")
    nsys: bool = option(False, "also record each runtime with Nsight Systems, which must be installed")
    output: Path | None = option(None, "folder for the traces; default profiles/MODEL", flags=("-o", "--output"))

    def __post_init__(self) -> None:
        if not self.runtimes:
            raise UsageError("--runtimes needs at least one name")
        for flag, value in (("--prompt-tokens", self.prompt_tokens), ("--steps", self.steps)):
            if value < 2:
                raise UsageError(f"{flag} must be at least 2, got {value}")


@dataclass(frozen=True)
class ServeConfig:
    """What `serve` serves, where, and to whom.

    Raises:
        UsageError: a value outside its range, or one of a pair without the other.
    """

    model: str = option("", "a Hugging Face model folder, a hub id, an engine folder or a run folder")
    server: Literal["hasten", "triton"] = option(
        "hasten", "hasten's own server or NVIDIA's Triton, which also takes a model repository", flags=("--with",)
    )
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = option(8000, "port to listen on; 0 is any free one")
    grpc_port: int | None = option(None, "port for KServe v2 over gRPC, usually 8001; without it there is none")
    scheme: str | None = option(None, "precision; default that of the engine or run folder, else bf16")
    device: Device = option("auto", DEVICE_HELP)
    threads: int | None = option(None, "CPU threads of the engine; default one for each core")
    max_num_seqs: int | None = option(
        None, "most sequences that run at the same time; default the engine folder's, else 32, on a GPU 256"
    )
    max_model_tokens: int | None = option(
        None, "most tokens of a request, prompt and output; default the engine folder's, else 8192"
    )
    served_model_name: str | None = option(None, "name that clients use; default the folder's")
    api_key_file: Path | None = option(None, "file of API keys, one a line; without it everybody is let in")
    tls_cert: Path | None = option(None, "PEM file of the certificate, for HTTPS")
    tls_key: Path | None = option(None, "PEM file of its key")
    cors_origin: tuple[str, ...] = option((), "origin whose pages may read answers; may be repeated")
    max_queue: int = option(1024, "most sequences that wait while others run; more are answered with 429")
    request_timeout_s: float = option(600.0, "most seconds from a request's arrival to its last token")
    drain_timeout_s: float = option(60.0, "most seconds for the requests that run when the server is told to end")
    max_body_bytes: int = option(32 << 20, "most bytes of one request")
    log_format: LogFormat = option("json", "form of the log on stderr: json or text")
    log_prompts: bool = option(False, "log the text of prompts as well")

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("--tls-cert and --tls-key are given together or not at all")
        for flag, port in (("--port", self.port), ("--grpc-port", self.grpc_port)):
            if port is not None and not 0 <= port <= 65535:
                raise UsageError(f"{flag} must be between 0 and 65535, got {port}")
        for flag, value, least in (
            ("--threads", self.threads, 1),
            ("--max-num-seqs", self.max_num_seqs, 1),
            ("--max-model-tokens", self.max_model_tokens, 2),
            ("--max-queue", self.max_queue, 0),
            ("--request-timeout-s", self.request_timeout_s, 0),
            ("--drain-timeout-s", self.drain_timeout_s, 0),
            ("--max-body-bytes", self.max_body_bytes, 1),
        ):
            if value is not None and not value >= least:
                raise UsageError(f"{flag} must be at least {least}, got {value}")


@dataclass(frozen=True)
class TritonConfig:
    """What `export triton` writes.

    Raises:
        UsageError: a value outside its range, or options that exclude each other.
    """

    model: str = option("", "a Hugging Face model folder, a hub id, an engine folder or a run folder")
    output: Path = option(Path("models"), "the model repository, new or not", flags=("-o", "--output"))
    name: str | None = option(None, "name of the model that takes text; NAME_tokens takes tokens; default the folder's")
    scheme: str | None = option(None, "precision; default that of the engine or run folder, else bf16")
    device: Device = option("auto", DEVICE_HELP)
    gpus: tuple[int, ...] | None = option(None, "GPUs with an engine each, by number, comma-separated; default 0")
    mig: tuple[str, ...] | None = option(None, "MIG slices with an engine each, by UUID, comma-separated")
    instances: int = option(1, "engines on each GPU or MIG slice, or on the CPU")
    threads: int | None = option(None, "CPU threads of an engine; default one for each core")
    max_num_seqs: int | None = option(None, "most sequences that run at the same time in an engine; default as serve")
    max_model_tokens: int | None = option(None, "most tokens of one request, prompt and output; default as serve")
    python: str | None = option(None, "Python that runs the engines, with hasten; default the one that exports")

    def __post_init__(self) -> None:
        if self.gpus is not None and self.mig is not None:
            raise UsageError("--gpus and --mig exclude each other")
        if self.device == "cpu" and (self.gpus or self.mig):
            raise UsageError("--device cpu contradicts --gpus and --mig: leave one of them out")
        for flag, value, least in (
            ("--gpus", min(self.gpus or (0,)), 0),
            ("--instances", self.instances, 1),
            ("--threads", self.threads, 1),
            ("--max-num-seqs", self.max_num_seqs, 1),
            ("--max-model-tokens", self.max_model_tokens, 2),
        ):
            if value is not None and value < least:
                raise UsageError(f"{flag} must be at least {least}, got {value}")


@dataclass(frozen=True)
class ReportConfig:
    """What `report` writes up."""

    results: tuple[Path, ...] = option((), "a run folder, or result files with the baseline first")
    output: Path | None = option(
        None, "folder to write to; default the run folder, or report/", flags=("-o", "--output")
    )
    price_per_hour: float | None = option(None, "price of one such machine for an hour, for the savings")
    load: float | None = option(None, "output tokens a second that you must serve, for the savings")
