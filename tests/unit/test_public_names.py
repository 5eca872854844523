import pytest

import hasten


@pytest.mark.parametrize("name", hasten.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(hasten, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hasten.nothing
