"""What every candidate of a run is measured with: the same text, the same requests, one process each."""

from dataclasses import dataclass
from pathlib import Path

from hasten.artifact import ModelRef
from hasten.bench.result import BenchConfig, Candidate
from hasten.bench.workload import PlannedRun, sample_requests
from hasten.errors import RequestError
from hasten.evaluate.held_out import EvaluationSet, held_out_text, sample_windows
from hasten.hardware import count_cpus
from hasten.pipeline.config import BenchOptions
from hasten.pipeline.progress import Schedule
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.process import RuntimeProcess
from hasten.runtimes.text import load_tokenizer

MIN_MODEL_TOKENS = 512  # room for the windows of the held-out text


@dataclass(frozen=True)
class Yardstick:
    """The text that quality is measured on and the requests that speed is measured with."""

    material: EvaluationSet
    runs: tuple[PlannedRun, ...]


def make_yardstick(model: ModelRef, bench: BenchConfig, max_context_tokens: int) -> Yardstick:
    """Draws windows and prompts from the model's held-out text.

    Raises:
        TokenizerError: the model has no usable tokenizer. ModelError: the text is too short.
    """
    tokenizer = load_tokenizer(model.path)
    text = held_out_text(model.path)
    room = min(max_context_tokens, model_tokens(bench, max_context_tokens))
    return Yardstick(
        material=sample_windows(text, tokenizer, model.vocab_size, room),
        runs=sample_requests(
            bench,
            min(model.vocab_size, len(tokenizer)),
            tokenizer.encode(text.text, add_special_tokens=False),
            tokenizer.all_special_ids,
        ),
    )


def model_tokens(bench: BenchConfig, max_context_tokens: int) -> int:
    """Tokens of one request that a runtime must have room for."""
    return min(max_context_tokens, max(bench.prompt_tokens + bench.new_tokens, MIN_MODEL_TOKENS))


def launch(
    candidate: Candidate,
    artifact: Path,
    bench: BenchConfig,
    max_context_tokens: int,
    schedule: Schedule,
    log_path: Path | None = None,
) -> RuntimeProcess:
    """Loads a candidate in a process of its own.

    Raises:
        HastenError: it cannot be loaded.
    """
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
    config = RuntimeConfig(
        model=artifact,
        scheme=candidate.scheme,
        max_num_seqs=max(bench.concurrency),
        max_model_tokens=model_tokens(bench, max_context_tokens),
        num_threads=bench.num_threads,
        device=bench.device,
    )
    with schedule.loading(candidate.name) as on_loading:
        return RuntimeProcess(candidate.runtime, config, log_path, on_loading)


def check_length(options: BenchOptions, max_context_tokens: int) -> None:
    """Raises RequestError if prompt and output together are longer than the model's context."""
    longest = options.prompt_tokens + options.new_tokens
    if longest > max_context_tokens:
        raise RequestError(
            f"{options.prompt_tokens} prompt tokens and {options.new_tokens} new ones are {longest}, and the model's "
            f"context ends at {max_context_tokens}: lower --prompt-tokens or --new-tokens"
        )


def bench_config(options: BenchOptions, num_runs: int, device: str) -> BenchConfig:
    """The options as every result records them, with the number of threads and the device filled in."""
    return BenchConfig(
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        concurrency=options.concurrency,
        num_runs=num_runs,
        num_warmup=options.warmup,
        num_threads=options.threads or count_cpus(),
        seed=options.seed,
        device=device,
    )
