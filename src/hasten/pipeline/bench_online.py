"""`bench online`: the speed of a server, ours or another, over HTTP or gRPC."""

import datetime
import math
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from hasten.artifact import inspect
from hasten.bench.arrivals import Lengths, read_trace
from hasten.bench.http_stream import Address
from hasten.bench.load import LoadGenerator
from hasten.bench.metrics import has_failed
from hasten.bench.online import MAX_IN_FLIGHT, Moment, Plan, measure_server
from hasten.bench.probe import Probe, probe
from hasten.bench.prompts import PromptSource
from hasten.bench.result import BenchConfig, BenchResult, BenchRun, Candidate, Load, Memory, ModelInfo, Objective
from hasten.bench.server_usage import NotFoundError, ServerMeter, find_server
from hasten.errors import ModelError, RequestError, UsageError
from hasten.evaluate.held_out import held_out_text
from hasten.extras import require
from hasten.hardware import count_cpus
from hasten.hardware import probe as probe_hardware
from hasten.pipeline.config import OnlineConfig
from hasten.pipeline.describe import command_line, describe_environment, model_info
from hasten.pipeline.progress import OnProgress, Schedule, silent
from hasten.runtimes.text import load_tokenizer

EXPECTED_S = 60.0
REQUESTS_PER_CLIENT = 4
OPEN_LOOP_S = 10.0
PROBE_UNITS = 100
WORDS_PER_TOKEN = 0.75  # of English, where the server does not count
NOT_TOLD = "a server does not tell"


def bench_online(
    config: OnlineConfig, on_progress: OnProgress = silent, on_run: Callable[[BenchRun], object] = lambda run: None
) -> BenchResult:
    """Measures TTFT, ITL, throughput and goodput of a server at each concurrency or at one rate.

    Ctrl-C lets the requests under way finish and returns what is measured; a second one at once.

    Args:
        on_run: gets each measured run; the next begins when it returns.

    Raises:
        UsageError, EndpointError: the server cannot be used as the options say.
        RequestError: the lengths do not fit the model's context.
        MissingExtraError: what the load generator needs is not installed.
    """
    address = Address.from_url(config.url, _key(config.api_key_file))
    require("tritonclient.grpc" if address.is_grpc else "httptools")
    plan = _plan(config)
    schedule = Schedule(on_progress)
    schedule.expect("speed", EXPECTED_S)
    schedule.show("prepare", f"asking {address.url}")
    source = _prompt_source(config)
    found = probe(address, config.api, config.model, source.decode(source.unit_ids[:PROBE_UNITS]), config.timeout)
    _check_length(plan, found)
    missing = {"quality": "bench online measures speed only", "footprint": NOT_TOLD, **found.missing}
    if not source.is_tokens and found.num_prompt_tokens is not None:
        source = source.measured(PROBE_UNITS, found.num_prompt_tokens)
    elif not source.is_tokens:
        missing["prompt_tokens"] = f"the server does not count prompts: a token is taken for {WORDS_PER_TOKEN} words"
        source = source.measured(3, 4)
    meter = _meter(address, missing)
    runs: list[BenchRun] = []
    try:
        with LoadGenerator(address, found.endpoint, config.clients or count_cpus()) as generator:
            for run in measure_server(generator, plan, source, meter, lambda moment: _show(schedule, moment)):
                runs.append(run)
                on_run(run)
    except KeyboardInterrupt:
        if not runs:
            raise
    num_planned = plan.num_runs * len(plan.concurrency)
    failure = _failure(runs)
    if not runs:
        raise KeyboardInterrupt  # in a warm-up
    if failure is None and len(runs) < num_planned:
        missing["runs"] = f"stopped by Ctrl-C after {len(runs)} of {num_planned} runs"
    return BenchResult(
        candidate=Candidate(config.name or address.netloc, ""),
        model=_model(config, found, missing),
        environment=describe_environment(probe_hardware(with_bandwidth=False), ""),
        config=_bench_config(config, plan, address, meter),
        command=command_line(),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        hasten_version=metadata.version("hasten"),
        runs=tuple(runs),
        memory=None if meter is None else Memory(meter.loaded_rss_bytes, meter.peak_rss_bytes),
        failure=failure,
        missing=missing,
    )


def _plan(config: OnlineConfig) -> Plan:
    trace = () if config.trace is None else read_trace(config.trace)
    is_open_loop = config.rate is not None or bool(trace)
    num_requests = config.requests or REQUESTS_PER_CLIENT
    if trace:
        num_requests = len(trace)
    elif config.rate is not None:
        num_requests = config.requests or math.ceil(config.rate * OPEN_LOOP_S)
    return Plan(
        prompt_lengths=Lengths.parse(config.prompt_tokens, "--prompt-tokens"),
        output_lengths=Lengths.parse(config.new_tokens, "--new-tokens"),
        concurrency=(MAX_IN_FLIGHT,) if is_open_loop else tuple(dict.fromkeys(config.concurrency)),
        num_requests=num_requests,
        num_runs=config.runs,
        num_warmup=config.warmup,
        seed=config.seed,
        timeout_s=config.timeout,
        rate_per_s=config.rate,
        arrivals=config.arrivals,
        trace=trace,
        is_random=config.prompts == "random",
        as_ids=config.prompts == "random" and config.tokenizer is not None and config.api == "completions",
    )


def _prompt_source(config: OnlineConfig) -> PromptSource:
    text = held_out_text(config.tokenizer).text
    if config.tokenizer is None:
        return PromptSource.of_words(text)
    tokenizer = load_tokenizer(config.tokenizer)
    return PromptSource.of_tokens(text, tokenizer, len(tokenizer))


def _key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the API key in {path}: {error}") from error
    if not lines:
        raise UsageError(f"the API key file {path} is empty")
    return lines[0]


def _check_length(plan: Plan, found: Probe) -> None:
    if plan.trace:
        longest = max(line.prompt_tokens + line.output_tokens for line in plan.trace)
    else:
        longest = plan.prompt_lengths.high + plan.output_lengths.high
    if found.max_context_tokens is not None and longest > found.max_context_tokens:
        raise RequestError(
            f"the longest request may have {longest} tokens, and the model's context at the server ends at "
            f"{found.max_context_tokens}: ask for shorter prompts or outputs"
        )


def _meter(address: Address, missing: dict[str, str]) -> ServerMeter | None:
    try:
        meter = ServerMeter(find_server(address.host, address.port))
    except NotFoundError as error:
        missing.update(dict.fromkeys(("cpu", "memory", "gpu"), str(error)))
        return None
    if meter.gpus is None:
        missing["gpu"] = meter.why_no_gpu
    return meter


def _show(schedule: Schedule, moment: Moment) -> None:
    if moment.remaining_s is not None:
        schedule.expect("speed", moment.remaining_s)
    run = f"run {moment.num_runs_done + 1} of {moment.num_runs}"
    load = "open loop" if moment.concurrency == MAX_IN_FLIGHT else f"concurrency {moment.concurrency}"
    schedule.show("speed", f"{run}, {load}, {moment.num_ended} of {moment.num_requests} requests")


def _failure(runs: list[BenchRun]) -> str | None:
    """Why the server answered none of the last run's requests; None if it answered any."""
    last = runs[-1].requests if runs else ()
    if not last or not all(has_failed(record) for record in last):
        return None
    [(reason, _)] = Counter(record.error or record.finish_reason for record in last).most_common(1)
    return f"no request of a run was answered: {reason}"


def _model(config: OnlineConfig, found: Probe, missing: dict[str, str]) -> ModelInfo:
    if config.tokenizer is None:
        missing["model"] = f"{NOT_TOLD}; --tokenizer MODEL_FOLDER does"
    else:
        try:
            return model_info(inspect(config.tokenizer))
        except ModelError as error:
            missing["model"] = str(error)
    return ModelInfo(found.model, max_context_tokens=found.max_context_tokens)


def _bench_config(config: OnlineConfig, plan: Plan, address: Address, meter: ServerMeter | None) -> BenchConfig:
    device = "unknown" if meter is None else "cpu" if meter.gpus is None else "cuda"
    prompt_mean, output_mean = plan.prompt_lengths.mean, plan.output_lengths.mean
    prompt_text, output_text = plan.prompt_lengths.text, plan.output_lengths.text
    rate_per_s = plan.rate_per_s
    if plan.trace:
        prompt_text = output_text = f"of {config.trace}"
        prompt_mean = sum(line.prompt_tokens for line in plan.trace) / len(plan.trace)
        output_mean = sum(line.output_tokens for line in plan.trace) / len(plan.trace)
        span_s = plan.trace[-1].arrival_s - plan.trace[0].arrival_s
        rate_per_s = len(plan.trace) / span_s if span_s > 0 else None
    load = Load(
        url=address.url,
        api=config.api,
        arrivals="trace" if plan.trace else "closed" if rate_per_s is None else plan.arrivals,
        rate_per_s=rate_per_s,
        requests_per_run=plan.num_requests,
        prompts=config.prompts,
        prompt_lengths=prompt_text,
        output_lengths=output_text,
        objective=Objective(
            _seconds(config.slo_ttft_ms), _seconds(config.slo_tpot_ms), _seconds(config.slo_latency_ms)
        ),
    )
    return BenchConfig(
        prompt_tokens=max(1, round(prompt_mean)),
        new_tokens=max(1, round(output_mean)),
        concurrency=plan.concurrency,
        num_runs=plan.num_runs,
        num_warmup=plan.num_warmup,
        num_threads=None,
        seed=plan.seed,
        device=device,
        load=load,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
