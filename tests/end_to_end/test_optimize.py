"""`hasten optimize` as a user runs it: the real command, the shipped model, real runtimes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import psutil
import pytest

from hasten.bench.result import BenchRun, read_result
from hasten.pipeline import served_speed
from hasten.pipeline.config import OptimizeConfig
from hasten.pipeline.optimize import optimize
from hasten.pipeline.run_folder import read_recommended

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
QUICK = ["--concurrency", "1,2", "--prompt-tokens", "32", "--new-tokens", "16", "--warmup", "1", "--threads", "1"]
NUM_RUNS = 5


def hasten(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hasten", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Finished:
    """A whole run with a native and an ONNX Runtime candidate, interrupted while speed was measured, and resumed.

    Args:
        interrupted: the runs of the native candidate that were measured then.
        survivors: processes of the interrupted run that were still there 10 s later.
        error: what the interrupted run printed on stderr, done: the resumed one.
    """

    run: Path
    interrupted: tuple[BenchRun, ...]
    interrupted_status: int
    survivors: list[psutil.Process]
    error: str
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("optimize")
    arguments = ["optimize", str(MODEL), *QUICK, "--schemes", "w8a16", "--runs", str(NUM_RUNS), "-o", "run"]
    command = [sys.executable, "-m", "hasten", *arguments]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    native = folder / "run" / "results" / "native-w8a16.json"
    deadline_s = time.monotonic() + 200
    while not (native.exists() and len(read_result(native).runs) >= 2):
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    _, survivors = psutil.wait_procs(children, timeout=10)
    interrupted = read_result(native).runs
    done = hasten(*arguments, cwd=folder)
    return Finished(folder / "run", interrupted, process.returncode, survivors, error, done)


def test_an_interrupted_run_leaves_no_process_and_goes_on_where_it_was(finished: Finished) -> None:
    assert finished.interrupted_status == 130
    assert "hasten: interrupted; the same command goes on from here" in finished.error
    assert "Traceback" not in finished.error
    assert not finished.survivors
    assert 2 <= len(finished.interrupted) < 2 * NUM_RUNS
    resumed = read_result(finished.run / "results" / "native-w8a16.json").runs
    assert resumed[: len(finished.interrupted)] == finished.interrupted
    assert len(resumed) == 2 * NUM_RUNS


def test_a_run_measures_every_candidate_and_says_what_it_recommends(
    finished: Finished,
) -> None:
    run, done = finished.run, finished.done
    assert done.returncode in (0, 4), done.stderr  # five runs on a busy machine may be too few for a claim
    assert "Traceback" not in done.stderr
    names = ["transformers-fp32", "native-w8a16", "onnxruntime-w8a16"]
    for name in names:
        result = read_result(run / "results" / f"{name}.json")
        assert result.failure is None
        assert {(each.concurrency, each.round_index) for each in result.runs} == {
            (c, r) for c in (1, 2) for r in range(NUM_RUNS)
        }
        assert result.quality is not None and 1 < result.quality.perplexity < 100
        assert result.memory is not None and result.memory.peak_rss_bytes > 20 << 20
        assert result.footprint is not None and result.footprint.disk_bytes > 1 << 20
        assert name in done.stdout
    for name in ("report.html", "PERFORMANCE_REPORT.md", "reproduce.sh", "plan.json", "plots/executive_summary.png"):
        assert (run / name).stat().st_size > 0
    assert not (run / "candidates").exists()
    assert not (run / "scratch").exists()


def test_the_quantized_model_is_as_good_as_it_says(finished: Finished) -> None:
    baseline, native = (
        read_result(finished.run / "results" / f"{name}.json").quality for name in ("transformers-fp32", "native-w8a16")
    )
    assert baseline is not None and native is not None
    assert baseline.mean_kl == 0 and baseline.top1_agreement == 1
    assert 0 < native.mean_kl < 0.01
    assert abs(native.perplexity / baseline.perplexity - 1) < 0.01


@pytest.fixture
def run_with_native(finished: Finished) -> Path:
    recommended = read_recommended(finished.run)
    if recommended is None or recommended.native is None:
        pytest.skip("the machine was too busy to claim a speed-up of the native engine, so there is nothing to serve")
    return finished.run


def test_the_best_native_candidate_is_served_and_measured_over_http(run_with_native: Path, finished: Finished) -> None:
    served, offline = (read_result(run_with_native / name) for name in ("served.json", "served_offline.json"))
    assert served.failure is None
    assert (served.candidate.name, served.config.load is not None) == ("native-w8a16", True)
    assert [(each.concurrency, len(each.requests)) for each in served.runs] == [(1, 1), (2, 2)] * NUM_RUNS
    for request in (request for run in served.runs for request in run.requests):
        assert (request.error, len(request.token_times_s)) == (None, 16)
        assert request.num_prompt_tokens == pytest.approx(32, abs=2)
    for run, alone in zip(served.runs, offline.runs, strict=True):  # in turns
        assert (run.concurrency, run.round_index) == (alone.concurrency, alone.round_index)
        assert run.end_s < alone.start_s
    assert all(alone.end_s < run.start_s for alone, run in zip(offline.runs, served.runs[1:], strict=False))
    assert served.memory is not None and served.memory.peak_rss_bytes > 100 << 20
    assert "native-w8a16 served over HTTP: " in finished.done.stdout
    for name in ("report.html", "PERFORMANCE_REPORT.md"):
        assert "native-w8a16 served over HTTP: " in (run_with_native / name).read_text()


def test_a_resumed_run_keeps_what_was_served_and_a_server_that_dies_loses_nothing(
    run_with_native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_with_native, run)
    monkeypatch.setattr(served_speed, "COMMAND", ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    lengths = {
        "concurrency": (1, 2),
        "prompt_tokens": 32,
        "new_tokens": 16,
        "runs": NUM_RUNS,
        "warmup": 1,
        "threads": 1,
    }
    config = OptimizeConfig(model=str(MODEL), schemes=("w8a16",), output=run, **lengths)
    before = (run / "served.json").read_bytes()
    resumed = optimize(config).served
    assert resumed is not None and resumed.over_http == read_result(run / "served.json")
    assert (run / "served.json").read_bytes() == before
    (run / "served.json").unlink()
    outcome = optimize(config)
    assert outcome.decision.pick is not None
    assert outcome.served is not None and outcome.served.over_http.failure is not None
    sentence = f"native-w8a16 was not measured behind a server: {outcome.served.over_http.failure}"
    assert "SIGKILL" in sentence
    assert sentence in unescape((run / "report.html").read_text())


def test_a_finished_run_is_reported_again_without_measuring(
    finished: Finished,
) -> None:
    run = finished.run
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
