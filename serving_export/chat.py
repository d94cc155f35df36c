"""Talk to an exported character in the terminal.

python -m serving_export.chat runs/demo/export [--character NAME --user NAME --scene TEXT --temperature 0.8]
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time

from rich.console import Console
from rich.markup import escape as escape_markup

from data.format.dialogue import NARRATOR, DialogueError, Message, check_speaker
from data.sources.speaker import check_user
from model.inference.sampling import Sampling, SamplingError
from serving_export.bundle import Bundle, open_bundle
from serving_export.server.reply import Replier
from serving_export.server.request import GenerationFailed, PromptError, ServedRequest

HELP = "/reset starts over, /retry generates the last reply again, /stats shows the cache, /quit (or Ctrl-D) leaves"


class Chat:
    """One conversation in the terminal."""

    def __init__(self, bundle: Bundle, replier: Replier, console: Console, arguments: argparse.Namespace):
        self.console, self._replier, self._arguments = console, replier, arguments
        self.user: str = arguments.user or bundle.defaults.user
        self.character: str = arguments.character or bundle.defaults.character
        check_user(self.user)
        check_speaker(self.character)
        default = bundle.sampling
        self._temperature = default.temperature if arguments.temperature is None else arguments.temperature
        self._top_p = default.top_p if arguments.top_p is None else arguments.top_p
        self._top_k = default.top_k
        self._sampling(0)  # raises SamplingError for invalid values before the first line is read
        self._opening = [Message(NARRATOR, arguments.scene)] if arguments.scene else []
        self._last: tuple[ServedRequest, float] | None = None
        self.reset()

    def _sampling(self, seed: int) -> Sampling:
        n_tokens: int = self._arguments.max_tokens
        if n_tokens < 1:
            raise SamplingError(f"max-tokens is {n_tokens}; expected at least 1")
        return self._replier.sampling(n_tokens, self._temperature, self._top_k, self._top_p, seed)

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages = list(self._opening)

    def say(self, text: str) -> None:
        """Add the user's message and answer it."""
        self.messages.append(Message(self.user, text))
        self.answer()

    def retry(self) -> None:
        """Generate the last reply again."""
        if self.messages and self.messages[-1].speaker == self.character:
            self.messages.pop()
        if self.messages and self.messages[-1].speaker == self.user:
            self.answer()
        else:
            self.console.print("[dim]no message yet[/]")

    def answer(self) -> None:
        """Stream the character's reply. Ctrl-C ends it; the text so far is kept."""
        # with the same seed in every turn, a weak model repeats itself
        given = self._arguments.seed
        seed = secrets.randbits(62) if given is None else (given * 1_000_003 + len(self.messages)) % 2**63
        began = time.perf_counter()
        request: ServedRequest | None = None
        written, n_left_out = "", 0
        self.console.print(f"[bold magenta]{escape_markup(self.character)}:[/] ", end="")
        try:
            prompt = self._replier.encode(
                self.messages, self.character, truncate=True, longest_reply=self._arguments.max_tokens
            )
            n_left_out = prompt.n_left_out
            for text, current in self._replier.stream(prompt, self._sampling(seed)):
                request = current
                written += text
                self.console.out(_printable(text), end="", highlight=False)
        except KeyboardInterrupt:
            self.console.print(" [dim](stopped)[/]", end="")
        except (PromptError, GenerationFailed) as error:
            self.console.print(f"[red]{escape_markup(str(error))}; /reset starts over[/]")
            self.messages.pop()
            return
        self.console.print()
        if n_left_out:
            what = "message does" if n_left_out == 1 else "messages do"
            self.console.print(f"[dim]the {n_left_out} oldest {what} not fit the model's context and were left out[/]")
        self.messages.append(Message(self.character, written))
        if request is not None:
            self._last = (request, time.perf_counter() - began)

    def stats(self) -> None:
        """Print the speed of the last reply and the prefix cache hits."""
        engine = self._replier.engine
        if self._last is not None:
            last, seconds = self._last
            self.console.print(
                f"[dim]last reply: {last.n_cached} of {last.n_prompt} prompt tokens from the cache, "
                f"{last.n_generated} tokens in {seconds:.2f} s ({last.n_generated / seconds:.0f} tokens/s)[/]"
            )
        counters, allocator = engine.prefix_cache.counters, engine.cache.allocator
        total = counters.hit_tokens + counters.missed_tokens
        share = counters.hit_tokens / total if total else 0
        self.console.print(
            f"[dim]since start: {counters.hit_tokens} of {total} prompt tokens from the cache ({share:.0%}); "
            f"{engine.prefix_cache.n_pages} of {allocator.n_pages} pages kept[/]"
        )

    def obey(self, line: str) -> bool:
        """Run a command or send a message; False to quit."""
        if not line.startswith("/"):
            self.say(line)
            return True
        commands = {"/reset": self.reset, "/retry": self.retry, "/stats": self.stats}
        if line in ("/quit", "/exit"):
            return False
        if line in commands:
            commands[line]()
        else:
            self.console.print(f"[dim]{escape_markup(line)} is not a command; {HELP}[/]")
        return True

    def run(self) -> None:
        """Read lines until the end of the input, /quit, Ctrl-D or Ctrl-C at the prompt."""
        interactive = sys.stdin.isatty()
        while True:
            try:
                line = self._read(interactive)
            except (EOFError, KeyboardInterrupt):
                if interactive:
                    self.console.print()
                return
            try:
                if line and not self.obey(line):
                    return
            except DialogueError as error:
                self.console.print(f"[red]{escape_markup(str(error))}[/]")

    def _read(self, interactive: bool) -> str:
        if interactive:
            return self.console.input(f"[bold cyan]{escape_markup(self.user)}:[/] ").strip()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        if line.strip():
            self.console.print(f"[bold cyan]{escape_markup(self.user)}:[/] {escape_markup(line.strip())}")
        return line.strip()


def _printable(text: str) -> str:
    """Text without control characters, which could move the terminal's cursor."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def main(argv: list[str] | None = None) -> int:
    """Load a bundle and chat until the user quits; the exit code is 1 if it cannot be loaded."""
    parser = argparse.ArgumentParser(
        prog="python -m serving_export.chat", description="Chat with an exported character."
    )
    parser.add_argument("bundle", help="directory made by serving_export.export, such as runs/demo/export")
    parser.add_argument("--character", help="who answers (default: the bundle's character)")
    parser.add_argument("--user", help="who you are (default: the bundle's user)")
    parser.add_argument("--scene", help="what the narrator says before the conversation")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the bundle's)")
    parser.add_argument(
        "--top-p",
        type=float,
        help="sample from the most probable tokens of this total probability (default: the bundle's)",
    )
    parser.add_argument("--max-tokens", type=int, default=200, help="longest reply (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="generate the same replies every time")
    parser.add_argument("--cache-mib", type=int, default=64, help="memory for keys and values (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        bundle = open_bundle(arguments.bundle, arguments.device)
        engine = bundle.engine(arguments.cache_mib)
        chat = Chat(bundle, Replier(engine, bundle.tokenizer), console, arguments)
    except (ValueError, OSError) as error:
        print(f"cannot chat with {arguments.bundle}: {error}", file=sys.stderr)
        return 1
    console.print(f"[dim]{escape_markup(bundle.name)}: {HELP}[/]")
    engine.start()
    try:
        chat.run()
    finally:
        engine.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
