"""Training metrics: a progress line, metrics.jsonl, wandb, and the loss plot."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recipes.files import write_text
from recipes.json_text import as_number, finite_figures, json_text
from recipes.loader import Section

METRICS = "metrics.jsonl"


class WandbConfig(Section):
    """Tracking with wandb. auto: online when logged in, else offline in the run directory."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "dramatis"


class Metrics:
    """Metrics of one run, on rank 0. On resume, drops the lines after the checkpoint's step."""

    def __init__(
        self, run_dir: Path, console: Console, wandb: WandbConfig, recipe: dict[str, Any], start: int, max_steps: int
    ):
        self._run_dir, self._console, self._max_steps = run_dir, console, max_steps
        _drop_lines_after(run_dir / METRICS, start)
        self._file = (run_dir / METRICS).open("a")
        self._wandb = _start_wandb(run_dir, wandb, recipe)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(run_dir.name, total=max_steps, completed=start, figures="")
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()
        with nullcontext() if kind is None else suppress(OSError):  # close() retries a failed write
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def log(self, step: int, values: dict[str, float], skipped: str | None = None) -> None:
        """Write the values of a step to metrics.jsonl, wandb and the progress line. skipped: why it was skipped."""
        line = {
            "step": step,
            **{k: round(v, 6) for k, v in values.items()},
            **({"skipped": skipped} if skipped else {}),
        }
        try:
            self._file.write(json_text(finite_figures(line)) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk; the error has no path
            raise OSError(error.errno, error.strerror, str(self._run_dir / METRICS)) from error
        if skipped:
            self._console.print(f"step {step} skipped: {skipped}", highlight=False, markup=False, soft_wrap=True)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        figures = "  ".join(f"{name} {_short(value)}" for name, value in values.items() if name in _ON_SCREEN)
        self._progress.update(self._task, completed=step, figures=figures)
        is_evaluation = any(name.startswith("heldout") for name in values)
        if not self._console.is_terminal and (is_evaluation or time.monotonic() - self._last_line > 15):
            self._last_line = time.monotonic()
            self._console.print(f"step {step}/{self._max_steps}  {figures}", highlight=False)

    def first_step(self) -> dict[str, float]:
        """Print and return the seconds from the start of the process to the end of its first step."""
        seconds = time.time() - psutil.Process().create_time()
        self._console.print(f"first step {seconds:.0f} s after the start of the process", highlight=False)
        return {"seconds_to_first_step": seconds}


_ON_SCREEN = ("loss", "heldout_loss", "heldout_auc", "heldout_accuracy", "tokens_per_second", "mfu", "memory_gib", "lr")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _drop_lines_after(path: Path, step: int) -> None:
    """Drop lines after `step`, which a resumed run repeats, and a partial last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def _start_wandb(run_dir: Path, settings: WandbConfig, recipe: dict[str, Any]) -> Any:
    if settings.mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    mode: Any = settings.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    return wandb.init(
        project=settings.project,
        name=str(run_dir),
        dir=run_dir,
        mode=mode,
        config=recipe,
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, with NaN for non-finite figures."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: as_number(value) if value is None else value for key, value in line.items()} for line in lines]


def plot_metrics(run_dir: Path, baselines: dict[str, float] | None = None, kept_step: int | None = None) -> Path | None:
    """Draw plots/loss.png of a run: training and held-out loss by step, baselines as lines. Returns its path.

    kept_step: the step whose weights were kept, if not the last.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(run_dir / METRICS)
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    heldout = [(line["step"], line["heldout_loss"]) for line in lines if "heldout_loss" in line]
    if not losses and not heldout:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if losses:
        steps, values = zip(*losses, strict=True)
        axes.plot(steps, values, color="#9db4d3", linewidth=0.8)
        axes.plot(steps, _smooth(values), color="#1f5fa8", linewidth=1.8, label="training (smoothed)")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), color="#d1495b", marker="o", markersize=4, label="held out")
    for (name, value), style in zip((baselines or {}).items(), ("--", "-.", ":"), strict=False):
        axes.axhline(value, color="#555555", linestyle=style, linewidth=1, label=f"{name}: {value:.3f}")
    if kept_step is not None:
        axes.axvline(kept_step, color="#2a9d5c", linewidth=1.2, label=f"kept: step {kept_step}")
    axes.set(xlabel="step", ylabel="loss (nats)", title=f"{run_dir.name}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path = run_dir / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _smooth(values: tuple[float, ...], weight: float = 0.9) -> list[float]:
    """Bias-corrected exponential moving average."""
    average, total, smoothed = 0.0, 0.0, []
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + 1 - weight
        smoothed.append(average / total)
    return smoothed
