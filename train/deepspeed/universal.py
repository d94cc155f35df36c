"""Convert optimizer state to DeepSpeed's universal checkpoint, to resume on another number of ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from train.deepspeed.background import on_main
from train.deepspeed.engine import OPTIMIZER_DIRECTORY, CheckpointStateError
from train.deepspeed.world import World


@contextmanager
def universal_form(checkpoint: Path, world: World, console: Console) -> Iterator[Path]:
    """Convert on rank 0; yields the directory for `TrainingEngine.load(universal=...)`, which is removed on exit."""
    directory = checkpoint.with_name(f".universal_{checkpoint.name}")
    console.print("converting the optimizer state for another number of ranks", highlight=False)
    try:
        _, failure = on_main(world, lambda: _convert(checkpoint, directory))
        if failure:
            raise CheckpointStateError(f"{checkpoint} could not be converted for {world.size} rank(s): {failure}")
        yield directory
        world.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(directory, ignore_errors=True)


def _convert(checkpoint: Path, directory: Path) -> None:
    """Run DeepSpeed's converter in a subprocess: it forks workers and prints progress."""
    shutil.rmtree(directory, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint / OPTIMIZER_DIRECTORY)]
    command += ["--output_folder", str(directory / OPTIMIZER_DIRECTORY)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the converter ended with {done.returncode}"]
        raise RuntimeError(lines[-1])


def _environment() -> dict[str, str]:
    """Our environment without torchrun's variables: the converter is not a rank."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**ours, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
