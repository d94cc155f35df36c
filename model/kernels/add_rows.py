"""Rows summed into a vector that holds something already: in one pass and with all of them read at once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import MOST_SUMS

_COLUMNS = 8


@triton.jit
def _add_rows_kernel(
    total_ptr, rows_ptr, n_rows, n_columns, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n_columns
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n_rows, ROWS):
        rows_R1 = (first + tl.arange(0, ROWS))[:, None]
        mask = (rows_R1 < n_rows) & inside[None, :]
        sums += tl.load(rows_ptr + rows_R1 * row_stride + columns[None, :], mask=mask, other=0.0)
    total = tl.load(total_ptr + columns, mask=inside, other=0.0)
    tl.store(total_ptr + columns, total + tl.sum(sums, 0), mask=inside)


def add_rows(total_D: Tensor, rows_PD: Tensor) -> None:
    """total += the sum of the rows, in place; both float32, the rows' elements side by side."""
    n_rows, n_columns = rows_PD.shape
    assert rows_PD.stride(1) == 1 or n_columns == 1
    assert total_D.is_contiguous()
    if n_rows:
        _add_rows_kernel[(triton.cdiv(n_columns, _COLUMNS),)](
            total_D, rows_PD, n_rows, n_columns, rows_PD.stride(0), ROWS=MOST_SUMS, COLUMNS=_COLUMNS, num_warps=8
        )
