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


def test_rotations_share_no_page_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    for window, n_read, n_expected in ((None, 7, 2), (20, 3, 6)):
        tables, n_rotations = rotations_of(Workload(2, 100, 16, window=window), 16 * 40)
        assert n_rotations == len(tables) == n_expected
        pages = torch.cat([table[:, -n_read:].flatten() for table in tables])
        assert all(table.shape == (2, 7) for table in tables)
        assert len(pages.unique()) == len(pages) == n_expected * 2 * n_read


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "sees none here" in capsys.readouterr().err
