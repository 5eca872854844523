"""Grammars on the GPU: the masking kernel, and the CPU's tokens through the graphs of the whole engine."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from engines import run
from guided_checks import MODEL, check_json, guided, guided_engine, plain, tokens_in
from hasten.engine.engine import Engine
from hasten.kernels.cuda.sample import mask_rows
from hasten.models.load import load_decoder
from hasten.request import Grammar
from hasten.runtimes.text import load_tokenizer

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 5000},
        "tags": {"type": "array", "items": {"enum": ["red", "green", 7]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
WORDS = Grammar("regex", "([a-z]{2,9} ){4,12}")
PROMPT = "A JSON document with the settings of a program, as its manual shows it:\n\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def get_engine() -> Callable[..., Engine]:
    made: dict[tuple[str, str, int], Engine] = {}

    def get(scheme: str, device: str, max_num_seqs: int = 16) -> Engine:
        key = scheme, device, max_num_seqs
        if key not in made:
            made[key] = guided_engine(load_decoder(MODEL, scheme, device), max_num_seqs=max_num_seqs)
        return made[key]

    return get


@pytest.mark.parametrize("vocab_size", [31, 512, 4096, 32000, 128256, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_takes_what_is_not_allowed_from_its_rows_alone(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(9, vocab_size, generator=generator).to(dtype)
    rows = torch.tensor([7, 0, 3], dtype=torch.int32)
    words = torch.randint(-(2**31), 2**31, (3, -(-vocab_size // 32)), generator=generator, dtype=torch.int64).int()
    bits = np.unpackbits(words.numpy().view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    on_device = logits.cuda()
    mask_rows(on_device, rows.cuda(), words.cuda())
    for row, allowed in zip(rows.tolist(), torch.from_numpy(bits).bool(), strict=True):
        logits[row].masked_fill_(~allowed, -math.inf)
    assert torch.equal(on_device.cpu(), logits)


@pytest.mark.parametrize("max_num_seqs", [1, 16])
def test_tokens_are_those_of_the_cpu_beside_requests_without_a_grammar(
    get_engine: Callable[..., Engine], tokenizer: PreTrainedTokenizerFast, max_num_seqs: int
) -> None:
    prompt = tokenizer.encode(PROMPT)
    requests = [
        guided("json", prompt, JSON),
        guided("words", prompt[4:], WORDS, ignore_eos=True, max_tokens=40),
        guided("penalties", prompt[2:], WORDS, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=40),
        guided("drawn", prompt, JSON, temperature=1.0, seed=5, n=3),
        guided("filtered", prompt[1:], JSON, temperature=0.8, seed=6, top_k=20, top_p=0.9, n=2),
        guided("long prompt", prompt * 40, WORDS, max_tokens=40),
        plain("plain", prompt),
        plain("other", prompt[3:], max_tokens=90),
    ]
    on_gpu, on_cpu = (run(get_engine("fp32", device, max_num_seqs), requests) for device in ("cuda", "cpu"))
    assert {key: tokens_in(events) for key, events in on_gpu.items()} == {
        key: tokens_in(events) for key, events in on_cpu.items()
    }
    for name in ("json", "drawn", "filtered"):
        for (request_id, _), events in on_gpu.items():
            if request_id == name:
                check_json(tokenizer, SCHEMA, events)


@pytest.mark.parametrize("scheme", ["bf16", "w8a16"])
@pytest.mark.parametrize("num_plain", [0, 1, 24])
def test_many_outputs_at_once_match_their_grammars(
    get_engine: Callable[..., Engine], tokenizer: PreTrainedTokenizerFast, scheme: str, num_plain: int
) -> None:
    prompt = tokenizer.encode(PROMPT)
    engine = get_engine(scheme, "cuda", 32)
    requests = [guided(f"r{i}", prompt[i % 7 :], JSON, temperature=i % 2 * 1.0, seed=i) for i in range(40)]
    events = run(engine, [*requests, *(plain(f"plain{i}", prompt[i % 5 :], 100) for i in range(num_plain))])
    complete = [check_json(tokenizer, SCHEMA, events[f"r{i}", 0]) for i in range(40)]
    assert sum(complete) >= 20
    assert all(len(tokens_in(events[f"plain{i}", 0])) == 100 for i in range(num_plain))


def test_logprobs_are_of_the_tokens_that_are_allowed(
    get_engine: Callable[..., Engine], tokenizer: PreTrainedTokenizerFast
) -> None:
    request = guided("r", tokenizer.encode(PROMPT), Grammar("regex", "[a-f]{12}"), logprobs=20, temperature=1.0, seed=1)
    [events] = run(get_engine("bf16", "cuda"), [request]).values()
    for event in events[:-1]:
        assert event.token_id is not None
        assert all(set(tokenizer.decode([token_id])) <= set("abcdef") for token_id, _ in event.top_logprobs)
        assert event.logprob is not None
        assert math.isfinite(event.logprob)
    assert events[-1].finish_reason == "stop"
