"""Finds NVIDIA's tritonserver and runs it on a model repository.

It is the binary named by $TRITONSERVER, else the one on PATH. $TRITON_VENV names a virtual environment that
holds the wheel nvidia-pytriton, which carries the binary: its parts are put together in the places where the
binary looks for them, and its Python runs the models. Where there is none, NGC's container has it.
"""

import ctypes
import http.client
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hasten
from hasten.errors import RuntimeFailedError, UsageError

IMAGE = "nvcr.io/nvidia/tritonserver:25.06-py3"

POLL_S = 0.1
STOP_TIMEOUT_S = 60
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclass(frozen=True)
class Tritonserver:
    """How to start the server: a command without its ports, and the environment that it needs."""

    command: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    host: str
    http: int
    grpc: int
    metrics: int

    @property
    def options(self) -> tuple[str, ...]:
        names = ("http", "grpc", "metrics")
        addresses = (f"--{name}-address={self.host}" for name in names)
        return (*addresses, *(f"--{name}-port={getattr(self, name)}" for name in names))


def find_tritonserver(folder: Path) -> Tritonserver | None:
    """The server of this machine, None if there is none.

    Args:
        folder: where the parts of the wheel are put together; it must outlive the server.

    Raises:
        UsageError: $TRITONSERVER or $TRITON_VENV does not name what it should.
    """
    if venv := os.environ.get("TRITON_VENV"):
        return _from_wheel(Path(venv).resolve(), folder)
    named = os.environ.get("TRITONSERVER")
    binary = shutil.which(named or "tritonserver")
    if named and binary is None:
        raise UsageError(f"TRITONSERVER is {named}, which is no program")
    return None if binary is None else Tritonserver((binary,), dict(os.environ))


def _from_wheel(venv: Path, folder: Path) -> Tritonserver:
    wheels = sorted(venv.glob("lib/python3.*/site-packages/pytriton/tritonserver"))
    if not wheels:
        raise UsageError(f"TRITON_VENV is {venv}, which has no nvidia-pytriton: {venv}/bin/pip install nvidia-pytriton")
    wheel = wheels[0]
    version = wheel.parents[2].name.removeprefix("python")
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    parts = [*(wheel / "backends" / "python").iterdir(), *(wheel / "python_backend_stubs" / version).iterdir()]
    for part in parts:
        (backend / part.name).symlink_to(part)
    libraries = str(wheel.parents[1] / "nvidia_pytriton.libs")
    environment = os.environ | {
        "LD_LIBRARY_PATH": ":".join(filter(None, (libraries, os.environ.get("LD_LIBRARY_PATH")))),
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",  # the first python3 on it decides what models can import
    }
    command = (str(wheel / "bin" / "tritonserver"), f"--backend-directory={folder / 'backends'}")
    return Tritonserver((*command, f"--cache-directory={wheel / 'caches'}"), environment)


def container_advice(model: str, ports: Ports) -> str:
    """What to do where there is no tritonserver: how to name one, or to run its container with hasten in it."""
    project = Path(hasten.__file__).resolve().parents[2]
    is_checkout = (project / "pyproject.toml").is_file()
    mounted = [Path(model).resolve(), *([project] if is_checkout else [])]
    mounts = " ".join(f"-v {path}:{path}" for path in dict.fromkeys(mounted))
    published = " ".join(f"-p {port}:{port}" for port in (ports.http, ports.grpc, ports.metrics))
    serve = f"hasten serve {Path(model).resolve()} --with triton --host 0.0.0.0 --port {ports.http}"
    return (
        "there is no tritonserver on PATH: name its binary in TRITONSERVER, name in TRITON_VENV a virtual environment "
        f"that has nvidia-pytriton, or run NGC's container:\n  docker run --rm --gpus all --shm-size 1g {published} "
        f"{mounts} {IMAGE} sh -c 'pip install {project if is_checkout else 'hasten'} && {serve}'"
    )


@contextmanager
def running(server: Tritonserver, repository: Path, ports: Ports) -> Iterator[subprocess.Popen[bytes]]:
    """Starts the server and ends it, also when this process is killed; what it logs goes to stderr.

    Raises:
        RuntimeFailedError: it ended before all models of the repository were loaded.
    """
    prctl = ctypes.CDLL(None).prctl
    process = subprocess.Popen(
        [*server.command, f"--model-repository={repository}", *ports.options],
        env=server.environment,
        stdout=2,
        process_group=0,  # the terminal's Ctrl-C goes to its foreground group, and this is none of it
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509 (it takes no lock)
    )
    try:
        _wait_until_ready(process, ports)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], ports: Ports) -> None:
    while process.poll() is None:
        if _answers(ports):
            return
        time.sleep(POLL_S)
    raise RuntimeFailedError(f"tritonserver ended with code {process.returncode}: see its log above")


def _answers(ports: Ports) -> bool:
    host = "127.0.0.1" if ports.host == "0.0.0.0" else ports.host
    connection = http.client.HTTPConnection(host, ports.http, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
