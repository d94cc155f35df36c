"""Kill a training run many times, and see it end as if nothing had happened.

    python tests/train/kill_at_random.py --kills 200

Every kill is a SIGKILL at a random instant of start-up, training, saving or finishing. After each one no checkpoint may
be damaged and no leftover may pile up; every run that is done must have the bits and metrics of an uninterrupted one.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # a program of the tests, run by its path

from recipes.run_directory import read_done  # noqa: E402
from train.checkpoint.checkpoint import damage  # noqa: E402
from train.metrics import METRICS, read_metrics  # noqa: E402

RECIPE = """\
stage: pretrain
run_dir: given by this program
data: {kind: synthetic, row_length: 64, median_document_length: 16, n_rows: 512}
seed: 1
model: {vocab_size: 320, d_model: 32, n_layers: 3, n_heads: 2, d_head: 16, d_ff: 48, layers: SSG, window: 8,
  kv_sharing: {kind: none}, max_length: 64}
threads: 1
loop: {max_steps: 24, rows_per_step: 4, rows_per_micro_batch: 2, evaluate_every: 4, save_every: 2, keep: 2,
  skip_spikes: {sigma: 0.5, window: 6}, keep_best: {figure: heldout_loss, better: lower}}
optimizer: {kind: adamw, lr: 3e-3}
schedule: {kind: wsd, warmup_steps: 2}
engine: {precision: float32, zero_stage: 1}
evaluation_rows: 8
ngram_baselines: false
wandb: {mode: disabled}
"""
KEEP = 2
KILLS_A_RUN = 12
"""Then a run is let go to its end and another one begun, so that kills around a run's end come up often enough."""
PATIENCE_SECONDS = 180
POLL_SECONDS = 0.001
AIMS = {"start-up": 2, "training": 2, "saving": 3, "completing": 3, "finishing": 1}
"""What a kill waits for, and how often; where it falls is told from the files afterwards."""
CLOCKS = {"tokens_per_second", "mfu", "memory_gib", "seconds_to_first_step", "save_seconds"}


class SurvivalError(AssertionError):
    """A run did not survive a kill."""


class Processes:
    """The ranks of one start of a run, forked from this process: it has imported what they need, so that takes no time.

    A start replaces its predecessor's logs.
    """

    def __init__(self, recipe: Path, run_dir: Path, ranks: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self._logs = [run_dir.with_name(f"{run_dir.name}_rank_{rank}.log") for rank in range(ranks)]
        self._running: list[int] = []
        for rank, log in enumerate(self._logs):
            process = os.fork()
            if not process:
                places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), **address}
                _train(recipe, run_dir, log, places if ranks > 1 else {})
            self._running.append(process)

    def log(self) -> str:
        """What rank 0 has said."""
        return self._logs[0].read_text() if self._logs[0].exists() else ""

    def has_begun(self) -> bool:
        """Whether a step has been taken."""
        return "first step" in self.log()

    def running(self) -> bool:
        """False once all have ended well. Raises SurvivalError when one has not."""
        for process in list(self._running):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                self._running.remove(process)
                if code := os.waitstatus_to_exitcode(status):
                    self.kill()
                    raise SurvivalError(
                        f"a rank ended with {code}:\n" + "\n".join(log.read_text() for log in self._logs)
                    )
        return bool(self._running)

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self._running:
            os.kill(process, signal.SIGKILL)
        for process in self._running:
            os.waitpid(process, 0)
        self._running = []


def _train(recipe: Path, run_dir: Path, log: Path, places: dict[str, str]) -> NoReturn:
    """The body of a forked rank."""
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(places)
        sys.argv = ["train.pretrain", str(recipe), f"run_dir={run_dir}"]
        from train import pretrain

        code = pretrain.main()
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        os._exit(code)


class Directory:
    """A run directory as its processes left it."""

    def __init__(self, path: Path):
        self.path, self.checkpoints = path, path / "checkpoints"

    def steps(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step_*"))

    def hidden(self) -> set[tuple[str, int]]:
        """Checkpoints being written or removed, by name and inode."""
        found = set()
        for path in self.checkpoints.glob(".*_step_*"):
            with suppress(FileNotFoundError):  # renamed meanwhile
                found.add((path.name, path.stat().st_ino))
        return found

    def is_written(self, name: str) -> bool:
        """Whether all ranks have written their share of a checkpoint under its hidden name."""
        return (self.checkpoints / name / ".state.json.partial").exists() or (
            self.checkpoints / name / "state.json"
        ).exists()

    def phase(self, begun: bool, leftovers: set[tuple[str, int]]) -> str:
        """Where a start that found `leftovers` was killed. completing: a save becomes visible, an older one goes."""
        for name, _ in self.hidden() - leftovers:
            return "completing" if name.startswith(".removing") or self.is_written(name) else "saving"
        if any((self.path / name).exists() for name in (".model.writing", "model")):
            return "finishing"
        latest = self.checkpoints / "latest"
        if begun and self.steps() and not (latest.exists() and latest.read_text().strip() == self.steps()[-1].name):
            return "completing"
        return "training" if begun else "start-up"

    def size(self) -> tuple[int, int]:
        """Entries of checkpoints/, and bytes in them."""
        sizes = [path.stat().st_size for path in self.checkpoints.rglob("*") if path.is_file()]
        return len(list(self.checkpoints.iterdir())) if self.checkpoints.exists() else 0, sum(sizes)


@dataclass
class Reference:
    """An uninterrupted run, and how long its parts took."""

    directory: Directory
    startup_seconds: float
    training_seconds: float

    def check_killed(self, ours: Directory, newest_before: str) -> None:
        """A killed run: every checkpoint is sound, none has been lost, and there is no more on the disk than needed."""
        for path in ours.steps():
            if problem := damage(path):
                raise SurvivalError(f"{path}: {problem}")
        newest = ours.steps()[-1].name if ours.steps() else ""
        if newest < newest_before:
            raise SurvivalError(f"{ours.path}: the newest checkpoint was {newest_before}, now it is {newest or 'none'}")
        n_entries, n_bytes = ours.size()
        # at the most: `keep`, the one before the decay and a new one, `latest` and its successor
        _, of_kept = self.directory.size()
        n_kept = len(self.directory.steps())
        if n_entries > KEEP + 4 or n_bytes > of_kept / n_kept * (KEEP + 2) + 4096:
            raise SurvivalError(
                f"{ours.checkpoints}: {n_entries} entries, {n_bytes} bytes; {of_kept} in an uninterrupted run"
            )
        names, usual = ({path.name for path in run.path.glob("*")} for run in (ours, self.directory))
        if len(names - usual) > 2:  # a file and a model being replaced
            raise SurvivalError(f"{ours.path}: leftovers {sorted(names - usual)}")

    def check_done(self, ours: Directory) -> None:
        """A run that is done: the same weights, bit for bit, the same metrics, and the same files."""
        found, expected = (load_file(run.path / "model" / "model.safetensors") for run in (ours, self.directory))
        if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name]) for name in expected):
            raise SurvivalError(f"{ours.path}: the weights are not those of an uninterrupted run")
        if _figures(ours) != _figures(self.directory):
            raise SurvivalError(f"{ours.path}: the metrics are not those of an uninterrupted run")
        if (ours.checkpoints / "latest").read_text() != (self.directory.checkpoints / "latest").read_text():
            raise SurvivalError(f"{ours.checkpoints / 'latest'} does not name the newest checkpoint")
        for part in (lambda run: run.path, lambda run: run.checkpoints):
            names, expected_names = ({path.name for path in part(run).iterdir()} for run in (ours, self.directory))
            if names != expected_names:
                raise SurvivalError(
                    f"{part(ours)} holds {sorted(names)}, after an uninterrupted run {sorted(expected_names)}"
                )


def _figures(run: Directory) -> list[dict[str, float]]:
    lines = read_metrics(run.path / METRICS)
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


@dataclass
class Tally:
    """What has been done."""

    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    runs: int = 0
    skipped_steps: int = 0
    """Of each run: loop.skip_spikes judges by what it has to remember."""


def uninterrupted(recipe: Path, path: Path, ranks: int) -> Reference:
    """Train without a kill."""
    began = time.monotonic()
    processes, first = Processes(recipe, path, ranks), None
    while processes.running():
        if first is None and processes.has_begun():
            first = time.monotonic()
        time.sleep(POLL_SECONDS)
    assert first is not None
    return Reference(Directory(path), first - began, time.monotonic() - first)


def kill_once(processes: Processes, ours: Directory, reference: Reference, rng: random.Random) -> bool:
    """Kill at a random instant; False when the run was done before."""
    (aim,) = rng.choices(list(AIMS), list(AIMS.values()))
    left = {
        "start-up": rng.uniform(0, reference.startup_seconds),
        "training": rng.uniform(0, reference.training_seconds),
        "saving": rng.uniform(0, 0.03),
        "completing": rng.uniform(0, 0.015),
        "finishing": rng.uniform(0, 0.3),
    }[aim]
    saves_to_see, seen = rng.randint(1, 4), ours.hidden()
    reached, gives_up = None, time.monotonic() + PATIENCE_SECONDS
    while processes.running():
        now = time.monotonic()
        if now > gives_up:
            processes.kill()
            raise SurvivalError(f"nothing has happened for {PATIENCE_SECONDS} s:\n{processes.log()}")
        if reached is None:
            new = {entry for entry in ours.hidden() - seen if aim == "saving" or ours.is_written(entry[0])}
            seen |= new
            saves_to_see -= any(name.startswith(".writing") for name, _ in new)
            is_there = {
                "start-up": True,
                "training": processes.has_begun(),
                "saving": saves_to_see == 0,
                "completing": saves_to_see == 0,
                "finishing": (ours.path / ".model.writing").exists() or (ours.path / "model").exists(),
            }[aim]
            reached = now if is_there else None
        if reached is not None and now >= reached + left:
            processes.kill()
            return True
        time.sleep(POLL_SECONDS)
    return False


def run_to_its_end(
    recipe: Path, path: Path, ranks: int, kills: int, reference: Reference, rng: random.Random, tally: Tally
) -> int:
    """Start a run again and again until it is done, killing it at most `kills` times; how many times it was."""
    ours, done = Directory(path), 0
    while True:
        newest = ours.steps()[-1].name if ours.steps() else ""
        leftovers = ours.hidden()
        processes = Processes(recipe, path, ranks)
        tally.starts += 1
        if done < kills and kill_once(processes, ours, reference, rng):
            done += 1
            tally.kills[ours.phase(processes.has_begun(), leftovers)] += 1
            reference.check_killed(ours, newest)
            continue
        while processes.running():
            time.sleep(POLL_SECONDS)
        reference.check_done(ours)
        tally.runs += 1
        shutil.rmtree(path)
        return done


def preload() -> None:
    """Import what a run imports."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    import deepspeed  # noqa: F401
    from matplotlib import pyplot as plt  # noqa: F401

    from train import pretrain  # noqa: F401


def kill_many(recipe: Path, folder: Path, kills: int, ranks: int, seed: int, console: Console) -> Tally:
    """Kill runs of a recipe `kills` times. Raises SurvivalError at the first thing that is."""
    rng, tally = random.Random(seed), Tally()
    reference = uninterrupted(recipe, folder / "uninterrupted", ranks)
    done = read_done(reference.directory.path)
    assert done is not None
    tally.skipped_steps = done["figures"]["skipped_steps"]
    columns = (TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[where]}"))
    # no thread that refreshes it: this process forks
    progress = Progress(
        *columns, TimeElapsedColumn(), console=console, auto_refresh=False, redirect_stdout=False,
        redirect_stderr=False, disable=not console.is_terminal,
    )  # fmt: skip
    with progress:
        task = progress.add_task("kills", total=kills, where="")
        while (so_far := tally.kills.total()) < kills:
            run_to_its_end(
                recipe, folder / f"run_{tally.runs}", ranks, min(KILLS_A_RUN, kills - so_far), reference, rng, tally
            )
            progress.update(task, completed=tally.kills.total(), where=describe(tally), refresh=True)
            if not console.is_terminal:
                console.print(f"{tally.kills.total()}/{kills} kills: {describe(tally)}", soft_wrap=True)
    return tally


def describe(tally: Tally) -> str:
    """Where the kills fell."""
    return ", ".join(f"{n} in {phase}" for phase, n in sorted(tally.kills.items(), key=lambda item: -item[1]))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--recipe", type=Path, help=f"of a pre-training run with loop.keep={KEEP}; left out, a tiny one"
    )
    given = parser.parse_args()
    console, began = Console(), time.monotonic()
    preload()
    folder = Path(tempfile.mkdtemp(prefix="kill_at_random_"))
    recipe = given.recipe or folder / "pretrain.yaml"
    if not given.recipe:
        recipe.write_text(RECIPE)
    try:
        tally = kill_many(recipe.absolute(), folder, given.kills, given.ranks, given.seed, console)
    except SurvivalError as error:
        console.print(f"[bold red]wrong[/], see {folder}: ", end="")
        console.print(str(error), markup=False, highlight=False)
        return 1
    shutil.rmtree(folder)
    console.print(
        f"{tally.kills.total()} kills ({describe(tally)}), {tally.starts} starts, {tally.runs} runs with the bits of "
        f"an uninterrupted one, {tally.skipped_steps} steps skipped in each, {time.monotonic() - began:.0f} s",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
