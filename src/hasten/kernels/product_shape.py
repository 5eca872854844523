"""The shape of a product of a decode step, by which kernels are tuned."""

from dataclasses import dataclass

ROW_BUCKETS = (1, 2, 4, 8, 16)
"""Rows of activations that products bound by their weights are configured for; a batch uses the next larger one."""

TUNED_BUCKETS = (4, 8, 16)
"""Those whose configuration is measured. With fewer rows a kernel ends so soon that its neighbours decide what is
fastest; the default is, in whole decode steps, and what is chosen for a product by itself is up to 7 % slower."""


@dataclass(frozen=True)
class ProductShape:
    """A product of a decode step.

    Args:
        rows_out, rows_in: of the weight matrix [rows_out, rows_in].
        dtype: of the weights, in torch's spelling.
        rows: of the activations, one of ROW_BUCKETS.
        is_gated: the first half of the rows gates the second.
    """

    rows_out: int
    rows_in: int
    dtype: str
    rows: int
    is_gated: bool = False

    @property
    def key(self) -> str:
        gated = " gated" if self.is_gated else ""
        return f"stream_linear {self.rows_out}x{self.rows_in} {self.dtype}{gated} rows<={self.rows}"
