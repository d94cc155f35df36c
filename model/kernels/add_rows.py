"""Add the sum of rows to existing vectors, in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import MOST_SUMS

_COLUMNS = 8


@triton.jit
def _add_rows_kernel(
    total_ptr, rows_ptr, other_total_ptr, other_rows_ptr, n_rows, n_columns, row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 1:
        total_ptr = other_total_ptr
        rows_ptr = other_rows_ptr
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n_columns
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n_rows, ROWS):
        rows_R1 = (first + tl.arange(0, ROWS))[:, None]
        mask = (rows_R1 < n_rows) & inside[None, :]
        sums += tl.load(rows_ptr + rows_R1 * row_stride + columns[None, :], mask=mask, other=0.0)
    total = tl.load(total_ptr + columns, mask=inside, other=0.0)
    tl.store(total_ptr + columns, total + tl.sum(sums, 0), mask=inside)


def add_rows(totals_D: Sequence[Tensor], rows_PD: Sequence[Tensor]) -> None:
    """Each total += the sum of its rows, in place, for one or two pairs of equal shape and strides, float32."""
    n_rows, n_columns = rows_PD[0].shape
    assert len(totals_D) == len(rows_PD) <= 2
    assert all(rows.shape == rows_PD[0].shape and rows.stride() == rows_PD[0].stride() for rows in rows_PD)
    assert rows_PD[0].stride(1) == 1 or n_columns == 1
    assert all(total.is_contiguous() and total.numel() == n_columns for total in totals_D)
    if n_rows:
        _add_rows_kernel[(triton.cdiv(n_columns, _COLUMNS), len(totals_D))](
            totals_D[0], rows_PD[0], totals_D[-1], rows_PD[-1], n_rows, n_columns, rows_PD[0].stride(0),
            ROWS=MOST_SUMS, COLUMNS=_COLUMNS, num_warps=8,
        )  # fmt: skip
