"""The native decoder's float32 logits equal transformers', for every family and variant."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import VARIANTS, Harness, TinyModel, edit_config, make_model

from hasten.models.load import load_decoder

TOLERANCE = 1e-4


def tokens(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()


def assert_logits_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_logits_equal_transformers(variant: str, tiny_model: Callable[[str], TinyModel]) -> None:
    model = tiny_model(variant)
    decoder = load_decoder(model.path, "fp32", "cpu")
    prompt = tokens(37, decoder.config.vocab_size)
    logits = Harness(decoder, [range(5)]).step({0: prompt})
    expected = model.logits(prompt)
    assert expected.std() > 0.1  # the comparison means something
    assert_logits_equal(logits, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunked_prefill_and_decode_equal_one_forward(variant: str, tiny_model: Callable[[str], TinyModel]) -> None:
    model = tiny_model(variant)
    decoder = load_decoder(model.path, "fp32", "cpu")
    prompt = tokens(40, decoder.config.vocab_size, seed=1)
    harness = Harness(decoder, [(4, 2, 3, 0, 1)])
    sizes = (11, 13, 1, 9, 1, 1, 4)
    parts, start = [], 0
    for size in sizes:
        parts.append(harness.step({0: prompt[start : start + size]}))
        start += size
    assert_logits_equal(torch.cat(parts), model.logits(prompt))


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_batch_equals_sequences_alone(variant: str, tiny_model: Callable[[str], TinyModel]) -> None:
    model = tiny_model(variant)
    decoder = load_decoder(model.path, "fp32", "cpu")
    prompts = [tokens(length, decoder.config.vocab_size, seed=length) for length in (20, 33, 9)]
    harness = Harness(decoder, [(0, 1, 2, 3), (9, 5, 7, 6, 8), (10, 12)])
    harness.step({0: prompts[0][:18]})
    harness.step({1: prompts[1][:15], 0: prompts[0][18:19]})
    logits = harness.step({0: prompts[0][19:], 1: prompts[1][15:], 2: prompts[2]}, all_logits=False)
    expected = torch.stack([model.logits(prompt)[-1] for prompt in prompts])
    assert_logits_equal(logits, expected)


@pytest.mark.parametrize("variant", ["llama3-gqa", "qwen3", "mistral-window", "qwen2-window"])
def test_batched_decodes_equal_transformers(variant: str, tiny_model: Callable[[str], TinyModel]) -> None:
    model = tiny_model(variant)
    decoder = load_decoder(model.path, "fp32", "cpu")
    lengths = (3, 17, 30, 8, 24)
    prompts = [tokens(length + 1, decoder.config.vocab_size, seed=length) for length in lengths]
    harness = Harness(decoder, [tuple(range(5 * i + 4, 5 * i - 1, -1)) for i in range(len(prompts))])
    for index, prompt in enumerate(prompts):
        harness.step({index: prompt[:-1]}, all_logits=False)
    logits = harness.step({index: prompt[-1:] for index, prompt in enumerate(prompts)})
    assert_logits_equal(logits, torch.stack([model.logits(prompt)[-1] for prompt in prompts]))


@pytest.mark.parametrize("variant", ["llama2-mha", "llama3.2-tied", "qwen2", "qwen3", "mistral-window"])
def test_64_greedy_tokens_equal_transformers(variant: str, tiny_model: Callable[[str], TinyModel]) -> None:
    model = tiny_model(variant)
    decoder = load_decoder(model.path, "fp32", "cpu")
    text = tokens(20, decoder.config.vocab_size)
    harness = Harness(decoder, [range(11)])
    expected = list(text)
    chunk = text
    for _ in range(64):
        token = int(harness.step({0: chunk}, all_logits=False)[0].argmax())
        text, chunk = [*text, token], [token]
        expected.append(int(model.logits(expected)[-1].argmax()))
    assert text == expected


@pytest.mark.parametrize("variant", ["llama-dynamic", "llama-longrope"])
def test_length_dependent_rotary_equals_generating_past_the_trained_context(
    variant: str, tiny_model: Callable[[str], TinyModel]
) -> None:
    """transformers chooses frequencies anew in each step of a generation, so it is driven step by step."""
    model = tiny_model(variant)
    decoder = load_decoder(model.path, "fp32", "cpu")
    prompt = tokens(80, decoder.config.vocab_size)
    harness = Harness(decoder, [range(10)])
    actual, expected, cache = [harness.step({0: prompt[:40]})], [], None
    with torch.inference_mode():
        for chunk in (prompt[:40], *([token] for token in prompt[40:])):
            output = model.reference(torch.tensor([chunk]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            expected.append(output.logits[0])
    actual.append(harness.step({0: prompt[40:59]}))
    actual.extend(harness.step({0: [token]}) for token in prompt[59:])
    assert_logits_equal(torch.cat(actual), torch.cat(expected))


def test_sharded_weights_equal_single_file(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen2", max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    prompt = tokens(12, 160)
    logits = Harness(load_decoder(tmp_path, "fp32", "cpu"), [range(2)]).step({0: prompt})
    assert_logits_equal(logits, model.logits(prompt))


def test_old_spelling_of_rotary_settings_gives_the_same_logits(
    tmp_path: Path, tiny_model: Callable[[str], TinyModel]
) -> None:
    model = tiny_model("llama3.1-rope")
    folder = tmp_path / "old"
    shutil.copytree(model.path, folder)
    parameters = dict(model.reference.config.rope_parameters)
    theta = parameters.pop("rope_theta")
    edit_config(folder, rope_parameters=None, rope_theta=theta, rope_scaling=parameters)
    prompt = tokens(30, 160)
    logits = Harness(load_decoder(folder, "fp32", "cpu"), [range(4)]).step({0: prompt})
    assert_logits_equal(logits, model.logits(prompt))


def test_a_step_without_logits_writes_the_cache(tiny_model: Callable[[str], TinyModel]) -> None:
    model = tiny_model("qwen2")
    decoder = load_decoder(model.path, "fp32", "cpu")
    prompt = tokens(20, 160)
    whole, split = Harness(decoder, [range(3)]), Harness(decoder, [range(3)])
    whole.step({0: prompt[:12]})
    batch_logits = _step_without_logits(split, prompt[:12])
    assert batch_logits.shape == (0, 160)
    torch.testing.assert_close(split.step({0: prompt[12:]}), whole.step({0: prompt[12:]}), atol=0.0, rtol=0.0)


def _step_without_logits(harness: Harness, chunk: list[int]) -> torch.Tensor:
    forward = harness.decoder.forward
    try:
        harness.decoder.forward = lambda batch, cache: forward(  # type: ignore[method-assign]
            type(batch)(**(vars(batch) | {"logits_indices": torch.empty(0, dtype=torch.int64)})), cache
        )
        return harness.step({0: chunk})
    finally:
        harness.decoder.forward = forward  # type: ignore[method-assign]
