"""What is tuned, that it is measured once, and that a lost or damaged file only costs time."""

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from hasten.config import scheme_named
from hasten.engine import tune
from hasten.engine.tuning import (
    Tuner,
    product_shapes,
    read_tuning,
    remember,
    user_tuning_path,
    write_tuning,
)
from hasten.kernels.product_shape import ProductShape
from hasten.models.config import DecoderConfig

CONFIG = DecoderConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)


class FakeTimer:
    """Runs each candidate and takes the times from a table; counts its calls."""

    def __init__(self, times: dict[str, float]) -> None:
        self.times, self.calls, self.ran = times, 0, []

    def candidates(self) -> dict[str, Callable[[], None]]:
        return {name: lambda name=name: self.ran.append(name) for name in self.times}

    def __call__(self, operations: Sequence[Callable[[], None]]) -> list[float]:
        self.calls += 1
        self.ran.clear()
        for operation in operations:
            operation()
        return [self.times[name] for name in self.ran]


def test_the_fastest_is_chosen_once() -> None:
    timer = FakeTimer({"slow": 3.0, "fast": 1.0, "broken": math.inf})
    tuner = Tuner(timer)
    assert tuner.best("k", timer.candidates()) == "fast"
    assert tuner.best("k", timer.candidates()) == "fast"
    assert (timer.calls, tuner.num_measured) == (1, 1)
    assert tuner.choices == {"k": "fast"}


def test_a_known_choice_is_measured_again_only_if_it_is_gone() -> None:
    timer = FakeTimer({"a": 2.0, "b": 1.0})
    tuner = Tuner(timer, {"k": "a", "gone": "c"})
    assert tuner.best("k", timer.candidates()) == "a"
    assert timer.calls == 0
    assert tuner.best("gone", timer.candidates()) == "b"
    assert timer.calls == 1


def test_where_nothing_can_run_nothing_is_chosen() -> None:
    timer = FakeTimer({"a": math.inf})
    tuner = Tuner(timer, {"k": "old"})
    assert tuner.best("k", timer.candidates()) is None
    assert tuner.choices == {}


def test_shapes_of_a_decode_step() -> None:
    shapes = product_shapes(CONFIG, scheme_named("w8a16"), 3)
    assert {(each.rows_out, each.rows_in) for each in shapes} == {(128, 64), (64, 64), (192, 64), (64, 96), (512, 64)}
    assert {each.rows for each in shapes} == {4}  # three sequences use the bucket of four, one and two a default
    assert {each.dtype for each in shapes} == {"int8"}
    assert {each.rows_out for each in shapes if each.is_gated} == {192}
    assert {each.rows for each in product_shapes(CONFIG, scheme_named("bf16"), 256)} == {4, 8, 16}
    assert product_shapes(CONFIG, scheme_named("fp8"), 4)[0].dtype == "float8_e4m3fn"
    assert product_shapes(CONFIG, scheme_named("fp8"), 2) == ()
    assert ProductShape(28672, 4096, "int8", 8, True).key == "stream_linear 28672x4096 int8 gated rows<=8"


def test_files_keep_environments_apart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tuning.json"
    assert read_tuning(path, "gpu A") == {}
    write_tuning(path, "gpu A", {"x": "1", "y": "2"})
    write_tuning(path, "gpu B", {"x": "3"})
    write_tuning(path, "gpu A", {"y": "4"})
    assert read_tuning(path, "gpu A") == {"x": "1", "y": "4"}
    assert read_tuning(path, "gpu B") == {"x": "3"}
    assert [each.name for each in path.parent.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"gpu": 3}', b'{"gpu": {"x": 3}}'])
def test_a_damaged_file_counts_as_empty(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_bytes(content)
    assert read_tuning(path, "gpu") == {}
    write_tuning(path, "gpu", {"y": "1"})
    assert read_tuning(path, "gpu")["y"] == "1"


def test_the_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_tuning_path() == tmp_path / "hasten" / "tuning.json"
    remember("gpu", {"x": "1"})
    assert read_tuning(user_tuning_path(), "gpu") == {"x": "1"}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        remember("gpu", {"x": "1"})
    assert "is not kept" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_tuning_path().is_absolute()


def test_a_second_build_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = FakeTimer({"a": 2.0, "b": 1.0})
    cuda = SimpleNamespace(
        environment=lambda: "gpu A", time_in_turns=timer, product_candidates=lambda *_: timer.candidates()
    )
    monkeypatch.setattr(tune, "require", lambda module: None)
    monkeypatch.setitem(sys.modules, tune.CUDA_TUNING, cuda)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scheme = scheme_named("w8a16")
    told: list[tuple[int, int]] = []
    first = tune.tune_on_gpu(CONFIG, scheme, 8, on_shape=lambda done, total: told.append((done, total)))
    assert set(first.values()) == {"b"}
    assert told[-1] == (len(first), len(first))
    assert timer.calls == len(first)
    assert tune.tune_on_gpu(CONFIG, scheme, 8) == first
    assert timer.calls == len(first)

    folder = tmp_path / "engine"
    tune.write_folder_tuning(folder, first)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user"))
    assert tune.tune_on_gpu(CONFIG, scheme, 8, folder) == first
    assert timer.calls == len(first)
    cuda.environment = lambda: "gpu B"  # from another GPU: measured again, not refused
    assert tune.tune_on_gpu(CONFIG, scheme, 8, folder) == first
    assert timer.calls == 2 * len(first)
    assert list(json.loads((folder / "tuning.json").read_text())) == ["gpu A"]
