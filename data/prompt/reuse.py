"""What truncation rules leave of a prefix cache: conversations replayed turn by turn, in token ids.

A turn is a reply of the character, for which a prompt is rendered. Reuse is the share of prompt tokens that begin the
prompt of the turn before (strict), or that prompt with the reply it got, as a server caches them both.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    """Conversations that cannot be replayed; the message says what was found and what to give."""


@dataclass
class Replay:
    """Sums over turns, from the second of each conversation on; `cut_` over those whose whole prompt exceeds the
    limit."""

    turns: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    reused_with_reply: int = 0
    naive_tokens: int = 0  # what the prompts would hold under naive truncation
    cut_turns: int = 0
    cut_prompt_tokens: int = 0
    cut_reused_tokens: int = 0
    cut_naive_tokens: int = 0
    moves: int = 0
    new_tokens: int = 0  # what a turn adds to the conversation
    shortest: int = field(default=1 << 60)  # prompt of a turn beyond the limit

    @property
    def reuse(self) -> float:
        """Share of prompt tokens that begin the prompt before."""
        return self.reused_tokens / self.prompt_tokens

    @property
    def kept(self) -> float:
        """Mean prompt length, relative to naive truncation."""
        return self.prompt_tokens / self.naive_tokens


def naive(lengths: Sequence[int], priorities: Sequence[int], token_limit: int) -> list[int]:
    """As much as fits."""
    return surviving_parts(lengths, priorities, token_limit, 1)


def stepped(share: float) -> Rule:
    """Prompt Poet's rule with a step of `share` of the limit."""
    return lambda lengths, priorities, limit: surviving_parts(lengths, priorities, limit, max(1, int(share * limit)))


def planned(cost: float) -> Rule:
    """Our rule at an average cost."""
    return lambda lengths, priorities, limit: planned_parts(lengths, priorities, limit, cost)


@dataclass(frozen=True)
class Turn:
    """One reply to generate: its number among the messages, and what naive truncation would prompt with."""

    place: int
    previous: int  # the number of the reply before
    naive_tokens: int
    fits: bool


class Conversation:
    """A dialogue in token ids, the narrator's first messages pinned, and its turns from the second on."""

    def __init__(self, dialogue: Dialogue, encoder: MessageEncoder, limit: int) -> None:
        self.messages = [np.array(encoder.message(m.speaker, m.text)) for m in dialogue.messages]
        self.opening = np.array(encoder.opening(dialogue.character))
        self.bos = np.array([encoder.tokenizer.bos_id])
        self.limit = limit
        self.n_pinned = n_opening_messages(dialogue.messages)
        self.lengths = [len(ids) for ids in self.messages]
        self.priorities = [0] * self.n_pinned + [1] * (len(self.messages) - self.n_pinned)
        replies = (message.speaker == dialogue.character for message in dialogue.messages)
        places = [i for i, is_reply in enumerate(replies) if is_reply and i >= self.n_pinned]
        self.turns = []
        for previous, place in pairwise(places):
            lengths, _ = own = self.parts(place)
            kept = sum(lengths[i] for i in naive(*own, limit - 1))
            self.turns.append(Turn(place, previous, 1 + kept, 1 + sum(lengths) <= limit))

    def parts(self, place: int) -> tuple[list[int], list[int]]:
        """Lengths and priorities of the parts before a reply, and of its opening."""
        return [*self.lengths[:place], len(self.opening)], [*self.priorities[:place], 0]

    def kept(self, place: int, rule: Rule) -> list[int]:
        """Numbers of the messages that remain in the prompt of a reply."""
        return rule(*self.parts(place), self.limit - 1)[:-1]

    def prompt(self, kept: Sequence[int]) -> np.ndarray:
        """Its token ids."""
        return np.concatenate([self.bos, *(self.messages[i] for i in kept), self.opening])

    def reply(self, place: int) -> np.ndarray:
        """The token ids that the reply added to its prompt."""
        return self.messages[place][len(self.opening) :]


def replay(conversations: Iterable[Conversation], rule: Rule) -> Replay:
    """Every prompt of the conversations' turns against the one before."""
    total = Replay()
    for conversation in conversations:
        if not conversation.turns:
            continue
        kept_before = conversation.kept(conversation.turns[0].previous, rule)
        before = conversation.prompt(kept_before)
        for turn in conversation.turns:
            kept = conversation.kept(turn.place, rule)
            prompt = conversation.prompt(kept)
            reused = common_prefix(before, prompt)
            with_reply = common_prefix(np.concatenate([before, conversation.reply(turn.previous)]), prompt)
            total.turns += 1
            total.prompt_tokens += len(prompt)
            total.reused_tokens += reused
            total.reused_with_reply += with_reply
            total.naive_tokens += turn.naive_tokens
            total.new_tokens += sum(conversation.lengths[turn.previous : turn.place])
            total.moves += kept[: len(kept_before)] != kept_before
            if not turn.fits:
                total.cut_turns += 1
                total.cut_prompt_tokens += len(prompt)
                total.cut_reused_tokens += reused
                total.cut_naive_tokens += turn.naive_tokens
                total.shortest = min(total.shortest, len(prompt))
            kept_before, before = kept, prompt
    return total


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def n_turns(dialogue: Dialogue) -> int:
    """Replies of its character."""
    conversation = dialogue.messages[n_opening_messages(dialogue.messages) :]
    return sum(message.speaker == dialogue.character for message in conversation)


def stitched(dialogues: Iterable[Dialogue], turns: int) -> Iterator[Dialogue]:
    """Conversations of `turns` turns, of dialogues one after the other: one character, one partner, the first scene."""
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
    """At most `n` of them, in even steps."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(n - 1, 1))] for i in range(n)]


def tokenizer_for(dialogues: Sequence[Dialogue], vocab_size: int) -> DialogueTokenizer:
    """A tokenizer trained on the conversations themselves."""
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


def measure(
    sets: Mapping[str, Sequence[Dialogue]], encoder: MessageEncoder, limits: Sequence[int], console: Console
) -> list[Row]:
    """Every rule of the table and the curve, on every set, at every limit."""
    rules: dict[str, Rule] = {"naive": naive}
    rules |= {f"stepped {share:.4g}": stepped(share) for share in CURVE_STEPS}
    rules |= {f"planned {cost:.4g}": planned(cost) for cost in CURVE_COSTS}
    rows = []
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("replaying", total=len(sets) * len(limits) * len(rules))
        for name, dialogues in sets.items():
            for limit in limits:
                conversations = [Conversation(dialogue, encoder, limit) for dialogue in dialogues]
                for rule_name, rule in rules.items():
                    replayed = replay(conversations, rule)
                    rows.append(Row(name, len(dialogues), limit, rule_name, replayed))
                    progress.advance(task)
    return rows


def reuse_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """For each set and limit the rules side by side; `beyond` are the turns whose conversation no longer fits."""
    shown = ("naive", "stepped 0.25", "stepped 0.5", f"planned {CONTEXT_COST:.4g}")
    for _, group in groupby(rows, key=lambda row: (row.conversations, row.limit)):
        own = [row for row in group if row.rule in shown]
        sums, limit = own[0].replay, own[0].limit
        table = Table(
            title=f"{own[0].conversations} ({own[0].n_conversations} conversations, {sums.turns:,} turns), limit "
            f"{limit:,}: {limit * sums.turns / sums.new_tokens:.0f} turns' tokens",
            title_justify="left",
        )
        table.add_column("rule")
        for column in ("reuse", "+ reply", "kept", "moves", "beyond:\nreuse", "beyond:\nkept", "shortest"):
            table.add_column(column, justify="right")
        for row in own:
            table.add_row(row.rule, *_figures(row))
        yield table


def _figures(row: Row) -> list[str]:
    sums = row.replay
    figures = [f"{sums.reuse:.1%}", f"{sums.reused_with_reply / sums.prompt_tokens:.1%}", f"{sums.kept:.1%}"]
    figures.append(f"{sums.moves / row.n_conversations:.1f}")
    if not sums.cut_turns:
        return [*figures, "-", "-", "-"]
    beyond = sums.cut_reused_tokens / sums.cut_prompt_tokens, sums.cut_prompt_tokens / sums.cut_naive_tokens
    return [*figures, *(f"{share:.1%}" for share in beyond), f"{sums.shortest / row.limit:.0%}"]


def plot(rows: Sequence[Row], path: Path) -> None:
    """The trade-off as PNG: reuse over context kept, a panel a set of conversations, a color a limit."""
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
        ax.set_xlabel("context kept, % of naive truncation (x: naive itself)")
        ax.set_ylabel("prompt tokens that begin the prompt before, %")
        ax.grid(True, color="#e2e6ec", linewidth=0.8)
        ax.legend(frameon=False, fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def report(
    names: Sequence[str], limits: Sequence[int], tokenizer: Path | None, out: Path, n: int, min_turns: int,
    stitched_turns: int, vocab_size: int, console: Console,
) -> None:  # fmt: skip
    """Replay, print the table, write the plot. Raises ValueErrors that say what to give instead."""
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
        "reuse: share of prompt tokens that begin the prompt before (+ reply: or it with its reply). kept: mean "
        "length, of naive truncation's. moves: of the cut, a conversation. beyond: turns whose conversation exceeds "
        "the limit. shortest: prompt among these, of the limit. stepped: Prompt Poet's rule, its step of the limit.",
        highlight=False, style="dim",
    )  # fmt: skip
    plot(rows, out)
    console.print(f"the curve: {out}", highlight=False, soft_wrap=True)
