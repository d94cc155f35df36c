"""Preparation end to end beside the usual way, on the same machine, text and tokenizer: tokens a second and memory.

    python tests/data/prepare_peer.py chats.jsonl --tokenizer runs/demo/data --workers 2

The usual way: `datasets` reads the JSON lines, a map in processes renders and tokenizes with the exported fast
tokenizer, another map joins the ids and cuts them into rows (documents where a row ends, too), and the rows are saved.
It scans for no bad record, no duplicate and no held-out participant, and keeps neither boundaries nor loss masks.
`eval.speed.repeated_chats` makes chats.jsonl of any size.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RECIPE = """\
stage: data
run_dir: {folder}/ours
seed: 0
sources: [{{kind: chat_jsonl, path: {chats}}}]
split: {{kind: fraction, heldout: 0.001}}
tokenizer: {{kind: file, path: {tokenizer}}}
row_length: {row_length}
continue_within_seconds: 600
executor: {{kind: local, workers: {workers}}}
"""
_SECONDS_BETWEEN_LOOKS = 0.25
_tokenizer: Any = None  # of a process of the usual way


@dataclass(frozen=True)
class Work:
    """What both do."""

    chats: Path
    tokenizer: Path
    row_length: int
    workers: int
    folder: Path


def ours(work: Work) -> list[str]:
    """The command that prepares the chats, with all that data.prepare does."""
    recipe = work.folder / "data.yaml"
    recipe.write_text(
        RECIPE.format(
            folder=work.folder.absolute(),
            chats=work.chats.absolute(),
            tokenizer=work.tokenizer.absolute(),
            row_length=work.row_length,
            workers=work.workers,
        )
    )
    return [sys.executable, "-m", "data.prepare", str(recipe)]


def usual(work: Work) -> list[str]:
    """The command that does it the usual way: this file again."""
    from data.format.tokenizer import DialogueTokenizer
    from serving_export.export.tokenizer_json import tokenizer_json

    tokenizer = work.folder / "tokenizer.json"
    tokenizer.write_text(tokenizer_json(DialogueTokenizer.load(work.tokenizer)), encoding="utf-8")
    names = ("chats", "row_length", "workers", "folder")
    given = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(work, name)))]
    return [sys.executable, __file__, "--usual", "--tokenizer", str(tokenizer), *given]


def do_usual(work: Work) -> None:
    """Read, render, tokenize, join, cut and save with `datasets`; the cache is its own."""
    import datasets

    rows = datasets.load_dataset(
        "json", data_files=str(work.chats), split="train", cache_dir=str(work.folder / "datasets_cache")
    )
    rows = rows.map(
        tokenized,
        batched=True,
        num_proc=work.workers,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer_json": str(work.tokenizer)},
    )
    rows = rows.map(grouped, batched=True, num_proc=work.workers, fn_kwargs={"row_length": work.row_length})
    rows.save_to_disk(str(work.folder / "usual"))
    print(sum(len(row) for row in rows.with_format("arrow").iter(4096)) * work.row_length)


def tokenized(batch: dict[str, list[Any]], tokenizer_json: str) -> dict[str, list[list[int]]]:
    """A map function: dialogues rendered, and the ids of each."""
    global _tokenizer
    if _tokenizer is None:
        from transformers import PreTrainedTokenizerFast

        _tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_json)
    texts = [
        "<bos>" + "".join(f"<|message|>{message['speaker']}: {message['text']}<|end|>" for message in messages)
        for messages in batch["messages"]
    ]
    ids: list[list[int]] = _tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return {"input_ids": ids}


def grouped(batch: dict[str, list[list[int]]], row_length: int) -> dict[str, list[list[int]]]:
    """A map function: all ids joined and cut into rows; what is left over is dropped (transformers' run_clm)."""
    joined = list(chain.from_iterable(batch["input_ids"]))
    total = len(joined) // row_length * row_length
    return {"input_ids": [joined[first : first + row_length] for first in range(0, total, row_length)]}


def timed(name: str, command: list[str], folder: Path) -> tuple[float, int]:
    """Wall seconds of a command, its start included, and the most bytes of memory that it and its processes had at once
    (proportional set size: the pages of mapped files count too). What it prints goes to a file."""
    log = folder / f"{name}.log"
    peak_bytes = 0
    began = time.monotonic()
    with open(log, "wb") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        running = psutil.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        while running.poll() is None:
            peak_bytes = max(peak_bytes, memory_of(running))
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    if running.returncode:
        raise RuntimeError(f"{name} ended with {running.returncode}:\n{log.read_text()[-3000:]}")
    return time.monotonic() - began, peak_bytes


def memory_of(process: psutil.Process) -> int:
    """Bytes of a process and all its descendants."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_full_info().pss
    return total


def compare(work: Work, repeats: int, console: Console) -> None:
    """Both by turns, `repeats` times; the fastest of each counts."""
    from data.pipeline.merge import read_manifest_of

    seconds: dict[str, list[float]] = {"ours": [], "usual": []}
    peak_bytes = dict.fromkeys(seconds, 0)
    commands = {"ours": ours(work), "usual": usual(work)}
    n_tokens = {}
    for _ in range(repeats):
        for name, command in commands.items():
            for left in (name, "datasets_cache"):
                shutil.rmtree(work.folder / left, ignore_errors=True)
            taken, used = timed(name, command, work.folder)
            seconds[name].append(taken)
            peak_bytes[name] = max(peak_bytes[name], used)
    manifest = read_manifest_of(work.folder / "ours")
    n_tokens["ours"] = sum(manifest[side]["n_tokens"] for side in ("train", "heldout"))
    n_tokens["usual"] = int((work.folder / "usual.log").read_text().split()[-1])
    table = Table("", "tokens", "seconds", "tokens/s", "peak MiB")
    for column in table.columns[1:]:
        column.justify = "right"
    rates = {name: n_tokens[name] / min(taken) for name, taken in seconds.items()}
    for name, all_seconds in seconds.items():
        every = ", ".join(f"{second:.1f}" for second in all_seconds)
        row = (f"{n_tokens[name]:,}", every, f"{rates[name]:,.0f}", f"{peak_bytes[name] / 2**20:,.0f}")
        table.add_row(name, *row)
    console.print(table)
    console.print(f"ours / usual: {rates['ours'] / rates['usual']:.2f}", highlight=False)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chats", type=Path, nargs="?")
    parser.add_argument("--chats", type=Path, dest="named_chats", help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a run_dir of data.prepare")
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for what both write; left out, a temporary one")
    parser.add_argument("--usual", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    chats = given.chats or given.named_chats
    if chats is None or not chats.is_file():
        parser.error(f"chats {chats}: no such file; make one with: python -m eval.speed.repeated_chats")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="prepare_peer_"))
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(chats, given.tokenizer, given.row_length, given.workers, folder)
    if given.usual:
        do_usual(work)
        return 0
    compare(work, given.repeats, Console())
    if not given.folder:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
