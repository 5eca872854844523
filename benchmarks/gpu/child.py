"""The parent's end of engines.py: starts an engine's process, hands it runs, and outlives it."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

ENGINES = Path(__file__).parent / "engines.py"


class ChildError(Exception):
    """An engine could not be built, loaded or run; the message has its last line."""


class Child:
    """An engine in its own process group, which is killed as a whole.

    Args:
        path: put before PYTHONPATH, None leaves it.

    Attributes:
        ready_s: from the start of the process to its first answer.
        weight_bytes: see engines.Engine.
    """

    def __init__(
        self, engine: str, scheme: str, model: Path, options: list[str], logs: Path, path: Path | None
    ) -> None:
        self.engine, self.scheme = engine, scheme
        self.name = f"{engine} {scheme}"
        self.ready_s: float | None = None
        self.versions: dict[str, str] = {}
        self.weight_bytes: int | None = None
        self._start_s = time.monotonic()
        self._log = logs / f"{engine}-{scheme}-{time.monotonic_ns()}.log"
        environment = dict(os.environ)
        if path is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
        command = ["--engine", engine, "--model", str(model), "--scheme", scheme, *options]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(ENGINES), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self._answers: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_ready(self) -> bool:
        return self.ready_s is not None

    def wait_until_ready(self, timeout_s: float) -> None:
        """Raises ChildError if it dies first or takes longer."""
        time_s, answer = self._answer(timeout_s)
        self.versions, self.weight_bytes = answer["versions"], answer["weight_bytes"]
        self.ready_s = time_s - self._start_s

    def run(self, prompt_tokens: int, new_tokens: int, batch: int, seed: int, timeout_s: float) -> float:
        """Seconds for one batch of fresh prompts."""
        command = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "seed": seed}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ChildError(self._last_line()) from error
        return float(self._answer(timeout_s)[1]["seconds"])

    def close(self) -> None:
        """Kills the whole group: an engine may have processes of its own."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put((time.monotonic(), line))
        self._answers.put((time.monotonic(), ""))

    def _answer(self, timeout_s: float) -> tuple[float, dict[str, Any]]:
        try:
            time_s, line = self._answers.get(timeout=max(timeout_s, 0.1))
        except queue.Empty:
            raise ChildError(f"{self.name} did not answer in {timeout_s:.0f} s") from None
        if not line:
            raise ChildError(self._last_line())
        answer = json.loads(line)
        if "error" in answer:
            raise ChildError(answer["error"])
        return time_s, answer

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"{self.name} ended: {lines[-1] if lines else 'it said nothing'}"[:400]
