import dataclasses
import json
from pathlib import Path

from hasten.models.config import DecoderConfig
from hasten.profiling.roofline import achieved_bytes_per_s, kv_read_bytes, max_tokens_per_s

MODEL = Path(__file__).parents[3] / "examples" / "models" / "tiny-llama"


def test_the_limit_is_bandwidth_over_weights() -> None:
    # Llama-3.1-8B in bf16 on a machine that reads 4.27 TB/s: at most 285 tokens a second
    assert round(max_tokens_per_s(15_000_000_000, 4.27e12)) == 285
    assert round(achieved_bytes_per_s(1_000_000, 0.001)) == 1_000_000_000


def test_a_window_ends_what_is_read_of_the_cache() -> None:
    decoder = DecoderConfig.from_hf(json.loads((MODEL / "config.json").read_text()))
    all_layers = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * 2
    assert kv_read_bytes(decoder, 100.0, 2) == 100 * all_layers
    windowed = dataclasses.replace(decoder, layer_windows=(16,) * decoder.num_layers)
    assert kv_read_bytes(windowed, 100.0, 2) == 16 * all_layers
