"""How fast a run is against its hardware: model FLOPs utilisation (MFU) as in appendix B of arXiv 2204.02311."""

from __future__ import annotations

import torch

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "GB200": 2250e12, "L40S": 362e12}
"""Dense bfloat16 FLOP/s of the vendors' data sheets, without sparsity."""


def peak_flops(device: torch.device) -> float | None:
    """The device's data-sheet bfloat16 FLOP/s; None for one that is not listed."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((PEAK_FLOPS[word] for word in words if word in PEAK_FLOPS), None)


class Throughput:
    """Figures of speed and memory from a number of tokens (all ranks) and the seconds they took."""

    def __init__(self, flops_per_token: int, device: torch.device, world_size: int):
        peak = peak_flops(device)
        self._flops_per_token, self._device = flops_per_token, device
        self._peak = None if peak is None else peak * world_size

    def figures(self, n_tokens: int, seconds: float) -> dict[str, float]:
        """tokens_per_second; on a GPU memory_gib (the peak of this rank's tensors) and, where known, mfu."""
        values = {"tokens_per_second": n_tokens / seconds}
        if self._peak is not None:
            values["mfu"] = self._flops_per_token * values["tokens_per_second"] / self._peak
        if self._device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return values
