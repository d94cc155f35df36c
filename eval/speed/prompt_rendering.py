"""Speed of rendering a growing conversation, ours and Prompt Poet's, with the same template, values and tokenizer.

python -m eval.speed.prompt_rendering
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.format.encode import message_body
from data.format.message_encoder import MessageEncoder
from data.format.tokenizer import DialogueTokenizer, train_tokenizer
from data.prompt.template import PromptTemplate

TEMPLATE = """\
- name: definition
  role: system
  content: |
    {{ character }} is the keeper of a lighthouse: {{ definition }}
{% for message in messages %}
- name: message
  role: user
  truncation_priority: 1
  content: |
    {{ message.speaker }}: {{ escape_special_characters(message.text) }}
{% endfor %}
- name: reply
  role: assistant
  content: |
    {{ character }}:
"""
_SENTENCE = "the tide was out and nobody came to ask whether I had seen a ship or heard the bell before it went dark"

Turn = Callable[[dict[str, Any]], int]


def conversation(n_messages: int) -> list[dict[str, str]]:
    """Two speakers in turn, 5 to 30 words a message, no message twice."""
    words = _SENTENCE.split()
    messages = []
    for i in range(n_messages):
        n_words = 5 + (i * 7919) % 26
        text = f"{i} " + " ".join(words[(i * 31 + j * j) % len(words)] for j in range(n_words))
        messages.append({"speaker": ("Ann", "Finn")[i % 2], "text": text})
    return messages


def prompt_poet_turn(path: Path, tokenizer: DialogueTokenizer, limit: int, step: int) -> Turn:
    """Prompt Poet with its template cache."""
    search_path = list(sys.path)
    from prompt_poet import Prompt

    sys.path[:] = search_path  # the import puts its own folder first, where `tokenizer` and `template` are modules

    def turn(values: dict[str, Any]) -> int:
        prompt = Prompt(values, template_path=str(path), from_cache=True, encode_func=tokenizer.encode)
        prompt.tokenize()
        prompt.truncate(limit, step)
        return len(prompt.tokens)

    return turn


def our_turn(path: Path, tokenizer: DialogueTokenizer, limit: int, step: int, is_stateless: bool = False) -> Turn:
    """Ours as in a server, where the ids of messages are cached across turns.

    `is_stateless`: with only the compiled template cached, like Prompt Poet; every message is encoded again.
    """
    template, kept = PromptTemplate.load(path), MessageEncoder(tokenizer)

    def turn(values: dict[str, Any]) -> int:
        encoder = MessageEncoder(tokenizer) if is_stateless else kept
        return len(template.render(values, encoder, limit, truncation_step=step).tokens)

    return turn


def seconds(turn: Turn, messages: list[dict[str, str]], first: int) -> list[float]:
    """Seconds of each turn while the conversation grows from `first` messages by one a turn."""
    taken = []
    for n in range(first, len(messages) + 1):
        values = {"messages": messages[:n], "character": "Finn", "definition": "quiet, dry, kind to birds"}
        start = time.perf_counter()
        turn(values)
        taken.append(time.perf_counter() - start)
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=200, help="messages at the end of the conversation")
    parser.add_argument("--turns", type=int, default=20, help="last turns that are timed, after as many to warm up")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    messages = conversation(arguments.messages)
    tokenizer = train_tokenizer([message_body(message["text"]) for message in messages], None, vocab_size=400)
    total = sum(len(tokenizer.encode(message["text"])) for message in messages)
    table = Table("", "token limit", "Prompt Poet, ms", "ours, stateless, ms", "ours, ids kept, ms", "faster by")
    renderers = (prompt_poet_turn, partial(our_turn, is_stateless=True), our_turn)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "chat.yml.j2"
        path.write_text(TEMPLATE, encoding="utf-8")
        for name, limit in (("nothing is cut", 100 * total), ("half is cut", total // 2)):
            turns = [make(path, tokenizer, limit, limit // 4) for make in renderers]
            medians: list[list[float]] = [[] for _ in renderers]
            for _ in range(arguments.repeats):
                for taken, turn in zip(medians, turns, strict=True):
                    first = max(1, arguments.messages - 2 * arguments.turns + 1)
                    taken.append(1e3 * statistics.median(seconds(turn, messages, first)[arguments.turns :]))
            theirs, stateless, ours = (statistics.median(taken) for taken in medians)
            cells = (f"{statistics.median(t):.2f} ({min(t):.2f}-{max(t):.2f})" for t in medians)
            table.add_row(name, f"{limit:,}", *cells, f"{theirs / stateless:.1f}x, {theirs / ours:.1f}x")
    console = Console()
    console.print(f"{arguments.messages} messages, {total:,} tokens; median turn, of {arguments.repeats} repeats")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
