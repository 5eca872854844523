"""The shipped model: its size, its tokenizer, and that its card says what a fresh measurement finds."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

MODELS = Path(__file__).parents[2] / "examples" / "models"
MODEL = MODELS / "tiny-llama"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_folder_is_small_enough_to_travel():
    assert sum(path.stat().st_size for path in MODEL.rglob("*")) <= 10_000_000


def test_config_has_the_shape_that_kernels_and_int4_groups_need():
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["vocab_size"], config["head_dim"], config["dtype"]) == (4096, 64, "bfloat16")
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert config["tie_word_embeddings"]


def test_weights_are_bf16_and_finite():
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_tokenizer_gives_back_any_text(tokenizer):
    assert len(tokenizer) == 4096
    for text in (
        "def f(x):\n\treturn  x\r\n",
        " naïve Straße — 日本語 🦊\u200d\u0000\x7f",
        "  \n\n   end  ",
        "a  ,b . 'c'",
    ):
        token_ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(token_ids) == text
        assert max(token_ids) < 4096


def test_generation_ends_with_the_text_or_with_the_turn(tokenizer):
    stops = json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"]
    assert [tokenizer.convert_ids_to_tokens(token_id) for token_id in stops] == ["<|endoftext|>", "<|end|>"]


def test_chat_template_renders_roles_and_refuses_others(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is grep?"},
        {"role": "assistant", "content": "A tool."},
        {"role": "user", "content": "And sed?"},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|endoftext|><|user|>Be brief.\n\nWhat is grep?<|end|><|assistant|>A tool.<|end|>"
        "<|user|>And sed?<|end|><|assistant|>"
    )
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_card_states_the_perplexity_that_a_fresh_measurement_finds(monkeypatch):
    monkeypatch.syspath_prepend(str(MODELS / "train"))
    sys.modules.pop("evaluate", None)
    import evaluate

    card = (MODEL / "README.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"first 16,000 characters \|.*\| ([\d.]+) \|$", card, flags=re.M)
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    measured = evaluate.perplexity(MODEL, text[: evaluate.EXCERPT_CHARS])
    assert measured.per_byte == pytest.approx(float(stated), rel=0.01)
