"""The server that `optimize` starts: it fails in one sentence, and never outlives who started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hasten.bench.result import BenchConfig, BenchResult, BenchRun, Candidate, Environment, ModelInfo
from hasten.errors import ModelError, RuntimeFailedError
from hasten.pipeline import served_speed
from hasten.pipeline.config import ServeConfig
from hasten.pipeline.progress import Schedule
from hasten.pipeline.served_speed import num_runs_within, running

MODEL = Path(__file__).parents[3] / "examples" / "models" / "tiny-llama"
HOLD = """
import sys, time
from pathlib import Path
from hasten.pipeline.config import ServeConfig
from hasten.pipeline.progress import Schedule
from hasten.pipeline.served_speed import running
with running(ServeConfig(sys.argv[1], port=0, device="cpu", threads=1), Schedule(), Path(sys.argv[2])) as url:
    print(url, flush=True)
    time.sleep(600)
"""


def test_a_time_budget_means_fewer_runs_but_at_least_one() -> None:
    def run(concurrency: int, took_s: float) -> BenchRun:
        return BenchRun(concurrency, 0, 10.0, 10.0 + took_s, None, ())

    environment = Environment("", "", 1, (), 0, "", "", (), None, {})
    bench = BenchConfig(8, 8, (1, 2), num_runs=10, num_warmup=2, num_threads=1, seed=0)
    runs = (run(1, 0.2), run(2, 0.3))
    offline = BenchResult(Candidate("native", "bf16"), ModelInfo("m"), environment, bench, "", "", "", runs)
    budgets = (None, 100.0, 7.2, 0.1, -5.0)  # a round takes 0.5 s, and as long without a server
    assert [num_runs_within(budget, offline) for budget in budgets] == [10, 10, 5, 1, 1]


def test_a_model_that_cannot_be_served_raises_what_serve_raised(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = ServeConfig(str(tmp_path / "model"), port=0, device="cpu")
    with pytest.raises(ModelError, match=r"config\.json"), running(config, Schedule(), tmp_path / "log"):
        pass


def test_a_server_that_dies_is_an_error_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_speed, "COMMAND", ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    message = rf"the server was killed by SIGKILL .* \(log: {tmp_path}/log\)"
    with pytest.raises(RuntimeFailedError, match=message), running(ServeConfig("m"), Schedule(), tmp_path / "log"):
        pass


def test_the_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(MODEL), str(tmp_path / "log")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("http://127.0.0.1:")
    servers = psutil.Process(holder.pid).children(recursive=True)
    assert len(servers) >= 2  # the API process and the engine process
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    deadline_s = time.monotonic() + 30
    while any(server.is_running() and server.status() != psutil.STATUS_ZOMBIE for server in servers):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
