"""schemathesis against the server's own OpenAPI description: whatever it makes up, no 500 and no hang.

The cases that follow from the description itself are for every run of the tests. More than 10,000 take half an hour:

    HASTEN_FUZZ_CASES=900 python -m pytest tests/serving/test_serve_fuzzing.py --timeout 10800
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_process import ServeProcess

from tiny_encoders import make_encoder, write_modules, write_tokenizer

# random ones of each route that takes a body
NUM_CASES = int(os.environ.get("HASTEN_FUZZ_CASES", "5"))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


# a chat that asks for as many tokens as fit stays short, and hundreds of continuations are refused
LIMITS = ("--max-model-tokens", "48", "--max-num-seqs", "8", "--max-queue", "8", "--log-format", "text")


@pytest.fixture
def short_server() -> Iterator[ServeProcess]:
    started = ServeProcess(*LIMITS).wait_until_ready()
    yield started
    started.close()


@pytest.fixture
def encoder_server(tmp_path: Path) -> Iterator[ServeProcess]:
    folder = tmp_path / "tiny-bert"
    make_encoder(folder, matryoshka_dimensions=[16, 32])
    write_modules(folder, {"pooling_mode_mean_tokens": True})
    write_tokenizer(folder)
    started = ServeProcess(*LIMITS, model=folder).wait_until_ready()
    yield started
    started.close()


def statuses_of_made_up_requests(server: ServeProcess, tmp_path: Path) -> list[int]:
    """What the server answered them with, all as it should."""
    # a made-up request may ask for no more than some microseconds, and 504 is the answer to that
    (tmp_path / "schemathesis.toml").write_text(
        '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 504]\n'
    )
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json"]
    options = ["--checks", CHECKS, "--phases", "coverage,fuzzing", "-n", str(NUM_CASES), "--seed", "1"]
    limits = ["--request-timeout", "30", "--suppress-health-check", "all", "--no-color", "--continue-on-failure"]
    run = subprocess.run([*command, *options, *limits], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert httpx.get(f"{server.url}/ready").status_code == 200
    statuses = [int(found.group(1)) for line in server.lines if (found := re.search(r" status=(\d+) ", line))]
    assert {200, 400} <= set(statuses)
    assert {status for status in statuses if status >= 500} <= {503, 504}  # 503 while it loaded
    return statuses


def test_made_up_requests_are_answered(short_server: ServeProcess, tmp_path: Path) -> None:
    assert len(statuses_of_made_up_requests(short_server, tmp_path)) > 1500 + 10 * NUM_CASES


def test_an_encoder_answers_them_too(encoder_server: ServeProcess, tmp_path: Path) -> None:
    assert len(statuses_of_made_up_requests(encoder_server, tmp_path)) > 400
