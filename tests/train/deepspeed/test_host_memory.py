"""Copies are what they were made of, never share memory while lent, and take no new memory when old is there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.deepspeed import host_memory
from train.deepspeed.host_memory import HostMemory

SHAPES = st.lists(st.integers(1, 5), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])


@given(rounds=st.lists(st.lists(st.tuples(SHAPES, DTYPES), max_size=4), max_size=4))
def test_memory_is_lent_to_one_at_a_time_and_again(rounds: list[list[tuple[list[int], torch.dtype]]]) -> None:
    memory = HostMemory()
    with pytest.MonkeyPatch.context() as patch:
        new: list[int] = []

        def poisoned(n_bytes: int, is_locked: bool) -> torch.Tensor:
            new.append(n_bytes)
            return torch.full((n_bytes,), 255, dtype=torch.uint8)

        patch.setattr(host_memory, "_new", poisoned)
        patch.setattr(host_memory, "_SMALLEST", 1)
        for contents in rounds:
            sources = [torch.full(shape, number, dtype=dtype) for number, (shape, dtype) in enumerate(contents)]
            copies = [memory.copy(source) for source in sources]
            assert all(map(torch.equal, copies, sources))
            memory.give_back(copies)
        sizes = [[torch.empty(shape, dtype=dtype).nbytes for shape, dtype in contents] for contents in rounds]
        most = {size: max(part.count(size) for part in sizes) for part in sizes for size in part}
        assert sorted(new) == sorted(size for size, count in most.items() for _ in range(count))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU's copy is an ordinary one")
def test_a_gpu_fills_locked_memory_which_is_lent_again() -> None:
    memory, source = HostMemory(), torch.randn(3, 1 << 20, device="cuda")
    first = memory.copy(source.T)
    torch.cuda.synchronize()
    assert first.is_pinned()
    assert torch.equal(first, source.T.cpu())
    address = first.data_ptr()
    memory.give_back([first])
    again = memory.copy(source)
    torch.cuda.synchronize()
    assert again.data_ptr() == address
    assert torch.equal(again, source.cpu())


def test_a_copy_is_contiguous_and_its_own() -> None:
    source = torch.arange(6.0).view(2, 3)
    copied = HostMemory().copy(source.T)
    assert copied.is_contiguous()
    source.zero_()
    assert copied.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
