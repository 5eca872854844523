"""The baseline: what a user gets from `model.generate` of Hugging Face transformers.

Eager mode, SDPA attention, the library's own KV cache, one left-padded batch of requests at a
time. Nothing is made slower or faster than the library is. Its generation loop pushes tokens
into a streamer, so it runs in a thread of its own and its tokens come out through a queue; each
is stamped in that thread.

Requests are batched only with requests that sample alike, because `generate` takes one set of
sampling parameters. Presence and frequency penalties do not exist there and are refused.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hasten.config import scheme_named
from hasten.errors import ModelError, UnsupportedModelError, WeightsError
from hasten.request import Request, SamplingParams, TokenEvent
from hasten.runtimes.base import Capabilities, OnLoading, OperatorSample, Runtime, RuntimeConfig
from hasten.runtimes.continuation import Continuation, ModelLimits, admit, eos_token_ids, error_events
from hasten.runtimes.module_ranges import GenerationPhases, modules_named
from hasten.runtimes.torch_profile import peak_device_bytes, record_trace, sample_operators

MAX_SCORE_BYTES = 256 * 2**20  # float32 logits that are held at once

Emit = Callable[[TokenEvent | None], None]


class TransformersRuntime(Runtime):
    """`AutoModelForCausalLM` in one dtype."""

    name: ClassVar[str] = "transformers"
    capabilities: ClassVar[Capabilities] = Capabilities(
        schemes=("fp32", "bf16", "fp16"),
        samples=True,
        in_flight=False,
        cancels=True,
        loads_source=True,
        devices=("cpu", "cuda"),
    )

    def __init__(self, config: RuntimeConfig, on_loading: OnLoading | None = None) -> None:
        super().__init__(config)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._model = load_model(config)
        vocab_size = self._model.get_input_embeddings().num_embeddings
        self._limits = ModelLimits(
            vocab_size, config.max_model_tokens, eos_token_ids(config.model), samples=True, has_logprobs=True
        )
        self.weight_bytes_per_token = sum(
            module.weight.numel() * module.weight.element_size()
            for module in self._model.modules()
            if isinstance(module, torch.nn.Linear)
        )
        self._cancelled: set[str] = set()
        self._phases = GenerationPhases(on_gpu=self._model.device.type == "cuda")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    def generate(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        self._cancelled.clear()
        queue: SimpleQueue[TokenEvent | None] = SimpleQueue()
        done = self._thread.submit(self._run, requests, queue.put)
        try:
            while (event := queue.get()) is not None:
                yield event
        finally:
            self._cancelled |= {request.request_id for request in requests}  # the caller may stop listening
            done.result()

    def score(self, token_ids: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        bytes_each = len(token_ids[0]) * self._limits.vocab_size * 4 if token_ids else 1
        batch_size = max(1, MAX_SCORE_BYTES // bytes_each)
        for start in range(0, len(token_ids), batch_size):
            with torch.inference_mode():
                batch = torch.tensor(token_ids[start : start + batch_size], device=self._model.device)
                logits = self._model(input_ids=batch, use_cache=False).logits  # [batch, length, vocab_size]
                logprobs = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
            yield from logprobs

    def trace(self, requests: Sequence[Request]) -> tuple[OperatorSample, ...]:
        return self._thread.submit(sample_operators, lambda: self._quietly(requests)).result()

    def record(self, requests: Sequence[Request], path: Path) -> bool:
        self._thread.submit(self._record, requests, path).result()
        return True

    def peak_device_bytes(self, *, reset: bool = False) -> int | None:
        return peak_device_bytes(self.config.device, reset)

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)

    def close(self) -> None:
        self._thread.shutdown()

    def _quietly(self, requests: Sequence[Request]) -> None:
        self._cancelled.clear()
        self._run(requests, lambda event: None)

    def _record(self, requests: Sequence[Request], path: Path) -> None:
        with modules_named(self._model):
            record_trace(lambda: self._quietly(requests), path, self.config.device)

    def _run(self, requests: Sequence[Request], emit: Emit) -> None:
        """Runs requests batch after batch; the last thing emitted is None."""
        try:
            admitted, refused = admit(requests, self._limits)
            served: list[Continuation] = []
            for continuation in admitted:
                sampling = continuation.request.sampling
                if sampling.presence_penalty or sampling.frequency_penalty:
                    if continuation.index == 0:
                        refused.append((continuation.request, "transformers has no presence or frequency penalty"))
                else:
                    served.append(continuation)
            for event in error_events(refused, time.perf_counter()):
                emit(event)
            for batch in _batches(served, self.config.max_num_seqs):
                self._run_batch(batch, emit)
        finally:
            emit(None)

    def _run_batch(self, batch: Sequence[Continuation], emit: Emit) -> None:
        prompts = [continuation.request.prompt_token_ids for continuation in batch]
        width = max(len(prompt) for prompt in prompts)
        input_ids = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in prompts])
        attention_mask = torch.tensor([(0,) * (width - len(prompt)) + (1,) * len(prompt) for prompt in prompts])
        recorder = _Recorder(batch, self._cancelled, emit, self._phases)
        sampling = batch[0].request.sampling
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        with torch.inference_mode(), self._phases.follow(self._model):
            self._model.generate(
                input_ids=input_ids.to(self._model.device),
                attention_mask=attention_mask.to(self._model.device),
                generation_config=_generation_config(sampling, max(each.max_tokens for each in batch)),
                logits_processor=LogitsProcessorList([recorder.logprobs] if recorder.logprobs else []),
                stopping_criteria=StoppingCriteriaList([_AllOver(batch)]),
                streamer=recorder,
            )


def load_model(config: RuntimeConfig) -> Any:
    """The model in eval mode with nothing left uninitialized.

    Raises:
        ModelError: the folder cannot be read as a causal language model.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=getattr(torch, scheme_named(config.scheme).activation),
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OSError as error:
        raise ModelError(f"transformers cannot load {config.model}: {_first_line(error)}") from error
    except ValueError as error:
        raise UnsupportedModelError(f"transformers does not run {config.model}: {_first_line(error)}") from error
    except RuntimeError as error:
        raise WeightsError(f"the weights in {config.model} do not fit its config: {_first_line(error)}") from error
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise WeightsError(f"{config.model} has no weights for {missing[0]} and {len(missing) - 1} more tensors")
    model.generation_config = GenerationConfig()  # the model's own defaults must not change what a request asks
    return model.to(config.device).eval()


def _batches(continuations: Sequence[Continuation], max_num_seqs: int) -> Iterator[Sequence[Continuation]]:
    groups: dict[Hashable, list[Continuation]] = {}
    for continuation in continuations:
        groups.setdefault(_batch_key(continuation.request), []).append(continuation)
    for group in groups.values():
        for start in range(0, len(group), max_num_seqs):
            yield group[start : start + max_num_seqs]


def _batch_key(request: Request) -> Hashable:
    """Requests with equal keys may share one call of `generate`."""
    sampling = request.sampling
    shared = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
    alone = None if sampling.is_greedy or sampling.seed is None else request.request_id
    # the repetition penalty would count padding as repeated tokens
    length = len(request.prompt_token_ids) if sampling.repetition_penalty != 1.0 else None
    return (shared, alone, length, sampling.logprobs)


def _generation_config(sampling: SamplingParams, max_tokens: int) -> GenerationConfig:
    chosen: dict[str, Any] = {"do_sample": False}
    if not sampling.is_greedy:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }
    return GenerationConfig(
        max_new_tokens=max_tokens, repetition_penalty=sampling.repetition_penalty, pad_token_id=0, **chosen
    )


class _Recorder(BaseStreamer):
    """Stamps each step's tokens and emits them as events of the continuations that still run."""

    def __init__(
        self, batch: Sequence[Continuation], cancelled: set[str], emit: Emit, phases: GenerationPhases
    ) -> None:
        self._batch = batch
        self._cancelled = cancelled
        self._emit = emit
        self._phases = phases
        self._is_prompt = True
        num_logprobs = batch[0].request.sampling.logprobs
        self.logprobs = _LogprobTap(num_logprobs) if num_logprobs is not None else None

    def put(self, value: torch.Tensor) -> None:
        """Takes [batch] token ids; the first call brings the prompts."""
        if self._is_prompt:
            self._is_prompt = False
            return
        time_s = time.perf_counter()
        self._phases.leave()
        for row, (continuation, token_id) in enumerate(zip(self._batch, value.tolist(), strict=True)):
            if continuation.finish_reason is not None:
                continue
            if continuation.request.request_id in self._cancelled:
                self._emit(continuation.cancel(time_s))
            elif self.logprobs is None:
                self._emit(continuation.accept(token_id, time_s))
            else:
                self._emit(continuation.accept(token_id, time_s, *self.logprobs.of(row, token_id)))

    def end(self) -> None:
        """All that had to be said was said token by token."""


class _LogprobTap(LogitsProcessor):
    """Reads log-probabilities after penalties and before temperature, changing nothing."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._logprobs = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._logprobs = torch.log_softmax(scores, dim=-1)  # [batch, vocab_size]
        return scores

    def of(self, row: int, token_id: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        values, token_ids = self._logprobs[row].topk(self._num_top)
        top = tuple(zip(token_ids.tolist(), values.tolist(), strict=True))
        return float(self._logprobs[row, token_id]), top


class _AllOver(StoppingCriteria):
    """Tells `generate` which rows are over, from what the recorder decided."""

    def __init__(self, batch: Sequence[Continuation]) -> None:
        self._batch = batch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        is_over = [each.finish_reason is not None for each in self._batch]
        if not any(is_over):  # a copy to the GPU would make the loop wait for it once more in every step
            return torch.zeros(len(is_over), dtype=torch.bool, device=input_ids.device)
        return torch.tensor(is_over, device=input_ids.device)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
