"""A real server that the tests of this folder share."""

from collections.abc import Iterator

import pytest
from serve_process import ServeProcess


@pytest.fixture(scope="session")
def server() -> Iterator[ServeProcess]:
    """A server that tests share and leave as they found it."""
    started = ServeProcess("--max-num-seqs", "16").wait_until_ready()
    yield started
    assert started.process.poll() is None, "".join(started.lines)
    started.close()
