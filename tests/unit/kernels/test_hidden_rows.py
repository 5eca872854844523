"""Rows of the residual stream: whoever reads them has everything added, once."""

import torch

from hasten.kernels.cuda.hidden_rows import HiddenRows, take_addend, whole


def test_an_addend_is_added_once_and_in_place() -> None:
    rows, addend = torch.ones(2, 3), torch.full((2, 3), 2.0)
    hidden = HiddenRows.of(rows, addend=addend)
    for _ in range(2):
        found = whole(hidden)
        assert type(found) is torch.Tensor
        assert found.data_ptr() == rows.data_ptr()
        assert bool((found == 3).all())


def test_who_takes_the_addend_adds_it() -> None:
    hidden = HiddenRows.of(torch.ones(2, 3), addend=torch.ones(2, 3))
    assert take_addend(hidden) is not None
    assert take_addend(hidden) is None
    assert bool((whole(hidden) == 1).all())
    assert take_addend(torch.ones(2)) is None


def test_what_is_computed_from_them_is_a_plain_tensor() -> None:
    """Sums of squares do not outlive the rows that they were taken of."""
    hidden = HiddenRows.of(torch.ones(2, 3), squares=torch.full((2, 1), 3.0))
    assert type(hidden.index_select(0, torch.tensor([1]))) is torch.Tensor
    assert type(hidden + 1) is torch.Tensor
    assert type(whole(hidden)) is torch.Tensor
