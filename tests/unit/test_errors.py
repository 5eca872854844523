import inspect
import re

import pytest

from hasten import errors
from hasten.errors import HastenError

CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass)]


def test_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawn = set(re.findall(r"\w+Error\b", errors.__doc__ or ""))
    assert drawn == {each.__name__ for each in CLASSES}


@pytest.mark.parametrize("error", CLASSES)
def test_exit_code_is_the_one_in_the_docstring(error: type[HastenError]) -> None:
    assert issubclass(error, HastenError)
    drawn = re.search(rf"{error.__name__} +(?:exit (\d))?", errors.__doc__ or "")
    assert drawn
    assert error.exit_code == int(drawn.group(1) or 1)
