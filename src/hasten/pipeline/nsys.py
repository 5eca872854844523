"""Nsight Systems, driven: one runtime's `hasten generate` under `nsys profile`."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hasten.errors import MissingExtraError, RuntimeFailedError

OPTIONS = ("--trace=cuda,nvtx,osrt", "--cuda-graph-trace=node", "--sample=none", "--force-overwrite=true")
SUFFIX = ".nsys-rep"
WORD = " the"  # one token to most tokenizers


def find_nsys() -> str:
    """The path of nsys.

    Raises:
        MissingExtraError: it is not on the PATH.
    """
    found = shutil.which("nsys")
    if found is None:
        raise MissingExtraError(
            "--nsys needs Nsight Systems and nsys is not on the PATH: install NVIDIA's nsight-systems-cli, "
            "or leave out --nsys, since the Chrome traces are written without it"
        )
    return found


def record_generate(
    nsys: str, model: Path, options: Sequence[str], prompt_tokens: int, new_tokens: int, report: Path
) -> Path:
    """Writes the report of one generation; the ranges "prefill", "decode" and "sampling" are in it as NVTX.

    Args:
        options: of `hasten generate`, those that choose runtime, scheme and device.
        report: without the suffix that nsys adds.

    Raises:
        RuntimeFailedError: nsys failed or wrote no report.
    """
    generate = [sys.executable, "-P", "-m", "hasten", "generate", str(model), WORD * prompt_tokens, *options]
    length = ["--max-tokens", str(new_tokens), "--ignore-eos"]
    command = [nsys, "profile", *OPTIONS, f"--output={report}", *generate, *length]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    written = report.with_name(report.name + SUFFIX)
    if run.returncode or not written.is_file():
        lines = (run.stderr.strip() or run.stdout.strip()).splitlines() or [f"exit status {run.returncode}"]
        raise RuntimeFailedError(f"nsys wrote no report of {report.name}: {lines[-1]}")
    return written
