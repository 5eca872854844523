from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.errors import MissingExtraError, ModelError, UnsupportedModelError
from hasten.request import Request, SamplingParams
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.registry import load_runtime, runtime_class
from hasten.runtimes.transformers import TransformersRuntime

try:
    LlamaCppRuntime = runtime_class("llama_cpp")
except MissingExtraError as error:
    pytest.skip(str(error), allow_module_level=True)

from hasten.runtimes.gguf_file import matrix_types, weight_bytes

WriteModel = Callable[..., Path]
NUMBERS = np.random.default_rng(3)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def mean_kl(model: Path, prepared: Path, scheme: str) -> float:
    """Mean KL divergence from transformers in fp32 over two sequences."""
    sequences = [tuple(NUMBERS.integers(0, 160, 150).tolist()) for _ in range(2)]
    reference = TransformersRuntime(RuntimeConfig(model, "fp32", num_threads=1))
    runtime = load_runtime("llama_cpp", RuntimeConfig(prepared, scheme, max_num_seqs=1, num_threads=1))
    pairs = list(zip(reference.score(sequences), runtime.score(sequences), strict=True))
    reference.close()
    runtime.close()
    return float(np.mean([(np.exp(p) * (p - q)).sum(axis=-1).mean() for p, q in pairs]))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 32, "attention_bias": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_every_family_computes_what_transformers_computes(
    write_model: WriteModel, tmp_path: Path, family: str, changes: dict[str, object]
) -> None:
    model = write_model(family, **changes)
    prepared = LlamaCppRuntime.prepare(model, "fp32", tmp_path / "out")
    assert mean_kl(model, prepared, "fp32") < 1e-6


@pytest.mark.parametrize(("scheme", "stored", "limit"), [("bf16", "BF16", 1e-3), ("w8a16", "Q8_0", 5e-3)])
def test_schemes_are_stored_as_named(
    write_model: WriteModel, tmp_path: Path, scheme: str, stored: str, limit: float
) -> None:
    model = write_model()
    prepared = LlamaCppRuntime.prepare(model, scheme, tmp_path / "out")
    assert set(matrix_types(prepared / "model.gguf").values()) == {stored}
    assert mean_kl(model, prepared, scheme) < limit
    assert sorted(path.name for path in prepared.iterdir()) == ["config.json", "generation_config.json", "model.gguf"]


def test_four_bits_are_stored_and_their_bytes_counted(write_model: WriteModel, tmp_path: Path) -> None:
    prepared = LlamaCppRuntime.prepare(write_model(hidden_size=256), "w4a16", tmp_path / "out")
    types = matrix_types(prepared / "model.gguf")
    blocks = {name: kind for name, kind in types.items() if name.startswith("blk.")}
    assert set(blocks.values()) == {"Q4_0"}
    linear = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 128 * 256)
    assert types["output.weight"] == "Q6_K"
    assert weight_bytes(prepared / "model.gguf") == linear * 18 // 32 + 160 * 256 * 210 // 256


def test_weight_bytes_count_a_tied_table_as_the_head(write_model: WriteModel, tmp_path: Path) -> None:
    tied = LlamaCppRuntime.prepare(write_model(tie_word_embeddings=True), "fp32", tmp_path / "tied")
    layers = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert weight_bytes(tied / "model.gguf") == 4 * (layers + 160 * 64)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral", {"sliding_window": 64}, "sliding window"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rotary type 'llama3'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary type"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(
    write_model: WriteModel, tmp_path: Path, family: str, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        LlamaCppRuntime.prepare(write_model(family, **changes), "fp32", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_rows_that_llama_cpp_cannot_quantize_are_an_error(write_model: WriteModel, tmp_path: Path) -> None:
    model = write_model(hidden_size=72, num_attention_heads=2, num_key_value_heads=1, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="Q8_0"):
        LlamaCppRuntime.prepare(model, "w8a16", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_was_not_prepared_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model\.gguf; prepare it first"):
        LlamaCppRuntime(RuntimeConfig(tmp_path, "fp32"))


def test_a_truncated_file_is_a_model_error(write_model: WriteModel, tmp_path: Path) -> None:
    prepared = LlamaCppRuntime.prepare(write_model(), "fp32", tmp_path / "out")
    path = prepared / "model.gguf"
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(ModelError, match="cannot load"):
        LlamaCppRuntime(RuntimeConfig(prepared, "fp32"))


def test_a_prompt_longer_than_a_batch_and_more_requests_than_sequences(
    write_model: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.runtimes.llama_cpp.MAX_BATCH_TOKENS", 16)
    prepared = LlamaCppRuntime.prepare(write_model(), "fp32", tmp_path / "out")
    runtime = LlamaCppRuntime(RuntimeConfig(prepared, "fp32", max_num_seqs=2, max_model_tokens=128, num_threads=1))
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    lengths = (40, 3, 15, 16, 17, 1)
    requests = [Request(str(n), tuple(NUMBERS.integers(0, 160, n).tolist()), sampling) for n in lengths]
    together: dict[str, list[int | None]] = {}
    for event in runtime.generate(requests):
        together.setdefault(event.request_id, []).append(event.token_id)
    for request in requests:
        assert together[request.request_id] == [event.token_id for event in runtime.generate([request])]
    runtime.close()
