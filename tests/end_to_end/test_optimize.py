"""`hasten optimize` as a user runs it: the real command, the shipped model, real runtimes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hasten.bench.result import read_result

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
QUICK = ["--concurrency", "1,2", "--prompt-tokens", "32", "--new-tokens", "16", "--warmup", "1"]


def hasten(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hasten", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A whole run with a native and an ONNX Runtime candidate."""
    folder = tmp_path_factory.mktemp("optimize")
    options = ["--schemes", "w8a16", "--runs", "3", "-o", "run"]
    return folder / "run", hasten("optimize", str(MODEL), *QUICK, *options, cwd=folder)


def test_a_run_measures_every_candidate_and_says_what_it_recommends(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, done = finished
    assert done.returncode in (0, 4), done.stderr  # three runs on a busy machine may be too few for a claim
    assert "Traceback" not in done.stderr
    names = ["transformers-fp32", "native-w8a16", "onnxruntime-w8a16"]
    for name in names:
        result = read_result(run / "results" / f"{name}.json")
        assert result.failure is None
        assert {(each.concurrency, each.round_index) for each in result.runs} == {
            (c, r) for c in (1, 2) for r in range(3)
        }
        assert result.quality is not None and 1 < result.quality.perplexity < 100
        assert result.memory is not None and result.memory.peak_rss_bytes > 20 << 20
        assert result.footprint is not None and result.footprint.disk_bytes > 1 << 20
        assert name in done.stdout
    for name in ("report.html", "PERFORMANCE_REPORT.md", "reproduce.sh", "plan.json", "plots/executive_summary.png"):
        assert (run / name).stat().st_size > 0
    assert not (run / "candidates").exists()
    assert not (run / "scratch").exists()


def test_the_quantized_model_is_as_good_as_it_says(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    baseline, native = (
        read_result(finished[0] / "results" / f"{name}.json").quality for name in ("transformers-fp32", "native-w8a16")
    )
    assert baseline is not None and native is not None
    assert baseline.mean_kl == 0 and baseline.top1_agreement == 1
    assert 0 < native.mean_kl < 0.01
    assert abs(native.perplexity / baseline.perplexity - 1) < 0.01


def test_a_finished_run_is_reported_again_without_measuring(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, _ = finished
    before = {path.name: path.read_bytes() for path in (run / "results").iterdir()}
    done = hasten("report", str(run), "--price-per-hour", "1.5", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert "1.5" in (run / "report.html").read_text()
    files = [str(run / "results" / f"{name}.json") for name in ("transformers-fp32", "native-w8a16")]
    from_files = hasten("report", *files, "-o", "elsewhere", cwd=run.parent)
    assert from_files.returncode == 0, from_files.stderr
    assert "onnxruntime" not in (run.parent / "elsewhere" / "report.html").read_text()
    compared = hasten("compare", str(run), "--json", cwd=run.parent)
    assert json.loads(compared.stdout)["candidates"][0]["candidate"] == "transformers-fp32"
    assert {path.name: path.read_bytes() for path in (run / "results").iterdir()} == before


def test_an_interrupted_run_leaves_no_process_and_goes_on_where_it_was(tmp_path: Path) -> None:
    options = ["--runtimes", "native", "--schemes", "fp32", "--runs", "12", "-o", "run"]
    arguments = [sys.executable, "-m", "hasten", "optimize", str(MODEL), *QUICK, *options]
    process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    first = tmp_path / "run" / "results" / "native-fp32.json"
    deadline_s = time.monotonic() + 120
    while not (first.exists() and len(read_result(first).runs) >= 2):
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "hasten: interrupted; the same command goes on from here" in error
    assert "Traceback" not in error
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    interrupted = read_result(first)
    assert 2 <= len(interrupted.runs) < 24

    done = hasten(*arguments[3:], cwd=tmp_path)
    assert done.returncode in (0, 4), done.stderr
    assert "Traceback" not in done.stderr
    result = read_result(first)
    assert result.runs[: len(interrupted.runs)] == interrupted.runs
    assert len(result.runs) == 24
