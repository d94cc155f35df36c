"""Interrupt data.prepare many times, and see it end as if nothing had happened.

    python tests/data/kill_prepare_at_random.py --interruptions 100

Most interruptions are a SIGKILL to all processes of a run at a random instant, the others a Ctrl-C, or a SIGKILL to one
process. After each one no process may be left and nothing finished may be done again; every run that is done must have
the bytes of an uninterrupted one, whatever number of tasks and workers each of its starts had.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil
from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # a program of the tests, run by its path

from data import prepare  # noqa: E402
from data.pipeline.work_folder import WORK  # noqa: E402

WORDS = tuple("hello you how are doing today fine thanks what nap good yes no why me".split())  # noqa: SIM905
RECIPE = """\
stage: data
run_dir: given by this program
seed: 0
sources: [{{kind: chat_jsonl, path: {folder}/a}}, {{kind: chat_jsonl, path: {folder}/b}}]
split: {{kind: fraction, heldout: 0.2}}
tokenizer: {{kind: train, vocab_size: 305}}
near_duplicates: {{buckets: 3}}
max_bad_fraction: 0.1
row_length: 64
continue_within_seconds: 10
unit_bytes: 10000
pack_tokens: 5000
rows_per_shard: 20
"""
MOMENTS = {"done.json", "environment.json", "recipe.yaml", "run.json", ".lock"}
"""Files that name a moment, or this start of a run."""
PATIENCE_SECONDS = 120.0
STARTS = ((1, 1), (2, 1), (16, 1), (1, 2), (3, 2), (16, 2))
"""Tasks and workers."""


class SurvivalError(AssertionError):
    """A run did not survive an interruption."""


def write_chats(folder: Path, rng: random.Random) -> None:
    """Two sources of five files, with broken lines and repetitions."""
    for name in ("a", "b"):
        (folder / name).mkdir()
        for number in range(5):
            with open(folder / name / f"{number}.jsonl", "w", encoding="utf-8") as file:
                for line in range(120):
                    said = [
                        {"speaker": "Ann" if k % 2 else "Bob", "text": " ".join(rng.choices(WORDS, k=6)), "time": k}
                        for k in range(rng.randint(2, 8))
                    ]
                    record = {"id": f"{number} {line}", "messages": said, "participants": [f"u{rng.randint(0, 400)}"]}
                    text = json.dumps(record)
                    file.write("{broken\n" if rng.random() < 0.01 else f"{text}\n" * (1 + (rng.random() < 0.05)))


class Start:
    """One start of data.prepare, forked from this process: it has imported what is needed. It leads a session."""

    def __init__(self, recipe: Path, run_dir: Path, tasks: int, workers: int) -> None:
        self.log = run_dir.with_name(f"{run_dir.name}.log")
        self._code: int | None = None
        self.process = os.fork()
        if not self.process:
            _prepare(
                [str(recipe), f"run_dir={run_dir}", f"tasks={tasks}", f"executor={{kind: local, workers: {workers}}}"],
                self.log,
            )

    def ended(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        if self._code is None:
            found, status = os.waitpid(self.process, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if found else None
        return self._code

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None where it has not ended in time."""
        until = time.monotonic() + seconds
        while (code := self.ended()) is None and time.monotonic() < until:
            time.sleep(0.002)
        return code

    def others(self) -> list[int]:
        """The processes it has started that are there, its own left out."""
        found = []
        for pid in psutil.pids():
            with suppress(ProcessLookupError, psutil.Error):
                if (
                    pid != self.process
                    and os.getsid(pid) == self.process
                    and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(pid)
        return found


def _prepare(argv: list[str], log: Path) -> NoReturn:
    """The body of a forked process."""
    code = 70
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = prepare.main(argv)
    except KeyboardInterrupt:  # before main has begun
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        os._exit(code)


def outputs(run_dir: Path) -> dict[str, bytes]:
    """The bytes of all files that are results."""
    files = (path for path in run_dir.rglob("*") if path.is_file() and path.name not in MOMENTS)
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def finished_items(run_dir: Path) -> dict[str, int]:
    """The folders of items that are done, and what identifies each."""
    work = run_dir / WORK
    return {str(path.relative_to(work)): path.stat().st_ino for path in work.glob("*/[0-9]*") if path.is_dir()}


def interrupt(start: Start, rng: random.Random) -> str:
    """Stop it in one of the ways: how, and what came of it, are told."""
    way = rng.choices(["kill all", "Ctrl-C", "kill one"], [6, 3, 2])[0]
    victims = start.others()
    if way == "kill one" and victims:
        with suppress(ProcessLookupError):
            os.kill(rng.choice(victims), signal.SIGKILL)
        code = start.wait(PATIENCE_SECONDS)
        if code not in (0, 2):
            raise SurvivalError(f"a process was killed: ended with {code}:\n{start.log.read_text()}")
        if code == 2 and "Traceback" in start.log.read_text():
            raise SurvivalError(f"a process was killed, and the message is none:\n{start.log.read_text()}")
        return way
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(start.process, signal.SIGINT if way == "Ctrl-C" else signal.SIGKILL)
    code = start.wait(PATIENCE_SECONDS)
    expected = (130, 0) if way == "Ctrl-C" else (-signal.SIGKILL, 0)
    if code not in expected:
        raise SurvivalError(f"{way}: ended with {code}, expected {expected[0]}:\n{start.log.read_text()}")
    return way


def check_nothing_left(start: Start) -> None:
    """The processes of a start end with it."""
    until = time.monotonic() + 10
    while left := start.others():
        if time.monotonic() > until:
            raise SurvivalError(f"processes are left: {left}")
        time.sleep(0.01)


def run_to_its_end(
    recipe: Path, run_dir: Path, expected: dict[str, bytes], seconds: float, n_most: int, rng: random.Random
) -> Counter[str]:
    """Start a run again and again until it is done, interrupting it at most `n_most` times."""
    ways: Counter[str] = Counter()
    while not (run_dir / "done.json").exists():
        before = finished_items(run_dir)
        start = Start(recipe, run_dir, *rng.choice(STARTS))
        if ways.total() < n_most and start.wait(rng.uniform(0, seconds)) is None:
            ways[interrupt(start, rng)] += 1
        elif code := start.wait(PATIENCE_SECONDS):
            raise SurvivalError(f"ended with {code}:\n{start.log.read_text()}")
        check_nothing_left(start)
        if not (run_dir / "done.json").exists():
            after = finished_items(run_dir)
            if lost := [name for name, inode in before.items() if after.get(name) != inode]:
                raise SurvivalError(f"lost or done again: {lost}")
    last = Start(recipe, run_dir, 1, 1)  # which cleans up where the run was killed after its end
    if last.wait(PATIENCE_SECONDS) != 0:
        raise SurvivalError(f"a run that is done did not end well:\n{last.log.read_text()}")
    if outputs(run_dir) != expected:
        raise SurvivalError(f"{run_dir}: the outputs are not those of an uninterrupted run")
    shutil.rmtree(run_dir)
    return ways


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interruptions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    console, rng = Console(), random.Random(given.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill_prepare_"))
    write_chats(folder, rng)
    recipe = folder / "data.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    began = time.monotonic()
    reference = Start(recipe, folder / "reference", 1, 1)
    if reference.wait(PATIENCE_SECONDS) != 0:
        console.print(reference.log.read_text(), markup=False)
        return 1
    seconds = time.monotonic() - began
    ways: Counter[str] = Counter()
    n_runs, expected = 0, outputs(folder / "reference")
    try:
        while ways.total() < given.interruptions:
            at_most = min(12, given.interruptions - ways.total())
            ways += run_to_its_end(recipe, folder / f"run_{n_runs}", expected, seconds, at_most, rng)
            n_runs += 1
            told = ", ".join(f"{count} {way}" for way, count in ways.most_common())
            console.print(f"{ways.total()}/{given.interruptions} interruptions: {told}", soft_wrap=True)
    except SurvivalError as error:
        console.print(f"[bold red]wrong[/], see {folder}: ", end="")
        console.print(str(error), markup=False, highlight=False)
        return 1
    shutil.rmtree(folder)
    console.print(
        f"{ways.total()} interruptions, {n_runs} runs with the bytes of an uninterrupted one, "
        f"{time.monotonic() - began:.0f} s",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
