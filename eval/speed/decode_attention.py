"""Decode attention on one GPU: bytes of keys and values read a second, beside a copy and PyTorch's own kernels.

python -m eval.speed.decode_attention [--json decode_attention.json]

Launches are captured in a CUDA graph and read cache pages in random order, of pools larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

D_HEAD = 128
POOL_SLOTS = 1 << 20
"""Slots of the cache pool: 256 MiB of keys in 16 bits."""


@dataclass(frozen=True)
class Workload:
    """A decoding step of `batch` sequences of `context` cached tokens; ragged: of 1 to 2 * context."""

    batch: int
    context: int
    n_heads: int
    page: int = 16
    window: int | None = None
    deterministic: bool = False
    cache: str = "bfloat16"
    ragged: bool = False

    @property
    def n_tokens(self) -> int:
        """Cached tokens that a launch reads."""
        return int(self.lengths().clamp(max=self.window or 1 << 30).sum())

    @property
    def n_bytes(self) -> int:
        """Bytes of keys and values that a launch reads, without scales."""
        return 2 * self.n_tokens * D_HEAD * (2 if self.cache == "bfloat16" else 1)

    def lengths(self) -> Tensor:
        """Number of cached tokens of each sequence."""
        if not self.ragged:
            return torch.full((self.batch,), self.context, dtype=torch.int32)
        share_B = torch.rand(self.batch, generator=torch.Generator().manual_seed(5))
        return (1 + share_B * (2 * self.context - 1)).to(torch.int32)


SHAPES = ((64, 4096, 16), (16, 16384, 32), (256, 2048, 16), (1, 32768, 16), (1, 4096, 16), (64, 512, 16))
"""(batch, context, query heads)."""


class Pool:
    """Keys and values of one head in every format, made from the same random numbers."""

    def __init__(self, n_slots: int, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        keys_values = [
            F.rms_norm(torch.randn(n_slots, 1, D_HEAD, device=device, generator=generator), (D_HEAD,)) for _ in range(2)
        ]
        self.n_slots = n_slots
        self.formats: dict[str, list[tuple[Tensor, Tensor | None]]] = {
            "bfloat16": [(x_SGK.bfloat16(), None) for x_SGK in keys_values],
            "int8": [quantized(x_SGK, torch.int8) for x_SGK in keys_values],
            "fp8": [quantized(x_SGK, torch.float8_e4m3fn) for x_SGK in keys_values],
        }


def quantized(x_SGK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(elements, float32 scale of each slot and head) whose product is x_SGK."""
    largest = torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max
    scale_SG = x_SGK.abs().amax(-1).float() / largest
    scaled_SGK = x_SGK / scale_SG[..., None]
    return (scaled_SGK.round() if dtype == torch.int8 else scaled_SGK).to(dtype), scale_SG


def seconds_a_launch(launch: Callable[[int], Any], n_rotations: int, repeats: int = 5) -> float:
    """Median seconds of launch(rotation), of graphs of many launches that go through the rotations."""
    n_launches = n_rotations * max(1, round(48 / n_rotations))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(n_launches):
            launch(number % n_rotations)
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / n_launches)
    return statistics.median(times)


def rotations_of(work: Workload, n_slots: int) -> tuple[list[Tensor], int]:
    """(page tables, their number): as many as the pool holds, at most 48. No page that is read is in two of them."""
    n_pages = -(-int(work.lengths().max()) // work.page)
    n_read = min(n_pages, -(-(work.window or 1 << 30) // work.page) + 1)
    n_rotations = max(1, min(48, n_slots // work.page // (work.batch * n_read)))
    order = torch.randperm(n_slots // work.page, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    read = order[: n_rotations * work.batch * n_read].view(n_rotations, work.batch, n_read)
    tables = F.pad(read, (n_pages - n_read, 0)).cuda()
    return list(tables), n_rotations


def our_seconds(work: Workload, pool: Pool, **options: Any) -> tuple[float, float]:
    """(seconds of a launch, seconds of a plan)."""
    from model.kernels.decode_attention import decode_attention
    from model.kernels.decode_plan import DecodePlan

    cache_dtype = pool.formats[work.cache][0][0].dtype
    longest = int(work.lengths().max())
    plan = DecodePlan(
        work.batch, work.n_heads, 1, D_HEAD, longest, work.window, work.deterministic, cache_dtype, **options
    )
    lengths_B = work.lengths().cuda()
    plan.update(lengths_B)
    tables, n_rotations = rotations_of(work, pool.n_slots)
    q_BHK = torch.randn(work.batch, work.n_heads, D_HEAD, device="cuda", dtype=torch.bfloat16) / D_HEAD**0.5
    out_BHK = torch.empty_like(q_BHK)
    (k_SGK, k_scale_SG), (v_SGK, v_scale_SG) = pool.formats[work.cache]

    def launch(number: int) -> None:
        decode_attention(q_BHK, k_SGK, v_SGK, tables[number], work.page, plan, k_scale_SG, v_scale_SG, out_BHK=out_BHK)

    return seconds_a_launch(launch, n_rotations), seconds_a_launch(lambda _: plan.update(lengths_B), 1)


def torch_seconds(work: Workload, pool: Pool, kernel: str) -> float | None:
    """Seconds of PyTorch's SDPA over contiguous caches; None if this kernel refuses the shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q_BH1K = torch.randn(work.batch, work.n_heads, 1, D_HEAD, device="cuda", dtype=torch.bfloat16) / D_HEAD**0.5
    n_slots = work.batch * work.context
    n_rotations = max(1, min(48, pool.n_slots // n_slots))
    caches = [
        [x_SGK[i * n_slots : (i + 1) * n_slots].view(work.batch, 1, work.context, D_HEAD) for i in range(n_rotations)]
        for x_SGK, _ in pool.formats["bfloat16"]
    ]
    as_rows = kernel == "rows"
    q = q_BH1K.transpose(1, 2) if as_rows else q_BH1K
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

    def launch(number: int) -> None:
        k, v = (parts[number] if as_rows else parts[number].expand(-1, work.n_heads, -1, -1) for parts in caches)
        F.scaled_dot_product_attention(q, k, v, scale=1.0)

    try:
        with sdpa_kernel(list(backends.values()) if as_rows else backends[kernel]):
            return seconds_a_launch(launch, n_rotations)
    except RuntimeError:
        return None


def copy_bytes_per_second() -> float:
    """Bytes read and written a second by copies of 1 GiB (outside of a graph, where a copy is no kernel)."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return 2 * len(source) / statistics.median(times)


def measure(console: Console) -> dict[str, Any]:
    """All tables, printed; and their figures."""
    pool = Pool(POOL_SLOTS, torch.device("cuda"))
    copy = copy_bytes_per_second()
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_s": copy / 1e9, "rows": [],
    }  # fmt: skip

    def row(table: Table, work: Workload, *more: str, **fields: Any) -> float:
        seconds, plan_seconds = our_seconds(work, pool)
        rate = work.n_bytes / seconds
        figures["rows"].append({**vars(work), "us": seconds * 1e6, "gb_s": rate / 1e9, "plan_us": plan_seconds * 1e6})
        figures["rows"][-1] |= fields
        shape = f"{work.batch} x {work.context:,} x {work.n_heads}"
        table.add_row(shape, *more, f"{seconds * 1e6:.1f}", f"{rate / 1e9:,.0f}", f"{rate / copy:.0%}")
        return seconds

    def table_of(title: str, *columns: str) -> Table:
        return Table("batch x context x heads", *columns, "us", "GB/s", "of a copy", title=title)

    peers = ("flash", "cudnn", "rows")
    shapes = table_of(f"bfloat16, pages of 16; a copy: {copy / 1e9:,.0f} GB/s", *(f"SDPA {name}" for name in peers))
    for shape in SHAPES:
        work = Workload(*shape)
        times = {name: torch_seconds(work, pool, name) for name in peers}
        rates = {name: work.n_bytes / time / 1e9 if time else None for name, time in times.items()}
        row(shapes, work, *(f"{rate:,.0f}" if rate else "-" for rate in rates.values()), sdpa_gb_s=rates)
    console.print(shapes)

    pages = table_of("page sizes", "page")
    for shape in SHAPES[:3]:
        for page in (16, 32, 64, 128, shape[1]):
            row(pages, Workload(*shape, page=page), "contiguous" if page == shape[1] else str(page))
    console.print(pages)

    forms = table_of("cache formats", "cache")
    for shape in SHAPES[:3]:
        for cache in pool.formats:
            row(forms, Workload(*shape, cache=cache), cache)
    console.print(forms)

    other = table_of("windows, ragged batches, fixed splits", "what")
    for context, window in ((32768, 1024), (1024, None)):
        row(other, Workload(64, context, 16, window=window), f"window {window}" if window else "no window")
    for shape in (*SHAPES[:3], SHAPES[5]):
        ragged = Workload(shape[0], shape[1] // 2, shape[2], ragged=True)
        row(other, ragged, f"lengths 1 to {shape[1]:,}")
    for shape in SHAPES:
        row(other, Workload(*shape, deterministic=True), "deterministic")
    console.print(other)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("eval.speed.decode_attention measures a GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    figures = measure(Console(width=120))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
