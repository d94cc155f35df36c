"""Write a large chat JSONL for benchmarks of data preparation: real dialogues, repeated with changed words.

python -m eval.speed.repeated_chats big.jsonl --gigabytes 4 runs/demo/data/dialogues/train.jsonl
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from data.format.dialogue import Dialogue, DialogueError, Message
from data.format.dialogue_json import read_dialogues
from recipes.loader import print_error

_WORD = re.compile(r"\w+")
_SHARE_CHANGED = 0.2


def changed(dialogue: Dialogue, copy: int, words: Sequence[str], seed: int = 0) -> Dialogue:
    """A copy with a fifth of the words replaced, by frequency; copy 0 is unchanged."""
    if copy == 0:
        return dialogue
    rng = random.Random(f"{seed} {copy} {dialogue.id}")

    def other(found: re.Match[str]) -> str:
        return words[int(rng.random() * len(words))] if rng.random() < _SHARE_CHANGED else found[0]

    messages = tuple(
        Message(message.speaker, _WORD.sub(other, message.text), message.time) for message in dialogue.messages
    )
    participants = tuple(f"{participant}-{copy}" for participant in dialogue.participants)
    return replace(dialogue, id=f"{dialogue.id}-{copy}", messages=messages, participants=participants)


def repeated(dialogues: Sequence[Dialogue]) -> Iterator[str]:
    """Endless JSON lines in the format of the source chat_jsonl."""
    counts = Counter(word for d in dialogues for m in d.messages for word in _WORD.findall(m.text))
    words = [word for word, count in counts.items() for _ in range(min(count, 1_000))]
    copy = 0
    while True:
        for dialogue in dialogues:
            yield _line(changed(dialogue, copy, words))
        copy += 1


def _line(dialogue: Dialogue) -> str:
    """All lines have the same keys and types, as `datasets` requires; metadata is omitted."""
    record = {
        "id": dialogue.id,
        "character": dialogue.character,
        "messages": [{"speaker": m.speaker, "text": m.text, "time": m.time} for m in dialogue.messages],
        "participants": list(dialogue.participants),
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 for input that cannot be read, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("dialogues", type=Path, nargs="+", help="dialogues/*.jsonl of prepared data")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="10^9 bytes")
    arguments = parser.parse_args(argv)
    console, limit = Console(), int(arguments.gigabytes * 1e9)
    try:
        lines = repeated([dialogue for path in arguments.dialogues for dialogue in read_dialogues(path)])
        with open(arguments.out, "wb") as file:
            for megabyte in track(range(0, limit, 10**6), "writing (MB)", console=console, transient=True):
                while file.tell() < megabyte + 10**6:
                    file.write(next(lines).encode())
        console.print(f"{arguments.out}: {arguments.out.stat().st_size / 1e9:.2f} GB", highlight=False)
    except (DialogueError, OSError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
