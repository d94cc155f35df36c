"""Decoding speed of models with this project's runner (model/inference/)."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt

from data.packed.shards import PackedDataset
from eval.scoring import OnProgress, silent
from model.inference.generate import generate
from model.inference.request import Request
from model.inference.sampling import Sampling
from model.inference.scheduler import Step
from model.transformer import Transformer
from recipes.loader import Section


class SpeedSection(Section):
    """Prompts of `prompt_tokens`, `new_tokens` greedy tokens for each of a batch, the median of `repeats` passes."""

    prompt_tokens: PositiveInt
    new_tokens: Annotated[int, Field(ge=3)]
    batches: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    repeats: PositiveInt
    precision: Literal["float32", "bfloat16"]


def speed_prompts(dataset: PackedDataset, section: SpeedSection) -> list[list[int]]:
    """Prompts for the largest batch, from the beginnings of rows."""
    numbers = [number % dataset.n_rows for number in range(max(section.batches))]
    tokens_RL = dataset.gather(numbers)[0]
    return tokens_RL[:, : section.prompt_tokens].tolist()


def time_generation(model: Transformer, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token of all prompts, seconds of a decoding step).

    A step is timed from the first to the last token of the reply that begins last, beside which all others are decoded.
    Tokens are on the host when they are seen, so the times include the device's work.
    """
    moments: dict[Request, list[float]] = {}

    def on_token(step: Step) -> None:
        moments.setdefault(step.request, []).append(time.perf_counter())

    began = time.perf_counter()
    generate(model, prompts, Sampling(new_tokens, stop_ids=(), temperature=0.0), on_token=on_token)
    first, *_, end = max(moments.values(), key=lambda times: times[0])
    return first - began, (end - first) / (new_tokens - 1)


def measure_speed(
    models: Mapping[str, Transformer],
    prompts: Sequence[Sequence[int]],
    section: SpeedSection,
    on_progress: OnProgress = silent,
) -> dict[str, list[dict[str, Any]]]:
    """For each model and batch size: tokens a second (median, slowest, fastest), milliseconds to the first token.

    The models take turns in every pass, after a warm-up pass, so that a slow period of the machine affects them all.
    """
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    done, total = 0, len(section.batches) * (section.repeats + 1) * len(models)
    for batch in section.batches:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for number in range(section.repeats + 1):
            for name, model in models.items():
                taken = time_generation(model, prompts[:batch], section.new_tokens)
                if number:
                    times[name].append(taken)
                done += 1
                on_progress(done, total)
        for name, taken_by in times.items():
            rates = [batch / step for _, step in taken_by]
            figures[name].append(
                {
                    "batch": batch,
                    "tokens_per_second": statistics.median(rates),
                    "slowest": min(rates),
                    "fastest": max(rates),
                    "first_token_ms": 1000 * statistics.median(first for first, _ in taken_by),
                }
            )
    return figures


def device_name(device: torch.device) -> str:
    """The name of the device in reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
