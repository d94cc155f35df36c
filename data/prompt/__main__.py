"""Prompt templates: Prompt Poet files to tokens of the dialogue format. Two commands:

python -m data.prompt check recipes/templates/group_chat.yml.j2   # what breaks the prefix cache?
python -m data.prompt reuse chitchat: qmsum:corpora/qmsum         # prefix cache reuse under truncation
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from data.prompt.template import (
    PromptTemplate,
)
from data.prompt.values import PromptError
from recipes.loader import print_error
from recipes.stage_errors import USER_ERROR, print_os_error


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; the exit code is 0, 1 if the template breaks the prefix cache, 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="find values before the conversation that change from turn to turn")
    one.add_argument("template", type=Path, help="a .yml.j2 file")
    one.add_argument("--values", type=Path, help="a JSON object of example values; made from the template otherwise")
    one.add_argument("--varies", nargs="+", default=[], metavar="NAME", help="values that change during a conversation")
    two = commands.add_parser("reuse", help="replay conversations under each truncation rule; a table and a plot")
    two.add_argument("conversations", nargs="+", help="a dialogues/*.jsonl of data.prepare, or kind:path of a source")
    two.add_argument("--limits", type=int, nargs="+", default=[1024, 2048, 4096], metavar="TOKENS")
    two.add_argument("--tokenizer", type=Path, help="a run of data.prepare or a tokenizer.model; else one is trained")
    two.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer that is trained")
    two.add_argument("--n", type=int, default=8, help="conversations of each kind, in even steps")
    two.add_argument("--min-turns", type=int, default=60, help="replies of the character, of a real conversation")
    two.add_argument("--stitched-turns", type=int, default=400, help="of dialogues joined one after the other")
    two.add_argument("--plot", type=Path, default=Path("runs/prompt_reuse/reuse.png"), help="file of the plot")
    arguments = parser.parse_args(argv)
    try:
        return _check(arguments) if arguments.command == "check" else _reuse(arguments)
    except ValueError as error:  # a user error
        print_error(error)
    except OSError as error:
        print_os_error(error, Path())
    return USER_ERROR


def _check(arguments: argparse.Namespace) -> int:
    from data.prompt.check import check
    from data.prompt.example import called_functions, example_values

    console = Console(highlight=False, soft_wrap=True)
    stand_ins = dict.fromkeys(called_functions(PromptTemplate.load(arguments.template)), _first_argument)
    template = PromptTemplate.load(arguments.template, stand_ins)
    values = example_values(template) if arguments.values is None else _read_values(arguments.values)
    try:
        found = check(template, values, arguments.varies)
    except PromptError as error:
        if arguments.values is not None:
            raise
        raise PromptError(
            f"{error}\nThe values were made from the template's syntax; give an example of yours: --values values.json"
        ) from None
    if stand_ins:
        console.print(f"replaced by their first argument: {', '.join(sorted(stand_ins))}", style="dim")
    for finding in found.findings:
        value = f", value {finding.value}" if finding.value else ""
        console.print(f"[bold red]{finding.place}[/]: {finding.part}{value}: {finding.problem}")
        console.print(f"    {finding.advice}", style="dim", markup=False)
    if found.constant:
        names = ", ".join(found.constant)
        console.print(f"must be constant during a conversation: {names}", style="dim", markup=False)
    if len(found.trailing) > 1:
        console.print(f"recomputed every turn, after the messages: {', '.join(found.trailing)}", style="dim")
    if not found.findings:
        console.print(f"[green]{arguments.template}: each prompt extends the previous one[/]")
    return 1 if found.findings else 0


def _first_argument(*arguments: Any, **_: Any) -> Any:
    return arguments[0] if arguments else "text"


def _read_values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror}); expected a JSON object of values") from None
    except ValueError as error:
        raise PromptError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise PromptError(f"{path}: holds a {type(values).__name__}, expected a JSON object: names of values to values")
    return values


def _reuse(arguments: argparse.Namespace) -> int:
    from data.prompt.reuse import report

    report(
        arguments.conversations, arguments.limits, arguments.tokenizer, arguments.plot, arguments.n,
        arguments.min_turns, arguments.stitched_turns, arguments.vocab_size, Console(),
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
