"""The counts of a run of data.feedback, and its report."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from data.clean.ledger import Ledger
from data.feedback.labels import LabelCounts
from data.feedback.pairs import LengthOnly, PairCounts

_LABELS = {1: "positive", 0: "negative"}


@dataclass(slots=True)
class Counts:
    """Counts of the log's lines, the comparisons of each rule, and the shown replies, by outcome."""

    lines: Ledger = field(default_factory=Ledger)
    pairs: PairCounts = field(default_factory=dict)
    labels: LabelCounts = field(default_factory=LabelCounts)
    n_users: int = 0
    n_conversations: int = 0

    def balance(self) -> None:
        """Assert that nothing is lost."""
        for ledger in (self.lines, self.labels.ledger, *(rule.ledger for rule in self.pairs.values())):
            ledger.balance()


def to_report(counts: Counts) -> dict[str, Any]:
    """The figures of report.json."""
    labels = counts.labels
    return {
        "users": counts.n_users,
        "conversations": counts.n_conversations,
        "lines": {
            "read": counts.lines.read,
            "quarantined": counts.lines.quarantined,
            "repeated": counts.lines.duplicates,
            "excluded": dict(sorted(counts.lines.filtered.items())),
            "used": counts.lines.kept,
        },
        "scrubbed": dict(sorted(counts.lines.scrubbed.items())),
        "pairs": {
            rule: {
                "found": of_rule.ledger.read,
                "excluded": dict(sorted(of_rule.ledger.filtered.items())),
                "written": of_rule.ledger.kept,
                "length_only_before_length_filters": of_rule.before_length_filters.to_dict(),
                "length_only": of_rule.written.to_dict(),
            }
            for rule, of_rule in counts.pairs.items()
        },
        "labels": {
            "replies_shown": labels.ledger.read,
            "unlabeled": dict(sorted(labels.ledger.filtered.items())),
            **{name: labels.n_by_label[label] for label, name in _LABELS.items()},
            **{f"mean_characters_{name}": labels.mean_characters(label) for label, name in _LABELS.items()},
        },
    }


def key_figure(counts: Counts) -> str:
    """The key figure, such as "1,204 pairs, 9,310 labels (71% positive)"."""
    n_pairs = sum(rule.ledger.kept for rule in counts.pairs.values())
    n_labels, n_positive = counts.labels.ledger.kept, counts.labels.n_by_label[1]
    share = f" ({n_positive / n_labels:.0%} positive)" if n_labels else ""
    return f"{n_pairs:,} pairs, {n_labels:,} labels{share}"


def print_report(counts: Counts, console: Console) -> None:
    """Print the outcomes of all lines, comparisons and replies."""
    console.print(
        _count_table(f"lines of {counts.n_users:,} users, {counts.n_conversations:,} conversations", _lines(counts))
    )
    if counts.lines.scrubbed:
        console.print(f"scrubbed: {counts.lines.scrubbed_text}", highlight=False, soft_wrap=True)
    for rule, of_rule in counts.pairs.items():
        rows = [
            ("found", of_rule.ledger.read),
            *_excluded(of_rule.ledger),
            ("written (pairs.jsonl)", of_rule.ledger.kept),
        ]
        console.print(_count_table(f"comparisons: {rule}", rows))
        console.print(_length_line(of_rule.before_length_filters, of_rule.written), highlight=False, soft_wrap=True)
    labels = counts.labels
    rows = [("shown", labels.ledger.read), *_excluded(labels.ledger, "unlabeled")]
    console.print(_count_table("replies", [*rows, *((name, labels.n_by_label[k]) for k, name in _LABELS.items())]))
    lengths = (f"{name} {_number(labels.mean_characters(label))}" for label, name in _LABELS.items())
    console.print(f"mean characters of a reply: {', '.join(lengths)}", highlight=False)


def _lines(counts: Counts) -> list[tuple[str, int]]:
    lines = counts.lines
    return [
        ("read", lines.read),
        ("quarantined (quarantine.jsonl)", lines.quarantined),
        ("repeated lines", lines.duplicates),
        *_excluded(lines),
        ("used", lines.kept),
    ]


def _excluded(ledger: Ledger, what: str = "left out") -> Iterator[tuple[str, int]]:
    return ((f"{what}: {reason}", count) for reason, count in sorted(ledger.filtered.items()))


def _count_table(title: str, rows: list[tuple[str, int]]) -> Table:
    table = Table(title, "count")
    table.columns[1].justify = "right"
    for number, (label, count) in enumerate(rows):
        table.add_row(label, f"{count:,}", end_section=number == 0)
    return table


def _length_line(before: LengthOnly, written: LengthOnly) -> str:
    """The length baseline: how often the chosen reply is the longer one."""
    shares = (figures.to_dict()["longer_is_chosen"] for figures in (before, written))
    was, is_now = ("-" if share is None else f"{share:.1%}" for share in shares)
    return (
        f"the longer reply is the chosen one: {was} of the pairs before the length filters, {is_now} of those written"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
