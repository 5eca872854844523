"""The hidden state between a product that adds to it and the norm behind it."""

import torch


class HiddenRows(torch.Tensor):
    """Rows [rows, width] of the residual stream, with what the norm behind them need not compute or read again.

    Attributes:
        squares: float32 [rows, parts], sums of squares of parts of each row; None if nobody summed them.
        addend: [rows, width], still to be added in place before anything else reads the rows; None if nothing is.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    squares: torch.Tensor | None
    addend: torch.Tensor | None

    @staticmethod
    def of(
        rows: torch.Tensor, *, squares: torch.Tensor | None = None, addend: torch.Tensor | None = None
    ) -> "HiddenRows":
        """The same memory."""
        hidden = rows.as_subclass(HiddenRows)
        hidden.squares, hidden.addend = squares, addend
        return hidden


def take_addend(x: torch.Tensor) -> torch.Tensor | None:
    """What the caller adds to x from now on."""
    if not isinstance(x, HiddenRows):
        return None
    addend, x.addend = x.addend, None
    return addend


def whole(x: torch.Tensor) -> torch.Tensor:
    """x as a plain tensor, with its addend added."""
    if not isinstance(x, HiddenRows):
        return x
    addend, rows = take_addend(x), x.as_subclass(torch.Tensor)
    return rows if addend is None else rows.add_(addend)
