"""The benchmark of decode attention: what a launch reads, and its 8-bit caches."""

from __future__ import annotations

import pytest
import torch

from eval.speed.decode_attention import Workload, main, quantized, rotations_of


def test_a_window_or_a_smaller_format_reads_less() -> None:
    assert Workload(3, 100, 16).n_bytes == 2 * 3 * 100 * 128 * 2
    assert Workload(3, 100, 16, window=10, cache="fp8").n_bytes == 2 * 3 * 10 * 128
    ragged = Workload(50, 100, 16, ragged=True)
    lengths = ragged.lengths()
    assert 1 <= int(lengths.min()) < int(lengths.max()) <= 200 and ragged.n_tokens == int(lengths.sum())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_cache_is_near_the_exact_one(dtype: torch.dtype) -> None:
    x_SGK = torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(0))
    elements_SGK, scale_SG = quantized(x_SGK, dtype)
    assert elements_SGK.dtype == dtype and scale_SG.shape == (40, 2)
    error = elements_SGK.float() * scale_SG[..., None] - x_SGK
    assert 0 < float(error.norm() / x_SGK.norm()) < 0.04


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_rotations_share_no_page() -> None:
    tables, n_rotations = rotations_of(Workload(2, 100, 16), 16 * 40)
    pages = torch.cat([table.flatten() for table in tables])
    assert n_rotations == len(tables) == 2 and len(pages.unique()) == len(pages) == 28


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "sees none here" in capsys.readouterr().err
