"""Builds results with chosen speeds and quality, for the tests of this folder."""

from collections.abc import Sequence

from hasten.bench.result import (
    BenchConfig,
    BenchResult,
    BenchRun,
    Candidate,
    Environment,
    Footprint,
    Memory,
    ModelInfo,
    Quality,
    RequestRecord,
)


def make_run(
    token_gap_s: float,
    *,
    ttft_s: float = 0.1,
    num_tokens: int = 5,
    concurrency: int = 1,
    round_index: int = 0,
    start_s: float = 10.0,
    finish_reason: str = "length",
) -> BenchRun:
    """Every request gets its first token after ttft_s and the others token_gap_s apart."""
    times = tuple(start_s + ttft_s + token_gap_s * index for index in range(num_tokens))
    requests = tuple(
        RequestRecord(f"r{round_index}-{index}", 8, start_s, times, finish_reason) for index in range(concurrency)
    )
    return BenchRun(concurrency, round_index, start_s, times[-1], 2 * (times[-1] - start_s), requests)


def make_quality(perplexity: float = 10.0, mean_kl: float = 0.0) -> Quality:
    return Quality(perplexity, 1.5, mean_kl, 0.99, 60.0, 64, 512, "pydoc")


def make_result(
    runtime: str,
    scheme: str,
    gaps_s: Sequence[float],
    *,
    quality: Quality | None = None,
    failure: str | None = None,
    peak_rss_bytes: int = 1000,
    runs: Sequence[BenchRun] | None = None,
    concurrency: tuple[int, ...] = (1,),
    prompt_tokens: int = 8,
) -> BenchResult:
    """One run for each gap at each concurrency, unless `runs` are given."""
    if runs is None:
        runs = [
            make_run(gap, concurrency=each, round_index=index)
            for each in concurrency
            for index, gap in enumerate(gaps_s)
        ]
    return BenchResult(
        candidate=Candidate(runtime, scheme),
        model=ModelInfo("tiny", "abc", "LlamaForCausalLM", 1000, 800, 128, 256),
        environment=Environment("h", "cpu", 2, ("avx2",), 1 << 30, "Linux", "3.11", (), 1e9, {"torch": "2.13"}),
        config=BenchConfig(prompt_tokens, 5, concurrency, len(gaps_s) or 1, 1, 2, 0),
        command="hasten optimize tiny",
        created_at="2026-11-21T00:00:00Z",
        hasten_version="0.1.0",
        runs=tuple(runs),
        footprint=Footprint(2000, 1_000_000, 0.0, 1.0),
        memory=Memory(500, peak_rss_bytes),
        quality=quality,
        failure=failure,
    )
