"""schemathesis against the server's own OpenAPI description: whatever it makes up, no 500 and no hang."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_process import ServeProcess

CASES_A_ROUTE = 40
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture
def short_server() -> Iterator[ServeProcess]:
    """Its limit keeps a chat that asks for as many tokens as fit short."""
    started = ServeProcess("--max-model-tokens", "48", "--log-format", "text").wait_until_ready()
    yield started
    started.close()


def test_made_up_requests_are_answered(short_server: ServeProcess, tmp_path: Path) -> None:
    # a made-up request may ask for no more than some microseconds, and 504 is the answer to that
    (tmp_path / "schemathesis.toml").write_text(
        '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 504]\n'
    )
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{short_server.url}/openapi.json"]
    options = ["--checks", CHECKS, "--phases", "coverage,fuzzing", "-n", str(CASES_A_ROUTE), "--seed", "1"]
    limits = ["--request-timeout", "30", "--suppress-health-check", "all", "--no-color", "--continue-on-failure"]
    run = subprocess.run([*command, *options, *limits], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert httpx.get(f"{short_server.url}/ready").status_code == 200
    statuses = [int(found.group(1)) for line in short_server.lines if (found := re.search(r" status=(\d+) ", line))]
    assert len(statuses) > 10 * CASES_A_ROUTE
    assert {200, 400} <= set(statuses)
    assert {status for status in statuses if status >= 500} <= {503, 504}  # 503 while it loaded
