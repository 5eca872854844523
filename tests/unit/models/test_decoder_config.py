"""Reading config.json: families, both rotary spellings, and one clear error for each bad value."""

import math
from typing import Any

import pytest

from hasten.errors import ModelError, UnsupportedModelError
from hasten.models.config import FAMILIES, DecoderConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def read(architecture: str = "LlamaForCausalLM", **changes: Any) -> DecoderConfig:
    values = LLAMA | {"architectures": [architecture]} | changes
    return DecoderConfig.from_hf({key: value for key, value in values.items() if value != "absent"})


def test_sizes_and_defaults() -> None:
    config = read()
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 8, 2, 8)
    assert config.rotary.theta == 10000.0
    assert config.rms_norm_eps == 1e-6
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm or config.tied_head)
    assert read(num_key_value_heads="absent").num_kv_heads == 8


def test_what_the_families_fix() -> None:
    qwen2 = read("Qwen2ForCausalLM")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = read("Qwen3ForCausalLM", attention_bias=True)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (True, True, True, 128)
    assert read("MistralForCausalLM", attention_bias=True).qkv_bias is False
    llama = read(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)


def test_sliding_windows() -> None:
    assert read("MistralForCausalLM", sliding_window=7).layer_windows == (7, 7, 7)
    assert read("MistralForCausalLM", sliding_window=7).sliding_window == 7
    assert read("MistralForCausalLM", sliding_window=None).sliding_window is None
    unused = {"sliding_window": 7, "max_window_layers": 1}
    assert read("Qwen2ForCausalLM", **unused).layer_windows == (None, None, None)
    used = read("Qwen2ForCausalLM", use_sliding_window=True, **unused)
    assert used.layer_windows == (None, 7, 7)
    assert used.sliding_window is None  # not all layers have it
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    listed = read("Qwen3ForCausalLM", use_sliding_window=True, sliding_window=5, layer_types=layer_types)
    assert listed.layer_windows == (5, None, 5)
    assert read(sliding_window=7).layer_windows == (None, None, None)  # Llama has none


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_both_spellings_of_rotary_settings_are_the_same() -> None:
    old = read(rope_theta=500000.0, rope_scaling=LLAMA3)
    new = read(rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    assert old == new
    assert old.rotary.original_context_tokens == 64
    oldest = read(rope_scaling={"type": "linear", "factor": 2})
    assert (oldest.rotary.rope_type, oldest.rotary.factor) == ("linear", 2.0)


def test_yarn_fills_in_what_is_derived() -> None:
    yarn = read(rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 64}).rotary
    assert yarn.factor == 4.0
    assert yarn.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert (yarn.beta_fast, yarn.beta_slow, yarn.truncate) == (32.0, 1.0, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["BertModel"]},
        {"architectures": "absent"},
        {"architectures": [7]},
        {"architectures": "LlamaForCausalLM"},
        {"hidden_act": "gelu"},
        {"attn_logit_softcapping": 50.0},
        {"num_local_experts": 8},
        {"quantization_config": {"quant_method": "gptq"}},
        {"rope_scaling": {"type": "su", "factor": 2}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"partial_rotary_factor": 0.5},
        {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention", "linear_attention", "mamba"]},
    ],
)
def test_unsupported_features_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        DecoderConfig.from_hf({key: value for key, value in (LLAMA | changes).items() if value != "absent"})


def test_an_unsupported_architecture_lists_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        read("BertModel")
    assert all(name in str(error.value) for name in ("BertModel", *FAMILIES))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"vocab_size": "absent"}, "vocab_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_hidden_layers": [3]}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 6}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rotary settings"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "short_factor"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"max_position_embeddings": None, "rope_theta": "big"}, "rope_theta"),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelError, match=key):
        read(**changes)


def test_layer_types_must_cover_all_layers() -> None:
    with pytest.raises(ModelError, match="layer_types must list 3 layers"):
        read("Qwen2ForCausalLM", layer_types=["full_attention"])
