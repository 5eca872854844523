"""`hasten profile`: what each runtime loads, the files it leaves, and nsys, which is pretended here."""

import gzip
import json
import stat
from pathlib import Path

import pytest

from hasten.cli.main import run
from hasten.errors import RequestError, UsageError
from hasten.pipeline import profiling
from hasten.pipeline.config import ProfileConfig
from hasten.pipeline.nsys import record_generate
from hasten.pipeline.profiling import profile_model

MODEL = Path(__file__).parents[3] / "examples" / "models" / "tiny-llama"


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the memory takes a second."""
    monkeypatch.setattr(profiling, "probe_for", lambda device: profiling.Hardware("a CPU", 2, (), 1, 1, "L", (), 1e10))


def config_for(folder: Path, **options: object) -> ProfileConfig:
    values = {"device": "cpu", "prompt_tokens": 8, "steps": 4, "threads": 1, "output": folder} | options
    return ProfileConfig(model=str(MODEL), **values)  # type: ignore[arg-type]


def test_runtimes_are_profiled_on_a_cpu_with_what_it_can_show(tmp_path: Path) -> None:
    found = profile_model(config_for(tmp_path, runtimes=("transformers", "fake"), scheme="fp32"))
    assert [each.candidate.name for each in found.profiles] == ["transformers-fp32", "fake-fp32"]
    baseline, fake = found.profiles
    assert sum(part.time_s for part in baseline.parts) == pytest.approx(baseline.step_s)
    assert baseline.read_bytes is not None and baseline.read_share is not None
    assert baseline.missing.keys() == {"activity", "power_w"}
    assert fake.missing.keys() >= {"activity", "power_w", "trace", "read_bytes"}
    trace = json.loads(gzip.decompress((tmp_path / str(baseline.trace)).read_bytes()))["traceEvents"]
    names = [event["name"] for event in trace if event.get("cat") == "user_annotation"]
    assert (names.count("prefill"), names.count("decode"), names.count("sampling")) == (1, 4, 5)
    assert names.count("module lm_head") == 5
    assert json.loads((tmp_path / "profile.json").read_text())["profiles"][0]["step_s"] == baseline.step_s


def test_a_scheme_that_the_baseline_does_not_run_is_its_own_there() -> None:
    assert profiling._scheme_for("transformers", "w8a16", "cpu") == "fp32"
    assert profiling._scheme_for("transformers", "fp8", "cuda") == "fp16"
    assert profiling._scheme_for("transformers", "bf16", "cuda") == "bf16"
    assert profiling._scheme_for("native", "w8a16", "cuda") == "w8a16"


def test_what_cannot_be_profiled_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(RequestError, match="lower --prompt-tokens or --steps"):
        profile_model(config_for(folder, steps=5000))
    with pytest.raises(UsageError, match="did you mean native"):
        profile_model(config_for(folder, runtimes=("nativ",)))
    with pytest.raises(UsageError, match="--steps must be at least 2"):
        config_for(folder, steps=1)
    assert not folder.exists()


def test_nsys_that_is_absent_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["profile", str(MODEL), "--nsys", "-o", str(tmp_path / "out")]) == 3
    assert "nsys is not on the PATH" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_nsys_is_given_one_generation(tmp_path: Path) -> None:
    nsys = tmp_path / "nsys"
    nsys.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/seen\ntouch {tmp_path}/native-bf16.nsys-rep\n')
    nsys.chmod(nsys.stat().st_mode | stat.S_IXUSR)
    options = ["--runtime", "native", "--scheme", "bf16"]
    report = record_generate(str(nsys), MODEL, options, 4, 8, tmp_path / "native-bf16")
    assert report == tmp_path / "native-bf16.nsys-rep"
    seen = (tmp_path / "seen").read_text()
    assert seen.startswith("profile --trace=cuda,nvtx,osrt") and f"generate {MODEL}" in seen
    assert "--runtime native --scheme bf16 --max-tokens 8 --ignore-eos" in seen
