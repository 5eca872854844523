"""What a test needs from the system and does not find."""

import os
from typing import NoReturn

import pytest


def absent(what: str) -> NoReturn:
    """Skips the test with the reason; in continuous integration, which installs all of it, the test fails."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)
