"""What goes into a result beside the samples: the model, the machine, the command."""

import datetime
import hashlib
import platform
import shlex
import socket
import sys
from importlib import metadata
from pathlib import Path

from hasten.artifact import ModelRef
from hasten.bench.result import BenchConfig, BenchResult, Candidate, Environment, ModelInfo
from hasten.hardware import Hardware

DISTRIBUTIONS = {
    "transformers": ("torch", "transformers"),
    "native": ("torch",),
    "onnxruntime": ("onnxruntime-genai", "onnxruntime"),
    "llama_cpp": ("llama-cpp-python",),
}


def blank_result(
    candidate: Candidate, model: ModelRef, hardware: Hardware, bench: BenchConfig, arguments: list[str]
) -> BenchResult:
    """A result in which nothing is measured yet.

    Args:
        arguments: of `hasten`, those that measure this candidate alone.
    """
    return BenchResult(
        candidate=candidate,
        model=model_info(model),
        environment=describe_environment(hardware, candidate.runtime),
        config=bench,
        command=shlex.join(["hasten", *arguments]),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        hasten_version=metadata.version("hasten"),
    )


def model_info(model: ModelRef) -> ModelInfo:
    """A model folder's facts, as results have them."""
    return ModelInfo(
        name=model.name,
        revision=model.revision,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        linear_parameters=model.linear_parameters,
        max_context_tokens=model.max_context_tokens,
        vocab_size=model.vocab_size,
    )


def describe_environment(hardware: Hardware, runtime: str) -> Environment:
    """The machine and the versions behind a runtime's result."""
    versions = {name: metadata.version(name) for name in DISTRIBUTIONS.get(runtime, ())}
    return Environment(
        hostname_hash=hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12],
        cpu=hardware.cpu,
        num_cpus=hardware.num_cpus,
        cpu_flags=hardware.cpu_flags,
        memory_bytes=hardware.memory_bytes,
        os=hardware.os,
        python=platform.python_version(),
        gpus=tuple(gpu.name for gpu in hardware.gpus),
        read_bandwidth_bytes_per_s=hardware.read_bandwidth_bytes_per_s,
        versions=versions,
    )


def bench_arguments(model: str, candidate: Candidate, bench: BenchConfig) -> list[str]:
    """The command line that measures one candidate as a run did."""
    return [
        *("bench", "offline", model, "--runtime", candidate.runtime, "--scheme", candidate.scheme),
        *("--concurrency", ",".join(str(each) for each in bench.concurrency)),
        *("--prompt-tokens", str(bench.prompt_tokens), "--new-tokens", str(bench.new_tokens)),
        *("--runs", str(bench.num_runs), "--warmup", str(bench.num_warmup)),
        *("--threads", str(bench.num_threads), "--seed", str(bench.seed)),
        *("--device", bench.device),
    ]


def command_line() -> str:
    """How this process was started, as a user would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder, links followed."""
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
