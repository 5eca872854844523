"""The shipped model in an engine with grammars, random JSON schemas, and what their outputs must be."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jsonschema
from transformers import PreTrainedTokenizerFast

from hasten.engine.config import EngineConfig
from hasten.engine.engine import Engine
from hasten.engine.grammar import GrammarCompiler, read_tokenizer
from hasten.engine.runners import make_runner
from hasten.kernels.kv_cache import allocate_kv_cache
from hasten.models.decoder import Decoder
from hasten.request import Grammar, Request, SamplingParams, TokenEvent

MODEL = Path(__file__).parents[1] / "examples" / "models" / "tiny-llama"
EOS = (0, 3)

Events = dict[tuple[str, int], list[TokenEvent]]

_KEYS = ("name", "age", "x y", "ключ", 'quo"te')
_LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number", "minimum": 0, "maximum": 9}]),
    st.builds(
        lambda low, width: {"type": "integer", "minimum": low, "maximum": low + width},
        st.integers(-50, 50),
        st.integers(0, 2000),
    ),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    st.sampled_from(["^[a-c]{1,3}$", "^(yes|no)$", "^[0-9]{4}-[0-9]{2}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.lists(st.sampled_from(["red", 7, None, "a b", -1.5, True]), min_size=1, max_size=4, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from(["text", 3, {"k": [1]}]).map(lambda value: {"const": value}),
)


def _compound(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    arrays = st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    objects = st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties) or ["-"])).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required & properties.keys()),
                "additionalProperties": False,
            }
        )
    )
    choices = st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
    return arrays | objects | choices


SCHEMAS = st.recursive(_LEAVES, _compound, max_leaves=6)


def make_engine(decoder: Decoder, **limits: Any) -> Engine:
    config = EngineConfig(
        **{"num_blocks": 512, "block_size": 16, "max_model_tokens": 1024, "consecutive_blocks": False} | limits
    )
    shape = decoder.config
    assert config.num_blocks is not None
    kv_cache = allocate_kv_cache(
        shape.num_layers,
        config.num_blocks,
        config.block_size,
        shape.num_kv_heads,
        shape.head_dim,
        decoder.dtype,
        decoder.device,
    )
    return Engine(
        make_runner(decoder, kv_cache, config),
        config,
        vocab_size=shape.vocab_size,
        eos_token_ids=EOS,
        grammars=GrammarCompiler(lambda: read_tokenizer(MODEL), shape.vocab_size, EOS),
    )


def guided(name: str, prompt: Sequence[int], grammar: Grammar, **sampling: Any) -> Request:
    return Request(name, tuple(prompt), SamplingParams(**{"max_tokens": 400, "grammar": grammar} | sampling))


def plain(name: str, prompt: Sequence[int], max_tokens: int = 40) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def run(engine: Engine, requests: Iterable[Request]) -> Events:
    """All events of requests that are handed over together; nothing may be left behind."""
    for request in requests:
        engine.add_request(request)
    events: Events = {}
    while engine.has_unfinished:
        for event in engine.step():
            assert event.error is None, event
            events.setdefault((event.request_id, event.index), []).append(event)
        engine.scheduler.check_integrity()
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    return events


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def check_json(
    tokenizer: PreTrainedTokenizerFast, schema: dict, events: Sequence[TokenEvent], max_tokens: int = 400
) -> bool:
    """Whether an output is complete; then it must be JSON that the schema describes, else as long as it may be."""
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
    if events[-1].finish_reason == "length":
        assert len(tokens_of(events)) == max_tokens
        return False
    assert events[-1].finish_reason == "stop"
    jsonschema.validate(json.loads(tokenizer.decode(tokens_of(events), skip_special_tokens=True)), schema)
    return True
