"""Prepare training data: dialogue logs to a tokenizer, packed token shards and a manifest.

python -m data.prepare recipes/demo/data.yaml
"""

import hashlib
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from rich.console import Console

from data.atomic_file import atomic_file, write_json
from data.clean import CleanError, Filters, Ledger, check_bad_fraction, passing, without_bad, without_duplicates
from data.dialogue import Dialogue, message_body, speaker_prefix, to_json
from data.packing import EncodedCorpus, best_fit
from data.prepare_report import key_figure, print_report
from data.shards import MANIFEST_FILE, PackedDataset, ShardError, packed_rows, write_shards
from data.sources.registry import AnySource, named_sources
from data.sources.source import LeftOut, Rejected, SourceError
from data.split import SplitError, SplitRule, split
from data.stable_hash import stable_hash
from data.steps import StepProgress, Steps
from data.tokenise import TokeniseError, TokeniseSettings, tokenise
from data.tokenizer import MODEL_FILE, DialogueTokenizer, TokenizerError, train_tokenizer
from recipes.loader import Section, parse_command_line, print_recipe
from recipes.run_directory import RunDirectoryError, RunState, finish_run, prepare_run_directory, read_done

FORMAT = "dramatis-data-1"
QUARANTINE_FILE = "quarantine.jsonl"
USER_ERRORS = (
    SourceError,
    CleanError,
    SplitError,
    TokenizerError,
    TokeniseError,
    ShardError,
    RunDirectoryError,
    OSError,
)


class TrainedTokenizer(Section):
    """Train a SentencePiece BPE on the training side."""

    kind: Literal["train"]
    vocab_size: int = Field(gt=261)
    # Characters of dialogues, chosen by a hash, that it learns from.
    sample_characters: int = Field(default=10_000_000, gt=0)
    # Share of the characters that get a piece of their own; the rest are written in bytes.
    character_coverage: float = Field(default=0.9995, gt=0, le=1)


class TokenizerFile(Section):
    """Use a tokenizer that an earlier data.prepare made."""

    kind: Literal["file"]
    path: str


class DataRecipe(Section):
    """A recipe of data.prepare."""

    stage: Literal["data"]
    run_dir: str
    seed: int
    sources: tuple[AnySource, ...] = Field(min_length=1)
    split: SplitRule
    tokenizer: Annotated[TrainedTokenizer | TokenizerFile, Field(discriminator="kind")]
    row_length: int = Field(ge=16)
    filters: Filters = Filters()
    # A partner who has not written after this time is gone (the engagement label 0); null: any later message counts.
    continue_within_seconds: float | None = Field(gt=0)
    # More quarantined records than this, of any one source, is an error.
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    workers: int = Field(default=1, ge=1)
    rows_per_shard: int = Field(default=65_536, ge=1)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run made, for the manifest and the report."""

    ledgers: dict[str, Ledger]
    tokenizer: DialogueTokenizer
    splits: dict[str, dict[str, Any]]


def prepare(recipe: DataRecipe, steps: Steps) -> Prepared:
    """Write everything of the recipe under its run_dir but done.json; a killed run is repeated, not continued."""
    run_dir = Path(recipe.run_dir)
    (run_dir / MANIFEST_FILE).unlink(missing_ok=True)
    sides, ledgers = select_dialogues(recipe, run_dir / QUARANTINE_FILE, steps)
    tokenizer = _tokenizer(recipe, sides["train"], steps)
    with atomic_file(run_dir / MODEL_FILE) as file:
        file.write(tokenizer.model_bytes)
    splits = {}
    for name, dialogues in sides.items():
        (run_dir / "dialogues").mkdir(exist_ok=True)
        with atomic_file(run_dir / "dialogues" / f"{name}.jsonl", "w") as file:
            file.writelines(to_json(dialogue) + "\n" for dialogue in dialogues)
        splits[name] = _write_side(recipe, run_dir / name, name, dialogues, tokenizer, steps)
    fingerprints = [splits[name]["fingerprint"] for name in ("train", "heldout")]
    manifest = {
        "format": FORMAT,
        "fingerprint": hashlib.sha256("\n".join([FORMAT, *fingerprints]).encode()).hexdigest(),
        "tokenizer_sha256": _sha256(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "row_length": recipe.row_length,
        "records": Ledger.total(ledgers.values()).to_dict(),
        "sources": {name: ledger.to_dict() for name, ledger in ledgers.items()},
        **splits,
    }
    write_json(run_dir / MANIFEST_FILE, manifest)
    return Prepared(ledgers, tokenizer, splits)


def select_dialogues(
    recipe: DataRecipe, quarantine: Path, steps: Steps
) -> tuple[dict[str, list[Dialogue]], dict[str, Ledger]]:
    """Read, split, filter and deduplicate: the two sides, and where the records of each source went.

    The split comes first, so that nobody trains who takes part in a held-out session, be it one that the filters drop.
    A training dialogue that repeats a held-out one is dropped, not the other.
    """
    ledgers = {name: Ledger() for name in named_sources(recipe.sources)}
    dialogues = _read(recipe, ledgers, quarantine, steps)
    sides = split(dialogues, recipe.split, recipe.seed)
    for reason, dropped in sides.dropped.items():
        for dialogue in dropped:
            ledgers[dialogue.source].filter(reason)
    seen: set[bytes] = set()
    heldout = list(_kept(sides.heldout, recipe.filters, seen, ledgers))
    train = list(_kept(sides.train, recipe.filters, seen, ledgers))
    if not (train and heldout):
        side = "training" if not train else "held-out"
        total = Ledger.total(ledgers.values())
        raise CleanError(
            f"no {side} dialogue is left of {total.read:,} records ({_reasons(total)}); check sources and filters"
        )
    for ledger in ledgers.values():
        ledger.balance()
    return {"train": train, "heldout": heldout}, ledgers


def _read(recipe: DataRecipe, ledgers: dict[str, Ledger], quarantine: Path, steps: Steps) -> list[Dialogue]:
    """The dialogues of all sources, one source after the other. Of several, their names make the ids distinct."""
    dialogues: list[Dialogue] = []
    with atomic_file(quarantine, "w") as file:
        for name, source in named_sources(recipe.sources).items():
            advance = steps.begin(f"reading {name}", "records")
            prefix = f"{name}/" if len(ledgers) > 1 else ""
            for dialogue in without_bad(_counted(source.read(), advance), ledgers[name], name, file):
                dialogues.append(replace(dialogue, id=prefix + dialogue.id, source=name))
    kept_quarantine = quarantine.parent.with_name(f"{quarantine.parent.name}.{QUARANTINE_FILE}")
    check_bad_fraction(ledgers, recipe.max_bad_fraction, quarantine, kept_quarantine)
    return dialogues


def _kept(
    dialogues: Iterable[Dialogue], filters: Filters, seen: set[bytes], ledgers: Mapping[str, Ledger]
) -> Iterator[Dialogue]:
    for name, group in groupby(dialogues, key=_source_of):
        for dialogue in without_duplicates(passing(group, filters, ledgers[name]), seen, ledgers[name]):
            ledgers[name].kept += 1
            yield dialogue


def _source_of(dialogue: Dialogue) -> str:
    return dialogue.source


def _counted(
    records: Iterator[Dialogue | LeftOut | Rejected], advance: StepProgress
) -> Iterator[Dialogue | LeftOut | Rejected]:
    for record in records:
        advance(1)
        yield record


def _reasons(ledger: Ledger) -> str:
    reasons = {"quarantined": ledger.quarantined, **ledger.filtered, "duplicates": ledger.duplicates}
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count) or "the sources are empty"


def _tokenizer(recipe: DataRecipe, dialogues: Sequence[Dialogue], steps: Steps) -> DialogueTokenizer:
    settings = recipe.tokenizer
    if isinstance(settings, TokenizerFile):
        return DialogueTokenizer.load(settings.path)
    steps.begin("training the tokenizer")
    shuffled = sorted(dialogues, key=lambda dialogue: (stable_hash(recipe.seed, "tokenizer", dialogue.id), dialogue.id))
    texts = (text for d in shuffled for m in d.messages for text in (speaker_prefix(m.speaker), message_body(m.text)))
    return train_tokenizer(
        texts,
        None,
        settings.vocab_size,
        sample_characters=settings.sample_characters,
        character_coverage=settings.character_coverage,
    )


def _write_side(
    recipe: DataRecipe,
    directory: Path,
    name: str,
    dialogues: Sequence[Dialogue],
    tokenizer: DialogueTokenizer,
    steps: Steps,
) -> dict[str, Any]:
    """Tokenise, pack and write one side; its figures, as they stand in the manifest."""
    settings = TokeniseSettings(recipe.row_length, recipe.continue_within_seconds)
    advance = steps.begin(f"tokenising {name}", "dialogues", len(dialogues))
    groups = {source: list(group) for source, group in groupby(dialogues, key=_source_of)}
    parts = tokenise(groups, tokenizer, settings, recipe.workers, advance)
    corpus = EncodedCorpus.join(list(parts.values()))
    rows = best_fit(corpus.lengths, recipe.row_length)
    advance = steps.begin(f"writing {name}", "rows", len(rows))
    statistics = _statistics(dialogues, corpus, len(rows) * recipe.row_length)
    statistics["sources"] = {
        source: {"n_dialogues": len(groups[source]), "n_tokens": len(part.tokens)} for source, part in parts.items()
    }
    manifest = write_shards(
        directory,
        _counted_rows(packed_rows(corpus, rows, recipe.row_length), advance),
        row_length=recipe.row_length,
        vocab_size=tokenizer.vocab_size,
        rows_per_shard=recipe.rows_per_shard,
        tokenizer_sha256=_sha256(tokenizer),
        statistics=statistics,
    )
    figures = {key: manifest[key] for key in ("fingerprint", "n_rows", "n_tokens")}
    assert manifest["n_tokens"] == len(corpus.tokens), "packing lost tokens"
    return {**figures, **statistics}


def _counted_rows(rows: Iterator[Any], advance: StepProgress) -> Iterator[Any]:
    for row in rows:
        advance(1)
        yield row


def _statistics(dialogues: Sequence[Dialogue], corpus: EncodedCorpus, n_positions: int) -> dict[str, Any]:
    n_characters = sum(len(message.text) for dialogue in dialogues for message in dialogue.messages)
    labels = np.bincount(corpus.label[corpus.label >= 0], minlength=2)
    n_tokens = len(corpus.tokens)
    return {
        "n_dialogues": len(dialogues),
        "n_messages": sum(len(dialogue.messages) for dialogue in dialogues),
        "n_characters": n_characters,
        "n_documents": len(corpus.lengths),
        "n_answer_tokens": int(corpus.trained.sum()),
        "n_partner_leaves": int(labels[0]),
        "n_partner_continues": int(labels[1]),
        "density": round(n_tokens / n_positions, 4) if n_positions else 0.0,
        "characters_per_token": round(n_characters / n_tokens, 3) if n_tokens else 0.0,
    }


def _sha256(tokenizer: DialogueTokenizer) -> str:
    return hashlib.sha256(tokenizer.model_bytes).hexdigest()


def _inputs(recipe: DataRecipe) -> dict[str, Path]:
    sources = named_sources(recipe.sources).items()
    inputs = {f"source {name}: {path}": path for name, source in sources for path in source.inputs()}
    if isinstance(recipe.tokenizer, TokenizerFile):
        path = Path(recipe.tokenizer.path)
        inputs["tokenizer"] = path / MODEL_FILE if path.is_dir() else path
    return inputs


def _dry_run(recipe: DataRecipe, console: Console) -> None:
    print_recipe(recipe, console)
    for name, source in named_sources(recipe.sources).items():
        files = source.files()
        good = left_out = bad = messages = 0
        for record in source.read():
            if isinstance(record, Dialogue):
                good, messages = good + 1, messages + len(record.messages)
            elif isinstance(record, LeftOut):
                left_out += 1
            else:
                bad += 1
        console.print(
            f"{name}: {good + left_out + bad:,} records in {len(files)} file(s): {good:,} dialogues, "
            f"{messages:,} messages, {left_out:,} left out, {bad:,} bad"
        )
    console.print("dry run: nothing was written")


def _is_whole(run_dir: Path) -> bool:
    """Whether the outputs of a finished run are still as they were written."""
    try:
        for side in ("train", "heldout"):
            PackedDataset(run_dir / side)
        DialogueTokenizer.load(run_dir)
    except (ShardError, TokenizerError):
        return False
    return all((run_dir / "dialogues" / f"{side}.jsonl").is_file() for side in ("train", "heldout"))


def _remove_outputs(run_dir: Path) -> None:
    for name in ("train", "heldout", "dialogues"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in ("recipe.yaml", "run.json", MANIFEST_FILE, MODEL_FILE, QUARANTINE_FILE):
        (run_dir / name).unlink(missing_ok=True)


def run(recipe: DataRecipe, console: Console) -> None:
    """Prepare the data of a recipe, unless that is done already."""
    run_dir = Path(recipe.run_dir)
    inputs = _inputs(recipe)
    with prepare_run_directory(run_dir, recipe, inputs) as state:
        done = read_done(run_dir) if state is RunState.FINISHED else None
        if done and _is_whole(run_dir):
            console.print(f"{run_dir}: already prepared ({done['key_figure']})", highlight=False)
            return
        if done:
            console.print(f"{run_dir}: its data is damaged; preparing it again", style="yellow", highlight=False)
            (run_dir / "done.json").unlink()
        began = time.monotonic()
        try:
            with Steps(console) as steps:
                prepared = prepare(recipe, steps)
        except USER_ERRORS:
            _remove_outputs(run_dir)  # so that a corrected recipe can use the directory
            raise
        seconds = time.monotonic() - began
        figure = key_figure(prepared.splits)
        finish_run(run_dir, recipe, inputs, figure, seconds, {"fingerprint": prepared.splits["train"]["fingerprint"]})
    print_report(run_dir, prepared.ledgers, prepared.tokenizer.vocab_size, prepared.splits, seconds, console)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; the exit code is 0, 2 for a user error, 130 for Ctrl-C."""
    command = parse_command_line(DataRecipe, argv, __doc__)
    errors = Console(stderr=True)
    try:
        if command.dry_run:
            _dry_run(command.recipe, Console())
        else:
            run(command.recipe, Console())
    except KeyboardInterrupt:
        errors.print("interrupted; run the same command again", style="yellow")
        return 130
    except USER_ERRORS as error:
        errors.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
