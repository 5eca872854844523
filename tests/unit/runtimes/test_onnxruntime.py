import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hasten.errors import MissingExtraError, ModelError, UnsupportedModelError
from hasten.request import Request, SamplingParams
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.registry import runtime_class
from hasten.runtimes.transformers import TransformersRuntime

try:
    OnnxRuntimeRuntime = runtime_class("onnxruntime")
except MissingExtraError as error:
    pytest.skip(str(error), allow_module_level=True)

from hasten.runtimes.onnxruntime import block_size_for, check_precision, weight_bytes

WriteModel = Callable[..., Path]
LAYERS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
HEAD = 160 * 64
NUMBERS = np.random.default_rng(5)


@pytest.fixture
def model(write_model: WriteModel, tmp_path: Path) -> Path:
    folder = write_model()
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """The builder copies a tokenizer, so there must be one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({chr(97 + index): index for index in range(26)}, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.mark.parametrize(("scheme", "bits", "limit"), [("w8a16", 8, 0.02), ("w4a16", 4, 1.0)])
def test_a_quantized_export_holds_what_its_scheme_says(
    model: Path, tmp_path: Path, scheme: str, bits: int, limit: float
) -> None:
    prepared = OnnxRuntimeRuntime.prepare(model, scheme, tmp_path / "out")
    scales = 4 * (LAYERS + HEAD) // 64  # float32, one for each block of 64
    assert weight_bytes(prepared / "model.onnx") == (LAYERS + HEAD) * bits // 8 + scales
    with pytest.raises(UnsupportedModelError, match="instead of"):
        check_precision(prepared / "model.onnx", "fp32")
    sequences = [tuple(NUMBERS.integers(0, 160, 40).tolist()) for _ in range(3)]
    reference = TransformersRuntime(RuntimeConfig(model, "fp32", num_threads=1))
    runtime = OnnxRuntimeRuntime(RuntimeConfig(prepared, scheme, num_threads=1))
    for p, q in zip(reference.score(sequences), runtime.score(sequences), strict=True):
        assert (np.exp(p) * (p - q)).sum(axis=-1).mean() < limit
    reference.close()


def test_an_fp32_export_scores_and_generates_as_transformers_does(model: Path, tmp_path: Path) -> None:
    prepared = OnnxRuntimeRuntime.prepare(model, "fp32", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source-llama"]
    assert weight_bytes(prepared / "model.onnx") == 4 * (LAYERS + HEAD)
    reference = TransformersRuntime(RuntimeConfig(model, "fp32", max_num_seqs=32, num_threads=1))
    runtime = OnnxRuntimeRuntime(RuntimeConfig(prepared, "fp32", max_num_seqs=32, num_threads=1))
    sequences = [(*NUMBERS.integers(0, 160, 20).tolist(), 0, 1, 0, 5) for _ in range(3)]  # with the end token
    for p, q in zip(reference.score(sequences), runtime.score(sequences), strict=True):
        np.testing.assert_allclose(p, q, atol=1e-4)
    # 24 long continuations of a model that draws from 160 tokens meet the library's end token often
    sampling = SamplingParams(max_tokens=64, ignore_eos=True)
    requests = [Request(str(n), tuple(NUMBERS.integers(0, 160, 6).tolist()), sampling) for n in range(24)]
    tokens: list[dict[str, list[int | None]]] = [{}, {}]
    for found, each in zip(tokens, (reference, runtime), strict=True):
        for event in each.generate(requests):
            found.setdefault(event.request_id, []).append(event.token_id)
    assert any(0 in row for row in tokens[0].values())
    assert tokens[0] == tokens[1]
    samples = {sample.operator: sample.calls for sample in runtime.trace(requests[:1])}
    assert samples["GroupQueryAttention"] == 2 * 64
    assert len(list(runtime.generate(requests[:1]))) == 64  # usable after a trace
    reference.close()


@pytest.mark.parametrize(
    ("sizes", "expected"), [((128, 256, 2), 128), ((896, 4864, 14), 128), ((64, 160, 4), 32), ((48, 96, 3), 16)]
)
def test_the_block_divides_every_row(sizes: tuple[int, int, int], expected: int) -> None:
    hidden, intermediate, heads = sizes
    config = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    assert block_size_for(config) == expected


def test_rows_that_no_block_divides_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="use fp32"):
        block_size_for({"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 2})


def test_a_model_that_the_builder_refuses_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["OddForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="model builder cannot export"):
        OnnxRuntimeRuntime.prepare(model, "fp32", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [model.name]


def test_a_folder_that_was_not_prepared_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"genai_config\.json is missing; prepare it first"):
        OnnxRuntimeRuntime(RuntimeConfig(tmp_path, "fp32"))
