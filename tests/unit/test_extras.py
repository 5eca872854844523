import re
import tomllib
from pathlib import Path

import pytest

from hasten import extras
from hasten.errors import MissingExtraError
from hasten.extras import EXTRAS, Extra


def test_table_agrees_with_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    for extra in EXTRAS.values():
        requirements = [re.sub(r"\[.*\]", "", each) for each in declared[extra.name]]
        assert f"{extra.distribution}>={extra.min_version}" in requirements


def test_missing_extra_says_who_needs_it_and_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Extra("imaginary", "no_such_module", "no-such-dist", "1.2", "the imaginary runtime")
    monkeypatch.setitem(EXTRAS, "no_such_module", row)
    assert not extras.is_installed("no_such_module")
    assert extras.installed_version("no_such_module") is None
    message = "the imaginary runtime needs no-such-dist>=1.2: pip install 'hasten[imaginary]'"
    with pytest.raises(MissingExtraError, match=re.escape(message)):
        extras.require("no_such_module")


def test_installed_module_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "pytest", Extra("x", "pytest", "pytest", "1", "a test"))
    assert extras.require("pytest") is pytest
    assert extras.installed_version("pytest") == pytest.__version__
