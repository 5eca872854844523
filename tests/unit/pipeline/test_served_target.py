"""What `serve` makes of a folder: an encoder's runtime and scheme, or why it is refused."""

import json
from pathlib import Path

import pytest

from hasten.errors import UnsupportedModelError, UsageError
from hasten.pipeline.config import ServeConfig
from hasten.pipeline.served_model import runtime_config_of, served_target
from tiny_encoders import make_encoder, write_modules

SHIPPED_MODEL = Path(__file__).parents[3] / "examples" / "models" / "tiny-llama"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-bert")
    make_encoder(path)
    return path


def test_an_encoder_is_served_in_fp32_on_a_cpu(encoder: Path) -> None:
    config = ServeConfig(str(encoder), device="cpu")
    target, device = served_target(config)
    assert (target.candidate.name, device) == ("encoder-fp32", "cpu")
    assert runtime_config_of(config, target, device).model == encoder
    target, _ = served_target(ServeConfig(str(encoder), device="cpu", scheme="bf16"))
    assert target.candidate.scheme == "bf16"


def test_a_model_that_generates_is_served_as_before() -> None:
    target, _ = served_target(ServeConfig(str(SHIPPED_MODEL), device="cpu"))
    assert target.candidate.name == "native-bf16"


def test_what_an_encoder_cannot_do_is_refused(encoder: Path) -> None:
    config = ServeConfig(str(encoder), device="cpu", scheme="w8a16")
    with pytest.raises(UsageError, match="does not run scheme 'w8a16'"):
        runtime_config_of(config, *served_target(config))


def test_embeddings_by_another_architecture_are_refused(tmp_path: Path) -> None:
    make_encoder(tmp_path)
    write_modules(tmp_path, {"pooling_mode_lasttoken": True})
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="for embeddings by Qwen3ForCausalLM"):
        served_target(ServeConfig(str(tmp_path), device="cpu"))
