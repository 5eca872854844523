"""What a user asks of each stage: one frozen dataclass per verb of the command line.

Defaults and help texts live here and nowhere else; the flags are generated from the fields.
Building a config reads nothing and imports nothing heavy.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from hasten.bench.pick import Gate, Target
from hasten.config import Device, option, scheme_named
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
class ReportConfig:
    """What `report` writes up."""

    results: tuple[Path, ...] = option((), "a run folder, or result files with the baseline first")
    output: Path | None = option(
        None, "folder to write to; default the run folder, or report/", flags=("-o", "--output")
    )
    price_per_hour: float | None = option(None, "price of one such machine for an hour, for the savings")
    load: float | None = option(None, "output tokens a second that you must serve, for the savings")
