import dataclasses
import re
from pathlib import Path

import psutil
import pytest

from hasten.artifact import ModelRef, TensorInfo
from hasten.hardware import Gpu, Hardware
from hasten.pipeline import doctor, doctor_model
from hasten.pipeline.doctor import Check

MACHINE = Hardware(
    cpu="Some CPU",
    num_cpus=2,
    cpu_flags=("avx2", "avx512_bf16"),
    memory_bytes=8 << 30,
    available_memory_bytes=6 << 30,
    os="Debian",
    gpus=(),
    read_bandwidth_bytes_per_s=30e9,
)
GPU = Gpu("NVIDIA H200", 140 << 30, "9.0", "580.159")


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No programs beside this one, no libraries started, no thread settings."""
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 0.0)
    monkeypatch.setattr(doctor, "_run_python", lambda code: ("None False" if "torch" in code else "", None))
    for name in (*doctor.THREAD_VARIABLES, *doctor.PINNING_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def checked(machine: Hardware, folder: Path) -> dict[str, Check]:
    return {check.name: check for check in doctor.check_machine(machine, folder)}


def test_good_machine_has_no_problem(tmp_path: Path) -> None:
    checks = checked(MACHINE, tmp_path)
    assert {"Python", "torch", "transformers", "CPU", "memory", "disk", "threads", "noise"} <= checks.keys()
    assert all(check.status != "problem" for check in checks.values())
    assert "30 GB/s" in checks["memory"].detail


def test_every_warning_has_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100.0)
    monkeypatch.setattr(doctor, "free_disk_bytes", lambda _: 1)
    monkeypatch.setattr(doctor, "_run_python", lambda code: ("", "ImportError: libgomp.so.1 is missing"))
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bad = dataclasses.replace(MACHINE, cpu_flags=(), available_memory_bytes=1 << 30)
    checks = checked(bad, tmp_path)
    assert {name for name, check in checks.items() if check.status == "problem"} == {"torch", "transformers"}
    for name in ("CPU", "memory", "disk", "threads", "noise"):
        assert checks[name].status == "warning", name
    assert all(check.cure for check in checks.values() if check.status != "ok")
    assert "libgomp.so.1 is missing" in checks["torch"].detail


@pytest.mark.parametrize(
    ("gpus", "printed", "expected"),
    [
        ((), "None False", "ok: .*no NVIDIA GPU"),
        ((GPU,), "13.0 True", "ok: .*CUDA 13.0, NVIDIA H200"),
        ((GPU,), "None False", "warning: .*is a CPU build"),
        ((GPU,), "13.0 False", "warning: .*cannot use NVIDIA H200 with driver 580.159"),
        ((), "13.0 False", "ok: .*no NVIDIA GPU"),
    ],
)
def test_torch_build_against_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: tuple[Gpu, ...], printed: str, expected: str
) -> None:
    monkeypatch.setattr(doctor, "_run_python", lambda code: (printed if "torch" in code else "", None))
    check = checked(dataclasses.replace(MACHINE, gpus=gpus), tmp_path)["torch"]
    assert re.match(expected, f"{check.status}: {check.detail}")


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("OMP_NUM_THREADS", "2", "ok"),
        ("OMP_NUM_THREADS", "1", "warning"),
        ("MKL_NUM_THREADS", "64", "warning"),
        ("OMP_PROC_BIND", "close", "warning"),
    ],
)
def test_thread_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, status: str) -> None:
    monkeypatch.setenv(name, value)
    check = checked(MACHINE, tmp_path)["threads"]
    assert check.status == status
    assert check.cure == (None if status == "ok" else f"unset {name}")


def test_extra_that_is_absent_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime_genai": "0.9.2", "llama_cpp": None}
    monkeypatch.setattr(doctor, "installed_version", lambda module: versions.get(module, "99.0"))
    checks = checked(MACHINE, tmp_path)
    old = next(check for name, check in checks.items() if name.startswith("onnxruntime-genai"))
    absent = next(check for name, check in checks.items() if name.startswith("llama-cpp-python"))
    assert (old.status, old.cure) == ("warning", "pip install 'hasten[onnxruntime]' --upgrade")
    assert (absent.status, absent.cure) == ("warning", "pip install 'hasten[llama-cpp]'")


def test_failing_interpreter_is_reported_by_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert doctor._run_python("print('fine')") == ("fine", None)
    printed, failure = doctor._run_python("raise ImportError('no such library')")
    assert (printed, failure) == ("", "ImportError: no such library")


def model_with(path: Path, **config: object) -> ModelRef:
    defaults = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    weight = TensorInfo("model.layers.0.mlp.up_proj.weight", "BF16", (128, 64), "model.safetensors", 0, 16384)
    merged = {**defaults, **config}
    return ModelRef(path, "tiny", "0" * 64, str(merged["architectures"][0]), merged, {}, {weight.name: weight})


def test_model_that_fits(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    checks = doctor_model.check_model(model_with(tmp_path), MACHINE)
    assert all(check.status == "ok" for check in checks)
    assert any(check.name.startswith("native") for check in checks)


def test_model_that_is_unsupported_or_has_no_tokenizer(tmp_path: Path) -> None:
    checks = {
        check.name: check for check in doctor_model.check_model(model_with(tmp_path, architectures=["T5"]), MACHINE)
    }
    assert checks["tokenizer"].status == checks["model"].status == "problem"
    assert "LlamaForCausalLM" in checks["model"].detail


def test_model_that_does_not_fit_in_memory(tmp_path: Path) -> None:
    small = dataclasses.replace(MACHINE, available_memory_bytes=1 << 20)
    checks = doctor_model.check_model(model_with(tmp_path), small)
    too_large = [check for check in checks if check.status == "warning"]
    assert too_large
    assert all("GiB of memory" in check.detail for check in too_large)
