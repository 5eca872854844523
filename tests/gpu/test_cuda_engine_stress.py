"""Thousands of random requests, cancelled at random: each ends once, and nothing of them is left."""

import logging
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from engine_harness import load_engine, prompt, write_model

from engines import check_all_free, run, tokens_of
from hasten.request import Request, SamplingParams, TokenEvent

logger = logging.getLogger(__name__)
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

MOST_QUEUED = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    return write_model(tmp_path_factory.mktemp("model"), "llama", **changes)


def random_request(number: int, draw: random.Random) -> Request:
    sampling: dict[str, object] = {"max_tokens": draw.choice((1, 3, 10, 30, 90)), "n": draw.choice((1, 1, 1, 2, 3))}
    if draw.random() < 0.5:
        sampling |= {"temperature": draw.choice((0.3, 1.0, 2.0)), "seed": number}
        sampling |= draw.choice(({}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 50, "top_p": 0.9}))
    if draw.random() < 0.2:
        sampling |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
    if draw.random() < 0.1:
        sampling |= {"logprobs": draw.choice((0, 3))}
    length = draw.choice((1, 5, 17, 40, 130)) + draw.randrange(10)
    shared = prompt(96, 0) if draw.random() < 0.2 else ()  # some begin alike and share blocks
    return Request(f"r{number}", shared + prompt(length, number), SamplingParams(**sampling))


@pytest.mark.parametrize(("scheme", "count"), [("bf16", 10_000), ("fp32", 2_000)])
def test_requests_cancelled_at_random_leave_nothing_behind(scheme: str, count: int, model: Path) -> None:
    draw = random.Random(count)
    engine = load_engine(model, scheme, max_num_seqs=64, num_blocks=60, max_num_batched_tokens=512)
    requests = [random_request(number, draw) for number in range(count)]
    waiting, alive = list(reversed(requests)), dict[str, Request]()
    ended: Counter[tuple[str, int]] = Counter()
    reasons: Counter[str] = Counter()
    output: dict[tuple[str, int], list[int | None]] = {}
    cancelled: set[str] = set()

    def note(event: TokenEvent) -> None:
        key = event.request_id, event.index
        assert event.error is None
        assert key not in ended, "nothing comes after the end"
        if event.token_id is not None:
            output.setdefault(key, []).append(event.token_id)
        if event.finish_reason is not None:
            ended[key] += 1
            reasons[event.finish_reason] += 1
            if all((event.request_id, index) in ended for index in range(alive[event.request_id].sampling.n)):
                del alive[event.request_id]

    while waiting or engine.has_unfinished:
        while waiting and len(alive) < MOST_QUEUED:
            request = waiting.pop()
            alive[request.request_id] = request
            engine.add_request(request)
        if alive and draw.random() < 0.1:
            for request_id in draw.sample(sorted(alive), min(len(alive), draw.choice((1, 1, 2, 8)))):
                if request_id not in cancelled:
                    cancelled.add(request_id)
                    engine.abort(request_id)
                    engine.abort(request_id)
        for event in engine.step():
            note(event)
        if draw.random() < 0.02:
            engine.scheduler.check_integrity()
    check_all_free(engine)
    assert set(ended) == {(each.request_id, index) for each in requests for index in range(each.sampling.n)}
    assert reasons["cancelled"] > count // 20
    assert reasons["length"] > count // 5
    assert reasons["stop"] > 0
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_prefix_hit_tokens > 0
    logger.info("%s: %s, %d preemptions", scheme, dict(reasons), engine.scheduler.num_preemptions)
    if scheme == "fp32":  # where a batch changes nothing: what was not cancelled has the tokens it has alone
        kept = [each for each in requests if each.request_id not in cancelled]
        for request in draw.sample(kept, 60):
            alone = tokens_of(run(engine, [request]))
            assert alone == {key: output[key] for key in alone}
