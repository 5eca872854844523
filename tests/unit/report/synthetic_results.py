"""Results that look like measured ones: nine candidates on two cores, every sample seeded."""

import random
from dataclasses import replace

from hasten.bench.result import (
    BenchConfig,
    BenchResult,
    BenchRun,
    Candidate,
    Environment,
    Footprint,
    Load,
    Memory,
    ModelInfo,
    Objective,
    OperatorTime,
    ProfileResult,
    Quality,
    RequestRecord,
)
from hasten.bench.served import Served

MIB = 2**20
MODEL = ModelInfo("Qwen2.5-0.5B", "sha256:4f1c9a2be7d0", "Qwen2ForCausalLM", 494_032_768, 357_897_216, 32768, 151936)
ENVIRONMENT = Environment(
    hostname_hash="b2c91f",
    cpu="AMD EPYC 9554 64-Core Processor",
    num_cpus=2,
    cpu_flags=("avx2", "avx512f", "avx512_bf16", "avx512_vnni"),
    memory_bytes=24 * 2**30,
    os="Debian GNU/Linux 12 (bookworm)",
    python="3.11.2",
    gpus=(),
    read_bandwidth_bytes_per_s=28.4e9,
    versions={"torch": "2.13.0+cpu", "transformers": "5.17.0", "onnxruntime-genai": "0.18.0", "numpy": "2.4.0"},
)

# candidate: tpot s, ttft s, scaling at 8, peak MiB, disk MiB, weight MiB a token, load s, perplexity, KL, top-1, match
FIGURES: dict[tuple[str, str], tuple[float, ...]] = {
    ("transformers", "fp32"): (0.152, 0.807, 0.40, 3290, 988, 1976, 4.1, 14.210, 0.0, 1.0, 64),
    ("transformers", "bf16"): (0.104, 0.444, 0.46, 1441, 988, 988, 2.2, 14.222, 0.00071, 0.985, 58),
    ("native", "fp32"): (0.0781, 0.610, 0.62, 2890, 1977, 1976, 3.1, 14.210, 0.0000004, 1.0, 64),
    ("native", "bf16"): (0.0412, 0.352, 0.68, 1312, 989, 988, 1.6, 14.221, 0.00069, 0.986, 59),
    ("native", "w8a16"): (0.0229, 0.402, 0.71, 782, 502, 494, 1.0, 14.247, 0.0019, 0.973, 47),
    ("native", "w4a16"): (0.0148, 0.436, 0.66, 547, 296, 265, 0.8, 14.870, 0.0471, 0.884, 14),
    ("onnxruntime", "fp32"): (0.0731, 0.659, 0.58, 2975, 1977, 1976, 5.3, 14.210, 0.0000005, 1.0, 64),
    ("onnxruntime", "w8a16"): (0.0231, 0.590, 0.55, 848, 1102, 494, 2.4, 14.259, 0.0024, 0.969, 44),
    ("onnxruntime", "w4a16"): (0.0122, 0.441, 0.49, 515, 264, 255, 1.1, 15.310, 0.0780, 0.858, 11),
}
NINE = tuple(FIGURES)
OPERATOR_SHARES = (
    ("linear layers", 0.71, 169.0),
    ("attention", 0.11, 24.0),
    ("norm and activation", 0.06, 121.0),
    ("cache writes", 0.03, 48.0),
    ("sampling", 0.02, 6.0),
)


def bench_run(
    rng: random.Random, concurrency: int, round_index: int, *, ttft_s: float, tpot_s: float, new_tokens: int = 16
) -> BenchRun:
    """`concurrency` requests handed over together at time 100, with the machine's noise."""
    drift = rng.lognormvariate(0, 0.025)
    start_s = 100.0 + round_index
    requests = []
    for index in range(concurrency):
        first = start_s + ttft_s * drift * (0.55 + 0.45 * (index + 1) / concurrency) * rng.lognormvariate(0, 0.03)
        times = [first]
        for _ in range(new_tokens - 1):
            times.append(times[-1] + tpot_s * drift * rng.lognormvariate(0, 0.05))
        requests.append(RequestRecord(f"r{index}", 128, start_s, tuple(times), "length"))
    end_s = max(request.token_times_s[-1] for request in requests)
    return BenchRun(concurrency, round_index, start_s, end_s, (end_s - start_s) * 1.93, tuple(requests))


def result(
    runtime: str = "native",
    scheme: str = "w8a16",
    concurrency: tuple[int, ...] = (1, 2, 4, 8),
    num_runs: int = 10,
    with_profile: bool = True,
) -> BenchResult:
    """One candidate, measured to the end."""
    figures = FIGURES.get((runtime, scheme), FIGURES["native", "w8a16"])
    tpot, ttft, scaling, peak, disk, weight, load, perplexity, kl, top1, match = figures
    rng = random.Random(f"{runtime}-{scheme}")
    runs = []
    for level in concurrency:
        efficiency = 1 - (1 - scaling) * (level - 1) / 7
        level_ttft = ttft * (1 + 0.62 * (level - 1))
        for round_index in range(num_runs):
            runs.append(bench_run(rng, level, round_index, ttft_s=level_ttft, tpot_s=tpot / efficiency))
    operators = [OperatorTime(group, tpot * share, calls) for group, share, calls in OPERATOR_SHARES]
    rest = tpot - sum(operator.time_s for operator in operators)
    profile = ProfileResult(
        step_s=tpot,
        operators=(*operators, OperatorTime("outside operators", rest, 0.0)),
        bottleneck=f"Memory bandwidth: 71 % of a step is in linear layers, which read {weight} MiB of weights.",
    )
    text = "hasten's held-out text"
    return BenchResult(
        candidate=Candidate(runtime, scheme),
        model=MODEL,
        environment=ENVIRONMENT,
        config=BenchConfig(128, 16, concurrency, num_runs, 2, 2, 0),
        command=f"hasten bench offline Qwen2.5-0.5B --runtime {runtime} --scheme {scheme} --prompt-tokens 128",
        created_at="2026-11-20T14:03:11+00:00",
        hasten_version="0.1.0",
        runs=tuple(runs),
        footprint=Footprint(round(disk * MIB), round(weight * MIB), 0.0 if runtime == "transformers" else 11.4, load),
        memory=Memory(round(peak * 0.93 * MIB), round(peak * MIB)),
        quality=Quality(perplexity, 0.92, kl, top1, match, 64, 8192, text),
        profile=profile if with_profile and runtime != "onnxruntime" else None,
        missing={}
        if with_profile and runtime != "onnxruntime"
        else {"profile": "onnxruntime-genai has no operator trace"},
    )


def nine_results() -> list[BenchResult]:
    """Baseline first, four concurrencies."""
    return [result(runtime, scheme) for runtime, scheme in NINE]


HOSTILE = "<script>alert('x')</script>|`&$_\"^{2}"


def served(measured: BenchResult, share: float = 0.95) -> Served:
    """A candidate beside itself over HTTP, with a share of its speed."""

    def slowed(run: BenchRun) -> BenchRun:
        def at(time_s: float) -> float:
            return run.start_s + (time_s - run.start_s) / share

        requests = tuple(
            replace(each, token_times_s=tuple(map(at, each.token_times_s)), submitted_s=at(each.submitted_s))
            for each in run.requests
        )
        return replace(run, end_s=at(run.end_s), requests=requests, client_share=0.1)

    load = Load("http://127.0.0.1:39211", "completions", "closed", None, 1, "text", "128", "16", Objective())
    over_http = replace(
        measured,
        config=replace(measured.config, load=load),
        runs=tuple(map(slowed, measured.runs)),
        command="hasten serve runs/qwen & hasten bench online http://127.0.0.1:8000",
        footprint=None,
        quality=None,
        profile=None,
        missing={"quality": "bench online measures speed only"},
    )
    return Served(over_http, measured)


def partial_results() -> list[BenchResult]:
    """What goes wrong in practice: a failure, no quality, no runs, failed requests, one token, hostile names."""
    baseline = result("transformers", "fp32", with_profile=False)
    failed = replace(
        result("onnxruntime", "w4a16"),
        runs=(),
        footprint=None,
        memory=None,
        quality=None,
        profile=None,
        missing={},
        failure="the process ended with code -9 (out of memory)",
    )
    no_quality = replace(result("native", "bf16"), quality=None, missing={"quality": "the held-out text is too short"})
    no_memory = replace(result("native", "w8a16"), memory=None, footprint=None, missing={"memory": HOSTILE})
    refused = tuple(
        replace(run, requests=tuple(replace(each, finish_reason="error", error="refused") for each in run.requests))
        if run.concurrency == 8
        else run
        for run in result("native", "fp32").runs
    )
    no_tpot = tuple(
        replace(run, requests=tuple(replace(each, token_times_s=each.token_times_s[:1]) for each in run.requests))
        for run in result("llama_cpp", "w8a16").runs
    )
    hostile = Candidate(HOSTILE, "w4a16")
    return [
        baseline,
        failed,
        no_quality,
        no_memory,
        replace(result("native", "fp32"), runs=refused),
        replace(result("llama_cpp", "w8a16"), candidate=Candidate("llama_cpp", "w8a16"), runs=no_tpot),
        replace(result("native", "w4a16"), candidate=hostile, command=f"hasten bench {HOSTILE}"),
    ]


def failed(measured: BenchResult) -> BenchResult:
    """The same candidate, of which nothing could be measured."""
    return replace(
        measured, runs=(), footprint=None, memory=None, quality=None, profile=None, failure="out of memory", missing={}
    )


def renamed(measured: BenchResult, candidate: Candidate) -> BenchResult:
    return replace(measured, candidate=candidate)
