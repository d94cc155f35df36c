"""The reasons of quarantined records, in groups with counts and examples."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from data.clean.quarantine import general_reason
from data.inspect.terminal_text import visible
from data.packed.shards import ShardError

_N_GROUPS, _N_EXAMPLES, _EXAMPLE_WIDTH = 20, 2, 160


@dataclass(slots=True)
class ReasonGroup:
    """Records of one source that were quarantined for one reason, whatever values it names."""

    source: str
    reason: str
    count: int = 0
    examples: list[dict[str, object]] = field(default_factory=list)


def group_reasons(path: Path) -> list[ReasonGroup]:
    """The groups of a quarantine file, the largest first. Raises ShardError with the line of an invalid record."""
    groups: dict[tuple[str, str], ReasonGroup] = {}
    for record in _records(path):
        source, reason = str(record["source"]), general_reason(str(record["reason"]))
        group = groups.setdefault((source, reason), ReasonGroup(source, reason))
        group.count += 1
        if len(group.examples) < _N_EXAMPLES:
            group.examples.append(record)
    return sorted(groups.values(), key=lambda group: (-group.count, group.source, group.reason))


def print_quarantine(path: Path, console: Console) -> None:
    """Print the groups with examples."""
    groups = group_reasons(path)
    total = sum(group.count for group in groups)
    console.print(f"[bold]quarantined: {total:,} records[/]" + (f", all in {path}" if total else ""), soft_wrap=True)
    for group in groups[:_N_GROUPS]:
        console.print(Text(f"{group.count:>9,}  {group.source}: {visible(group.reason)}", "yellow"), soft_wrap=True)
        for example in group.examples:
            beginning = visible(str(example["record"])).replace("\n", " ")[:_EXAMPLE_WIDTH]
            place = f"{example['file']}:{example['line']}"
            console.print(Text(f"{'':11}{place}: {visible(str(example['reason']))}"), soft_wrap=True)
            console.print(Text(f"{'':11}{beginning}", "dim"), soft_wrap=True)
    if rest := groups[_N_GROUPS:]:
        console.print(f"{sum(group.count for group in rest):>9,}  for {len(rest)} other reasons")


def _records(path: Path) -> Iterator[dict[str, object]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                yield {key: record[key] for key in ("source", "file", "line", "reason", "record")}
            except (ValueError, KeyError, TypeError) as error:
                raise ShardError(f"{path}:{number}: not a quarantined record ({error!r}); prepare again") from None
