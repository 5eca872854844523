"""`hasten serve` as a process, as users start it, on the model that ships.

The engine has one thread unless a test says otherwise: threads that spin for one another are ten times slower
where other programs have the cores, as other tests do.
"""

import re
import subprocess
import sys
import threading
from pathlib import Path

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
START_TIMEOUT_S = 120


class ServeProcess:
    """`hasten serve` on a free port.

    Attributes:
        url: its address.
        lines: of its stderr so far.
    """

    def __init__(self, *arguments: str, model: Path = MODEL) -> None:
        options = ["--port", "0", "--device", "cpu", "--threads", "1", *arguments]
        command = [sys.executable, "-m", "hasten", "serve", str(model), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.url = ""
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def grpc_address(self) -> str:
        """Host and port, of one with --grpc-port that is ready."""
        [address] = re.findall(r"gRPC (\S+)$", "".join(self.lines), re.MULTILINE)
        return str(address)

    def wait_until_ready(self) -> "ServeProcess":
        assert self._is_ready.wait(START_TIMEOUT_S), "".join(self.lines)
        assert self.url, "".join(self.lines)
        return self

    def wait(self, timeout_s: float = 30) -> int:
        """Its exit status; all of its stderr is in `lines` then."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"^OpenAI API +(\S+)/v1$", line):
                self.url = found.group(1)
            if line.startswith("try it"):
                self._is_ready.set()
        self._is_ready.set()
