"""What kernels need in Triton's interpreter, for the tests of more than one folder."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def scalars_from_arrays() -> Iterator[None]:
    """Triton 3.6's interpreter calls int() on arrays of one element, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
        yield
