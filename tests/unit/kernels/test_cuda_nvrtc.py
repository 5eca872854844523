"""Every instance of the CUDA sources compiles, which needs NVRTC but no GPU."""

import itertools
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
try:
    from hasten.kernels.cuda import nvrtc
    from hasten.kernels.cuda.stream_linear import SOURCE, StreamConfig, definitions

    nvrtc.nvrtc.nvrtcVersion()
except (ImportError, RuntimeError) as error:  # the bindings are there, NVRTC's library is not
    pytest.skip(f"needs NVRTC: {error}", allow_module_level=True)

SHAPES = [StreamConfig(), StreamConfig(teams=2), StreamConfig(integer=True), StreamConfig(tile_rows=32, warps=4)]


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("weight_kind", "x_half", "n_tiles"), list(itertools.product([0, 1, 2], [False, True], [1, 2]))
)
def test_stream_linear_compiles(weight_kind: int, x_half: bool, n_tiles: int, config: StreamConfig) -> None:
    if config.integer and weight_kind != 1:
        pytest.skip("integers are for int8 weights")
    given = definitions(weight_kind, x_half, n_tiles, config)
    assert nvrtc.compile_cubin(SOURCE.read_text(), "sm_90a", given)[:4] == b"\x7fELF"


def test_a_mistake_in_a_source_is_shown() -> None:
    with pytest.raises(RuntimeError, match="undefined_name"):
        nvrtc.compile_cubin("__global__ void f(int* p) { *p = undefined_name; }", "sm_90a", {})


def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = 'extern "C" __global__ void f(int* p) { *p = VALUE; }'
    first = nvrtc.cached_cubin(source, "sm_90a", {"VALUE": 1})
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.cached_cubin(source, "sm_90a", {"VALUE": 1}) == first
    assert len(list((tmp_path / "hasten" / "kernels").iterdir())) == 1
