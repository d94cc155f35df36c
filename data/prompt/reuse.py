"""Prefix cache reuse under each truncation rule, by replaying conversations turn by turn in token ids.

A turn is a reply of the character, for which a prompt is rendered. Reuse is the share of prompt tokens that are a
prefix of the previous turn's prompt, or of that prompt and its reply, which a server caches too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data.format.dialogue import Dialogue, Message, n_opening_messages
from data.format.dialogue_json import read_dialogues
from data.format.encode import texts_of
from data.format.message_encoder import MessageEncoder
from data.format.tokenizer import DialogueTokenizer, TokenizerError, train_tokenizer
from data.prompt.truncation import CONTEXT_COST, planned_parts, surviving_parts
from data.sources.registry import SOURCES

Rule = Callable[[Sequence[int], Sequence[int], int], list[int]]  # lengths, priorities, token limit: what remains

CURVE_COSTS = (0.03, 0.06, 0.125, 0.1875, 0.25, 0.3125, 0.375)
CURVE_STEPS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)  # of the limit
_COLORS = ("#0072b2", "#d55e00", "#00896b", "#8d5aa8", "#b08900")
_SAMPLE_CHARACTERS = 4_000_000


class ReuseError(ValueError):
    """Conversations that cannot be replayed; the message names what was found and what is expected."""


@dataclass
class Replay:
    """Sums over turns, from the second of each conversation on."""

    turns: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    reused_with_reply: int = 0
    naive_tokens: int = 0  # of the prompts under naive truncation
    new_tokens: int = 0  # what each turn adds to the conversation
    moves: int = 0  # of the cut
    shortest: int = 1 << 60  # prompt

    @property
    def reuse(self) -> float:
        """Share of prompt tokens that are a prefix of the previous prompt."""
        return self.reused_tokens / self.prompt_tokens

    @property
    def kept(self) -> float:
        """Mean prompt length, relative to naive truncation."""
        return self.prompt_tokens / self.naive_tokens


def naive(lengths: Sequence[int], priorities: Sequence[int], token_limit: int) -> list[int]:
    """Keep as much as fits."""
    return surviving_parts(lengths, priorities, token_limit, 1)


def stepped(share: float) -> Rule:
    """Prompt Poet's rule; the step is `share` of the limit."""
    return lambda lengths, priorities, limit: surviving_parts(lengths, priorities, limit, max(1, int(share * limit)))


def planned(cost: float) -> Rule:
    """Our rule at an average cost (data/prompt/truncation.py)."""
    return lambda lengths, priorities, limit: planned_parts(lengths, priorities, limit, cost)


class TokenizedConversation:
    """The token ids of a dialogue's messages; the narrator's opening is never cut. `replies` are the numbers of the
    character's messages."""

    def __init__(self, dialogue: Dialogue, encoder: MessageEncoder, limit: int) -> None:
        self.messages = [np.array(encoder.message(m.speaker, m.text)) for m in dialogue.messages]
        self.header = np.array(encoder.opening(dialogue.character))
        self.bos = np.array([encoder.tokenizer.bos_id])
        self.limit = limit
        self.lengths = [len(ids) for ids in self.messages]
        n_pinned = n_opening_messages(dialogue.messages)
        self.priorities = [0] * n_pinned + [1] * (len(self.messages) - n_pinned)
        self.replies = [n for n, m in enumerate(dialogue.messages) if n >= n_pinned and m.speaker == dialogue.character]
        self.naive_tokens = {n: len(self.prompt(self.kept(n, naive))) for n in self.replies}

    def kept(self, reply: int, rule: Rule) -> list[int]:
        """Numbers of the messages in the prompt of a reply."""
        lengths, priorities = [*self.lengths[:reply], len(self.header)], [*self.priorities[:reply], 0]
        return rule(lengths, priorities, self.limit - 1)[:-1]

    def prompt(self, kept: Sequence[int]) -> np.ndarray:
        """Its token ids."""
        return np.concatenate([self.bos, *(self.messages[i] for i in kept), self.header])

    def fits(self, reply: int) -> bool:
        """Whether everything before a reply fits the limit."""
        return 1 + sum(self.lengths[:reply]) + len(self.header) <= self.limit


def replay(conversations: Iterable[TokenizedConversation], rule: Rule) -> tuple[Replay, Replay]:
    """Compare every prompt with the previous one: sums over all turns, and over those that exceed the limit."""
    total, beyond = Replay(), Replay()
    for one in conversations:
        prompts = [(reply, kept := one.kept(reply, rule), one.prompt(kept)) for reply in one.replies]
        for (previous, kept_before, before), (reply, kept, prompt) in pairwise(prompts):
            cached = np.concatenate([before, one.messages[previous][len(one.header) :]])
            for sums in (total,) if one.fits(reply) else (total, beyond):
                sums.turns += 1
                sums.prompt_tokens += len(prompt)
                sums.reused_tokens += common_prefix(before, prompt)
                sums.reused_with_reply += common_prefix(cached, prompt)
                sums.naive_tokens += one.naive_tokens[reply]
                sums.new_tokens += sum(one.lengths[previous:reply])
                sums.moves += kept[: len(kept_before)] != kept_before
                sums.shortest = min(sums.shortest, len(prompt))
    return total, beyond


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def n_turns(dialogue: Dialogue) -> int:
    """The number of its character's replies."""
    conversation = dialogue.messages[n_opening_messages(dialogue.messages) :]
    return sum(message.speaker == dialogue.character for message in conversation)


def stitched(dialogues: Iterable[Dialogue], turns: int) -> Iterator[Dialogue]:
    """Concatenate dialogues to conversations of `turns` turns with one character, one partner and the first scene."""
    messages: list[Message] = []
    done, number = 0, 0
    for dialogue in dialogues:
        pinned = n_opening_messages(dialogue.messages)
        if not messages:
            messages += dialogue.messages[:pinned]
        for message in dialogue.messages[pinned:]:
            is_reply = message.speaker == dialogue.character
            messages.append(Message("Character" if is_reply else "Partner", message.text))
            done += is_reply
            if done == turns:
                yield Dialogue(f"stitched {number}", tuple(messages), "Character")
                messages, done, number = [], 0, number + 1
                break


def read_conversations(name: str) -> list[Dialogue]:
    """The dialogues of a file that data.prepare wrote (dialogues/*.jsonl), or of `kind:path`, a source of its recipe
    (`kind:` for one that needs no path).

    Raises ReuseError, DialogueError or SourceError.
    """
    kind, colon, path = name.partition(":")
    if not colon:
        return list(read_dialogues(name))
    if kind not in SOURCES:
        raise ReuseError(f"{name}: no source of kind {kind!r}; expected a .jsonl file, or one of {', '.join(SOURCES)}")
    fields = SOURCES[kind].model_fields
    source = SOURCES[kind](kind=kind, **({"path": path} if path and "path" in fields else {}))
    return [record for record in source.read() if isinstance(record, Dialogue)]


def evenly(items: Sequence[Dialogue], n: int) -> list[Dialogue]:
    """At most `n` of the items, evenly spaced."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(n - 1, 1))] for i in range(n)]


def tokenizer_for(dialogues: Sequence[Dialogue], vocab_size: int) -> DialogueTokenizer:
    """A tokenizer trained on these conversations."""
    texts = texts_of(dialogues)
    return train_tokenizer(texts, None, vocab_size, sample_characters=_SAMPLE_CHARACTERS)


@dataclass(frozen=True)
class Row:
    """One rule on one set of conversations at one limit."""

    conversations: str
    n_conversations: int
    limit: int
    rule: str
    replay: Replay
    beyond: Replay  # turns whose conversation exceeds the limit


def measure(
    sets: Mapping[str, Sequence[Dialogue]], encoder: MessageEncoder, limits: Sequence[int], console: Console
) -> list[Row]:
    """Replay every set under every rule of the table and the plot, at every limit."""
    rules: dict[str, Rule] = {"naive": naive}
    rules |= {f"stepped {share:.4g}": stepped(share) for share in CURVE_STEPS}
    rules |= {f"planned {cost:.4g}": planned(cost) for cost in CURVE_COSTS}
    rows = []
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("replaying", total=len(sets) * len(limits) * len(rules))
        for name, dialogues in sets.items():
            for limit in limits:
                conversations = [TokenizedConversation(dialogue, encoder, limit) for dialogue in dialogues]
                for rule_name, rule in rules.items():
                    rows.append(Row(name, len(dialogues), limit, rule_name, *replay(conversations, rule)))
                    progress.advance(task)
    return rows


def reuse_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One table for each set and limit; `beyond`: turns whose conversation exceeds the limit."""
    shown = ("naive", "stepped 0.25", "stepped 0.5", f"planned {CONTEXT_COST:.4g}")
    for _, group in groupby(rows, key=lambda row: (row.conversations, row.limit)):
        own = [row for row in group if row.rule in shown]
        sums, limit = own[0].replay, own[0].limit
        table = Table(
            title=f"{own[0].conversations} ({own[0].n_conversations} conversations, {sums.turns:,} turns), limit "
            f"{limit:,} tokens: {limit * sums.turns / sums.new_tokens:.0f} turns",
            title_justify="left",
        )
        table.add_column("rule")
        for column in ("reuse", "+ reply", "kept", "moves", "beyond:\nreuse", "beyond:\nkept", "shortest"):
            table.add_column(column, justify="right")
        for row in own:
            table.add_row(row.rule, *_figures(row))
        yield table


def _figures(row: Row) -> list[str]:
    sums, beyond = row.replay, row.beyond
    figures = [f"{sums.reuse:.1%}", f"{sums.reused_with_reply / sums.prompt_tokens:.1%}", f"{sums.kept:.1%}"]
    figures.append(f"{sums.moves / row.n_conversations:.1f}")
    if not beyond.turns:
        return [*figures, "-", "-", "-"]
    return [*figures, f"{beyond.reuse:.1%}", f"{beyond.kept:.1%}", f"{beyond.shortest / row.limit:.0%}"]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot reuse over kept context: one panel for each set of conversations, one color for each limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets, limits = list(dict.fromkeys(r.conversations for r in rows)), list(dict.fromkeys(r.limit for r in rows))
    figure = Figure(figsize=(5.4 * len(sets), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(sets):
        ax = figure.add_subplot(1, len(sets), number + 1)
        ax.axhline(95, color="#9aa4b2", linewidth=0.8, linestyle=":")
        ax.axvline(75, color="#9aa4b2", linewidth=0.8, linestyle=":")
        for limit, color in zip(limits, _COLORS):
            own = [r for r in rows if r.conversations == name and r.limit == limit]
            for kind, style in (("planned", "o-"), ("stepped", "s--"), ("naive", "x")):
                points = [(100 * r.replay.kept, 100 * r.replay.reuse) for r in own if r.rule.startswith(kind)]
                label = f"{kind}, limit {limit:,}" if kind != "naive" else None
                ax.plot(*zip(*points), style, color=color, markersize=4, linewidth=1.3, label=label)
        ax.set_title(name, loc="left", fontsize=10.5)
        ax.set_xlabel("context kept, % of naive truncation (x: naive)")
        ax.set_ylabel("prompt tokens reused from the previous prompt, %")
        ax.grid(True, color="#e2e6ec", linewidth=0.8)
        ax.legend(frameon=False, fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def report(
    names: Sequence[str], limits: Sequence[int], tokenizer: Path | None, out: Path, n: int, min_turns: int,
    stitched_turns: int, vocab_size: int, console: Console,
) -> None:  # fmt: skip
    """Replay, print the tables and write the plot. Raises ReuseError, DialogueError or SourceError."""
    dialogues = [dialogue for name in names for dialogue in read_conversations(name)]
    long = [dialogue for dialogue in dialogues if n_turns(dialogue) >= min_turns]
    sets = {f"real, {min_turns} turns or more": evenly(long, n)}
    joined = list(stitched(dialogues, stitched_turns))
    sets[f"stitched, {stitched_turns} turns"] = evenly(joined, n)
    empty = [name for name, some in sets.items() if not some]
    if empty:
        longest = max((n_turns(dialogue) for dialogue in dialogues), default=0)
        raise ReuseError(
            f"no conversations ({empty[0]}): {len(dialogues)} dialogues, the longest has {longest} turns; lower "
            "--min-turns or --stitched-turns, or give more conversations"
        )
    try:
        loaded = DialogueTokenizer.load(tokenizer) if tokenizer else tokenizer_for(dialogues, vocab_size)
    except TokenizerError as error:
        raise ReuseError(f"{error} (--tokenizer, --vocab-size)") from None
    rows = measure(sets, MessageEncoder(loaded, 1 << 27), limits, console)
    for table in reuse_tables(rows):
        console.print(table)
    console.print(
        "reuse: share of prompt tokens that are a prefix of the previous prompt (+ reply: of the previous prompt and "
        "its reply). kept: mean length relative to naive truncation. moves: of the cut, per conversation. beyond: "
        "turns whose conversation exceeds the limit. shortest: shortest prompt of these, relative to the limit. "
        "stepped: Prompt Poet's rule; its step, relative to the limit.",
        highlight=False, style="dim",
    )  # fmt: skip
    plot(rows, out)
    console.print(f"plot: {out}", highlight=False, soft_wrap=True)
