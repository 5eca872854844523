import pytest
import torch

from hasten.kernels.phase import phase


def test_a_phase_is_a_range_of_the_profiler_and_of_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: ranges.append("end"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with phase("prefill", on_gpu=False):
            torch.ones(2).sum()
        with phase("decode", on_gpu=True):
            torch.ones(2).sum()
    assert ranges == ["decode", "end"]
    assert {"prefill", "decode"} <= {row.key for row in profiler.key_averages()}


def test_an_error_ends_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: ranges.append("end"))
    with pytest.raises(ValueError, match="no"), phase("sampling", on_gpu=True):
        raise ValueError("no")
    assert ranges == ["sampling", "end"]
