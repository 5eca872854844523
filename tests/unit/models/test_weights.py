"""Weights that are missing, mis-shaped, superfluous or of another precision: one sentence each."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hasten.artifact import inspect
from hasten.config import scheme_named
from hasten.errors import HastenError, UsageError, WeightsError
from hasten.models.config import DecoderConfig
from hasten.models.load import load_decoder
from hasten.models.weights import WeightReader, linear_shapes, norm_shapes, stored_scheme
from hasten.quantization.rtn import QuantizedWeight, quantize

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def tensors(config: DecoderConfig) -> dict[str, torch.Tensor]:
    result = {"model.embed_tokens.weight": torch.randn(config.vocab_size, config.hidden_size)}
    for module, (rows, columns, _) in linear_shapes(config).items():
        result[f"{module}.weight"] = torch.randn(rows, columns)
    for module, length in norm_shapes(config).items():
        result[f"{module}.weight"] = torch.ones(length)
    return result


def write(folder: Path, changes: dict[str, torch.Tensor | None] | None = None, **config: Any) -> Path:
    values = CONFIG | config
    (folder / "config.json").write_text(json.dumps(values))
    all_tensors = tensors(DecoderConfig.from_hf(values)) | (changes or {})
    kept = {name: tensor for name, tensor in all_tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def reader(folder: Path, scheme: str = "fp32") -> WeightReader:
    model = inspect(folder)
    return WeightReader(model, DecoderConfig.from_hf(model.config), scheme_named(scheme))


def test_reads_in_the_scheme_asked_for(tmp_path: Path) -> None:
    write(tmp_path)
    weight = reader(tmp_path, "bf16").linear("lm_head").weight
    assert isinstance(weight, torch.Tensor)
    assert weight.dtype == torch.bfloat16
    quantized = reader(tmp_path, "w4a16").linear("model.layers.1.self_attn.q_proj").weight
    assert isinstance(quantized, QuantizedWeight)
    assert quantized.bits == 4


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is in no weights file"):
        reader(tmp_path)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    write(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"and 15 more are in no weights file"):
        reader(tmp_path)


def test_a_wrong_shape_names_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    write(tmp_path, {"model.layers.0.mlp.down_proj.weight": torch.zeros(32, 40)})
    with pytest.raises(WeightsError) as error:
        reader(tmp_path)
    message = str(error.value)
    assert all(part in message for part in ("layers.0.mlp.down_proj.weight", "[32, 40]", "[32, 48]"))


def test_integers_where_weights_should_be_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"model.norm.weight": torch.ones(32, dtype=torch.int32)})
    with pytest.raises(WeightsError, match=r"model\.norm\.weight has dtype I32"):
        reader(tmp_path)


def test_a_bias_that_the_config_denies_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    with pytest.raises(WeightsError, match="no bias"):
        reader(tmp_path)


def test_a_layer_past_the_config_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"model.layers.2.mlp.up_proj.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match="is past config"):
        reader(tmp_path)


def test_unknown_tensors_are_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"vision.weight": torch.ones(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    with caplog.at_level(logging.WARNING):
        reader(tmp_path)
    assert "vision.weight" in caplog.text
    assert "inv_freq" not in caplog.text


def test_a_tied_head_needs_no_weight_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, {"lm_head.weight": None}, tie_word_embeddings=True)
    weights = reader(tmp_path)
    head = weights.linear("lm_head").weight
    assert isinstance(head, torch.Tensor)
    assert torch.equal(head, weights.embedding())


def test_quantized_weights_run_only_in_their_scheme(tmp_path: Path) -> None:
    changes: dict[str, torch.Tensor | None] = {}
    config = DecoderConfig.from_hf(CONFIG)
    for module, (rows, columns, _) in linear_shapes(config).items():
        quantized = quantize(torch.randn(rows, columns), 8)
        changes |= {f"{module}.weight": quantized.codes, f"{module}.weight_scale": quantized.scale}
    write(tmp_path, changes)
    assert stored_scheme(inspect(tmp_path).tensors) == "w8a16"
    assert isinstance(reader(tmp_path, "w8a16").linear("lm_head").weight, QuantizedWeight)
    for scheme in ("fp32", "w4a16"):
        with pytest.raises(UsageError, match="w8a16"):
            reader(tmp_path, scheme)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="truncated"):
        load_decoder(tmp_path, "fp32", "cpu")


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="safetensors"):
        load_decoder(tmp_path, "fp32", "cpu")


@pytest.mark.parametrize(("scheme", "device"), [("w3", "cpu"), ("fp32", "tpu")])
def test_unknown_schemes_and_devices_are_usage_errors(tmp_path: Path, scheme: str, device: str) -> None:
    write(tmp_path)
    with pytest.raises(UsageError):
        load_decoder(tmp_path, scheme, device)


def test_every_one_byte_change_of_the_config_loads_or_is_a_hasten_error(tmp_path: Path) -> None:
    write(tmp_path)
    good = (tmp_path / "config.json").read_text()
    for position in range(0, len(good), 3):
        (tmp_path / "config.json").write_text(good[:position] + "-" + good[position + 1 :])
        try:
            load_decoder(tmp_path, "fp32", "cpu")
        except HastenError as error:
            assert "\n" not in str(error)
