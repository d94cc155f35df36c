"""The final report of data.prepare, and its key figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from data.clean.ledger import Ledger
from data.sources.folder_files import describe_unread
from data.sources.source import DialogueSource

Figures = Mapping[str, Mapping[str, Any]]


def key_figure(splits: Figures) -> str:
    """The key figure, such as "1.9M tokens, density 99.2%"; repeated context is not counted."""
    train = splits["train"]
    return f"{short_number(train['n_tokens'] - train['n_repeated_tokens'])} tokens, density {train['density']:.1%}"


def short_number(n: int) -> str:
    """1_930_000 -> "1.9M"."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.1f}{letter}"
    return str(n)


def print_report(run_dir: Path, manifest: Mapping[str, Any], seconds: float, console: Console) -> None:
    """Print the outcomes of all records, and the contents of each side, from the run's manifest."""
    ledgers = {name: Ledger.from_dict(counts) for name, counts in manifest["sources"].items()}
    sides = {side: manifest[side] for side in ("train", "heldout")}
    ledger = Ledger.total(ledgers.values())
    ledger.balance()
    if len(ledgers) > 1:
        console.print(_source_table(ledgers, sides))
    console.print(record_table(ledger))
    if ledger.blank_messages:
        console.print(f"{ledger.blank_messages:,} blank messages were removed from dialogues", soft_wrap=True)
    if ledger.scrubbed:
        console.print(f"scrubbed: {ledger.scrubbed_text}", highlight=False, soft_wrap=True)
    if ledger.untrained_replies:
        console.print(f"{ledger.untrained_replies:,} replies are excluded from SFT by their records", soft_wrap=True)
    if n_openings := sum(side["n_openings_not_repeated"] for side in sides.values()):
        console.print(
            f"{n_openings:,} dialogues are split and begin with a narrator's opening longer than half a row: their "
            "later documents do not repeat it; raise row_length, or shorten it",
            style="yellow", soft_wrap=True,
        )  # fmt: skip
    for name, count in ledger.of_characters.items():
        console.print(f"{name}: a character, in {count:,} dialogues; not linking", highlight=False, soft_wrap=True)
    console.print(side_table(sides))
    for warning in manifest["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{run_dir}: {key_figure(sides)}, {manifest['vocab_size']:,} pieces, training fingerprint "
        f"{sides['train']['fingerprint'][:12]}, {seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def print_unread(sources: Mapping[str, DialogueSource], console: Console) -> None:
    """Print the number and the first names of the files in each folder that no source reads."""
    unread: dict[str, list[str]] = {}
    for source in sources.values():
        if location := getattr(source, "path", None):
            names = source.unread()
            unread[location] = [name for name in unread.get(location, names) if name in names]
    for location, names in unread.items():
        print_unread_of(location, names, console)


def print_unread_of(location: str, names: Sequence[str], console: Console) -> None:
    """Print the number and the first of `names`, the files of a folder that are not read, if there are any."""
    if names:
        text = f"{location}: {describe_unread(names)}"
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def record_table(ledger: Ledger) -> Table:
    """Counts of records by outcome."""
    table = Table("records", "count")
    table.columns[1].justify = "right"
    table.add_row("read", f"{ledger.read:,}", end_section=True)
    table.add_row("quarantined (quarantine.jsonl)", f"{ledger.quarantined:,}")
    for reason, count in sorted(ledger.filtered.items()):
        table.add_row(f"left out: {reason}", f"{count:,}")
    table.add_row("exact duplicates", f"{ledger.duplicates:,}", end_section=not ledger.near_duplicates)
    if ledger.near_duplicates:
        table.add_row("near-duplicates", f"{ledger.near_duplicates:,}", end_section=True)
    table.add_row("kept", f"{ledger.kept:,}", style="bold")
    return table


def _source_table(ledgers: Mapping[str, Ledger], splits: Figures) -> Table:
    """One row per source: read = quarantined + left out + duplicates + kept, and its contents in each side."""
    heads = ("source", "read", "bad", "left out", "twice", "kept", "held out", "tokens")
    table = Table(*heads, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="(tokens are the training side's)")
    for column in table.columns[1:]:
        column.justify = "right"
    nothing = {"n_dialogues": 0, "n_tokens": 0}
    train, heldout = splits["train"]["sources"], splits["heldout"]["sources"]
    for name, ledger in ledgers.items():
        left_out = sum(ledger.filtered.values())
        n_heldout = heldout.get(name, nothing)["n_dialogues"]
        n_tokens = train.get(name, nothing)["n_tokens"]
        twice = ledger.duplicates + ledger.near_duplicates
        counts = (ledger.read, ledger.quarantined, left_out, twice, ledger.kept, n_heldout)
        table.add_row(name, *(f"{count:,}" for count in counts), short_number(n_tokens))
    return table


def side_table(splits: Figures) -> Table:
    """The contents of each side, from its figures in the manifest."""
    rows = {
        "dialogues": "n_dialogues",
        "messages": "n_messages",
        "characters": "n_characters",
        "tokens": "n_tokens",
        "of these, context repeated": "n_repeated_tokens",
        "and the character's": "n_answer_tokens",
        "rows": "n_rows",
        "partner continues": "n_partner_continues",
        "partner leaves": "n_partner_leaves",
    }
    table = Table("", *splits)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, key in rows.items():
        table.add_row(label, *(f"{side[key]:,}" for side in splits.values()))
    table.add_row("packing density", *(f"{side['density']:.2%}" for side in splits.values()))
    table.add_row("characters per token", *(f"{side['characters_per_token']:.2f}" for side in splits.values()))
    table.add_row("fingerprint", *(side["fingerprint"][:12] for side in splits.values()))
    return table
