"""`serve --with triton`: NVIDIA's tritonserver on a model repository, which is written first if need be."""

import contextlib
import signal
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from hasten.errors import MissingExtraError, RuntimeFailedError, UsageError
from hasten.export.triton_server import Ports, container_advice, find_tritonserver, running
from hasten.pipeline.config import ServeConfig, TritonConfig
from hasten.pipeline.export import export_triton

SHARED = ("model", "server", "host", "port", "grpc_port", "served_model_name")
ENGINE = ("scheme", "device", "threads", "max_num_seqs", "max_model_tokens")
"""Options of `serve` that are not for hasten's own server only."""


@dataclass(frozen=True)
class TritonReady:
    """A tritonserver that takes requests, with the names of its models."""

    ports: Ports
    models: tuple[str, ...]


def serve_triton(config: ServeConfig, on_ready: Callable[[TritonReady], object]) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        config: its model may also be a model repository, which is served as it is.

    Raises:
        UsageError: an option that is for hasten's own server.
        MissingExtraError: there is no tritonserver; says how to run its container.
        RuntimeFailedError: tritonserver ended by itself.
    """
    for field in fields(config):
        if field.name not in SHARED + ENGINE and getattr(config, field.name) != field.default:
            raise UsageError(f"--{field.name.replace('_', '-')} is for hasten's own server: leave it out with triton")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory(prefix="hasten-triton-") as folder:
        _serve(config, Path(folder), on_ready)


def _serve(config: ServeConfig, folder: Path, on_ready: Callable[[TritonReady], object]) -> None:
    ports = _ports(config)
    server = find_tritonserver(folder)
    if server is None:
        raise MissingExtraError(container_advice(config.model, ports))
    repository = Path(config.model)
    if not any(repository.glob("*/config.pbtxt")):
        repository = folder / "models"
        _export(config, repository)
    with running(server, repository, ports) as process:
        on_ready(TritonReady(ports, tuple(sorted(path.parent.name for path in repository.glob("*/config.pbtxt")))))
        process.wait()
    raise RuntimeFailedError(f"tritonserver ended with code {process.returncode}: see its log above")


def _export(config: ServeConfig, repository: Path) -> None:
    limits = {name: getattr(config, name) for name in ENGINE}
    export_triton(TritonConfig(model=config.model, output=repository, name=config.served_model_name, **limits))


def _ports(config: ServeConfig) -> Ports:
    """gRPC and metrics come after the port for HTTP, as with Triton's defaults; 0 takes free ones."""
    with contextlib.ExitStack() as probes:
        free = [probes.enter_context(socket.create_server((config.host, 0))).getsockname()[1] for _ in range(3)]
    ports = [config.port + number if config.port else free[number] for number in range(3)]
    return Ports(config.host, ports[0], config.grpc_port or ports[1], ports[2])
