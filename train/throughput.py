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
    """Figures of speed and memory from the work of all ranks and the seconds it took."""

    def __init__(self, device: torch.device, world_size: int):
        peak = peak_flops(device)
        self._device, self._peak = device, None if peak is None else peak * world_size

    def figures(self, n_tokens: int, flops: float, seconds: float) -> dict[str, float]:
        """tokens_per_second; on a GPU memory_gib (the peak of this rank's tensors) and, where the peak is known, mfu.

        `flops`: what the documents need (`ModelConfig.training_flops`).
        """
        values = {"tokens_per_second": n_tokens / seconds}
        if self._peak is not None:
            values["mfu"] = flops / seconds / self._peak
        if self._device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return values
