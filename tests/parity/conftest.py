"""The tiny models of `tiny_models`, each made once in a test run."""

from collections.abc import Callable

import pytest
from tiny_models import TinyModel, make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """A function from a variant's name to the model, made once."""
    made: dict[str, TinyModel] = {}

    def get(variant: str) -> TinyModel:
        if variant not in made:
            made[variant] = make_model(tmp_path_factory.mktemp(variant), variant)
        return made[variant]

    return get
