"""What cleaning does to real conversations, and how fast: a row a corpus.

    python tests/data/measure_cleaning.py corpora --examples 20

Each folder holds corpora in folders named after their sources, or is one; chitchat is the package's. Every step reads
all dialogues, whatever the others found; near-duplicates are those that are no exact ones. With --examples it prints so
many replaced values of each kind in their context, and beginnings of what the filters leave out, drawn at random, so
that a person can judge them: the values stand there as they are.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from loguru import logger
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program of the tests, run by its path

from data.clean.language import Languages, other_language  # noqa: E402
from data.clean.near_duplicates import NearDuplicates, compared_text  # noqa: E402
from data.clean.records import content_key  # noqa: E402
from data.clean.repetition import Repetition, repeated  # noqa: E402
from data.clean.scrub import HASHED_ID, PLACEHOLDERS, HashedIds, Scrub, scrub  # noqa: E402
from data.format.dialogue import NARRATOR, Dialogue  # noqa: E402
from data.inspect.terminal_text import visible  # noqa: E402
from data.pipeline.minhash import minhash_stages, near_duplicates  # noqa: E402
from data.pipeline.work_folder import WorkFolder  # noqa: E402
from data.sources.registry import SOURCES  # noqa: E402

SCRUB = Scrub(ids=HashedIds(salt="a salt to measure with"))
REPETITION, LANGUAGES, NEAR = Repetition(), Languages(keep=("en",)), NearDuplicates()
STEPS = ("scrub", "repetition", "language", "near-duplicates")
KINDS = (*PLACEHOLDERS, HASHED_ID)
_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
_CONTEXT = 50  # characters on either side of a value


@dataclass
class Found:
    """What was found in one corpus."""

    n_dialogues: int = 0
    n_characters: int = 0
    replaced: Counter[str] = field(default_factory=Counter)
    n_repetitive: int = 0
    n_other_language: int = 0
    n_duplicates: int = 0
    n_near: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def corpora_in(folders: Sequence[Path]) -> dict[str, dict[str, str]]:
    """The source of each corpus, as a recipe has it."""
    found: dict[str, dict[str, str]] = {"chitchat": {}} if find_spec("chitchat_dataset") else {}
    for folder in folders:
        inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        for path in (folder, *inside):
            if path.name in SOURCES:
                found[path.name] = {"path": str(path)}
    return {kind: {"kind": kind, **keys} for kind, keys in found.items()}


def read(keys: dict[str, str]) -> list[Dialogue]:
    """The good records of a source."""
    source = SOURCES[keys["kind"]].model_validate(keys)
    return [record for record in source.read() if isinstance(record, Dialogue)]


def measure(dialogues: Sequence[Dialogue]) -> Found:
    """All steps, one after the other."""
    found = Found(len(dialogues), sum(len(message.text) for dialogue in dialogues for message in dialogue.messages))

    def scrub_all() -> None:
        for dialogue in dialogues:
            clean, counts = scrub(dialogue, SCRUB)
            found.replaced.update(counts)
            if counts.keys() - {HASHED_ID}:
                pairs = zip(dialogue.messages, clean.messages, strict=True)
                for kind, example in (e for one, other in pairs for e in replaced_values(one.text, other.text)):
                    found.examples[kind].append(f"{dialogue.id}: {example}")

    def repetition_of_all() -> None:
        for dialogue in dialogues:
            written = [message for message in dialogue.messages if message.speaker != NARRATOR]
            if reason := repeated(written, REPETITION):
                found.n_repetitive += 1
                found.examples["repetitive"].append(f"{dialogue.id} ({reason}): {beginning(dialogue)}")

    def language_of_all() -> None:
        for dialogue in dialogues:
            if language := other_language(dialogue.messages, LANGUAGES):
                found.n_other_language += 1
                found.examples["not English"].append(f"{dialogue.id} ({language}): {beginning(dialogue)}")

    def near_duplicates_of_all() -> None:
        found.n_duplicates, found.n_near = duplicates(dialogues)

    steps = (scrub_all, repetition_of_all, language_of_all, near_duplicates_of_all)
    found.seconds = {name: seconds_of(step) for name, step in zip(STEPS, steps, strict=True)}
    return found


def seconds_of(step: Callable[[], None]) -> float:
    """Wall-clock time."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def duplicates(dialogues: Sequence[Dialogue]) -> tuple[int, int]:
    """How many are exact duplicates of an earlier one, and how many others near-duplicates."""
    seen: set[bytes] = set()
    exact = set()
    for number, dialogue in enumerate(dialogues):
        key = content_key(dialogue)
        (exact.add(number) if key in seen else seen.add(key))
    with tempfile.TemporaryDirectory() as folder:
        work = WorkFolder(Path(folder))
        for stage in minhash_stages(work, lambda unit: map(compared_text, dialogues), 1, NEAR, 1):
            for step in stage.pipeline:
                list(step.run(None, 0, 1))
        dropped = np.flatnonzero(near_duplicates(work)).tolist()
    return len(exact), len(set(dropped) - exact)


def replaced_values(text: str, clean: str) -> Iterator[tuple[str, str]]:
    """Kind and context of each value that a placeholder stands for now, found by what stands around it."""
    kind_of = {placeholder: kind for kind, placeholder in PLACEHOLDERS.items()}
    around = _PLACEHOLDER.split(clean)
    matched = re.fullmatch("(.*?)".join(map(re.escape, around)), text, re.DOTALL)
    assert matched, f"what was scrubbed of {text!r} does not fit {clean!r}"
    for number, placeholder in enumerate(_PLACEHOLDER.findall(clean), start=1):
        if matched[number] != placeholder:  # which the text itself had
            before, after = text[: matched.start(number)], text[matched.end(number) :]
            context = f"{before[-_CONTEXT:]}⟦{matched[number]}⟧{after[:_CONTEXT]}"
            yield kind_of[placeholder], visible(context).replace("\n", " ")


def beginning(dialogue: Dialogue) -> str:
    """The first words, of everybody."""
    return visible(" / ".join(message.text for message in dialogue.messages))[:160].replace("\n", " ")


def print_tables(found: dict[str, Found], console: Console) -> None:
    """What was found, and the speeds."""
    heads = ("dialogues", "characters", *KINDS, "exact twice", "near-duplicates", "repetitive", "not English")
    counts, speeds = Table("corpus", *heads), Table("million characters/s", *STEPS)
    for table in (counts, speeds):
        for column in table.columns[1:]:
            column.justify = "right"
    for name, of in found.items():
        figures = [of.n_dialogues, of.n_characters, *(of.replaced[kind] for kind in KINDS)]
        figures += [of.n_duplicates, of.n_near, of.n_repetitive, of.n_other_language]
        counts.add_row(name, *(f"{figure:,}" for figure in figures))
        speeds.add_row(name, *(f"{of.n_characters / of.seconds[step] / 1e6:.2f}" for step in STEPS))
    n_characters = sum(of.n_characters for of in found.values())
    seconds = {step: sum(of.seconds[step] for of in found.values()) for step in STEPS}
    speeds.add_row("all", *(f"{n_characters / seconds[step] / 1e6:.2f}" for step in STEPS), style="bold")
    console.print(counts)
    console.print(speeds)


def print_examples(found: dict[str, Found], n: int, console: Console) -> None:
    """At most `n` of each kind, over all corpora."""
    kinds = list(dict.fromkeys(kind for of in found.values() for kind in of.examples))
    for kind in kinds:
        examples = [f"{name} {example}" for name, of in found.items() for example in of.examples.get(kind, ())]
        shown = random.Random(0).sample(examples, min(n, len(examples)))
        console.print(f"\n[bold]{kind}[/]: {len(shown)} of {len(examples)}")
        for example in sorted(shown):
            console.print(Text(f"  {example}"), soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--examples", type=int, default=0, metavar="N")
    given = parser.parse_args()
    logger.disable("datatrove")
    console, found = Console(width=200), {}
    for kind, keys in corpora_in(given.folders).items():
        console.print(f"reading {kind}", style="dim")
        found[kind] = measure(read(keys))
    print_tables(found, console)
    if given.examples:
        print_examples(found, given.examples, console)


if __name__ == "__main__":
    main()
