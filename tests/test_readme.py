"""The commands that README.md and the other documents print work as they are printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from data.pipeline.recipe import DataRecipe
from recipes.loader import load_recipe
from recipes.stages import LAUNCHER, entry_module

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "BENCHMARKS.md")]
FENCE = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RECIPES = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
CHEAP = {"help"}  # make targets that are run as printed; of the others, what they would do is looked at


@dataclass(frozen=True)
class Command:
    """One command of a fenced block, and where it is."""

    document: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}:{self.line} {shlex.join(self.words)}"


def commands(document: str, text: str) -> list[Command]:
    """The commands of a text's fenced bash blocks: prompts, comments, variables before and pipes after are cut off."""
    found = []
    for block in FENCE.finditer(text):
        first = text[: block.start(1)].count("\n") + 1
        lines = block.group(1).split("\n")
        joined = ""
        for number, line in enumerate(lines):
            joined += line.removeprefix("$ ")
            if joined.endswith("\\"):
                joined = joined[:-1] + " "
                continue
            lexer = shlex.shlex(joined, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            joined = ""
            part: list[str] = []
            for word in [*lexer, ";"]:
                if word and set(word) <= set("|&;<>"):
                    while part and re.fullmatch(r"\w+=.*", part[0]):
                        part = part[1:]
                    if part:
                        found.append(Command(document, first + number, tuple(part)))
                    part = []
                    if word.startswith((">", "<")):
                        break
                else:
                    part.append(word)
    return found


COMMANDS = [command for path in DOCUMENTS if path.exists() for command in commands(path.name, path.read_text("utf-8"))]


def module_call(words: tuple[str, ...]) -> tuple[str, list[str]] | None:
    """The module and its arguments, of `python -m X ...`, and of `python -m train.launch [options] -m X ...`."""
    launcher = Path(words[0]).name
    if launcher not in ("python", "python3", "torchrun", "srun") or "-m" not in words:
        return None
    at = words.index("-m")
    if words[at + 1] == LAUNCHER:
        at = words.index("-m", at + 1)
    return words[at + 1], list(words[at + 2 :])


def is_script(words: tuple[str, ...]) -> bool:
    """Whether it runs a program of the checkout by its path."""
    return len(words) > 1 and words[1].endswith(".py") and (ROOT / words[1]).is_file()


OURS = [
    command for command in COMMANDS if (call := module_call(command.words)) and (ROOT / call[0].split(".")[0]).is_dir()
]
MAKES = [command for command in COMMANDS if command.words[0] == "make"]


@pytest.mark.parametrize("command", list({command.words: command for command in OURS}.values()), ids=str)
def test_a_printed_module_takes_its_arguments(
    command: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With --dry-run (its recipe and overrides are checked, nothing is run), or --help where there is no recipe."""
    call = module_call(command.words)
    assert call is not None
    module, arguments = call
    recipes = [argument for argument in arguments if argument.startswith("recipes/")]
    check = [*(argument for argument in arguments if argument != "--dry-run"), "--dry-run"] if recipes else ["--help"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *check])
    try:
        code = entry_module(module).main()
    except SystemExit as left:
        code = left.code
    output = capfd.readouterr()
    missing = re.search(r"source path (corpora/[^\s:]+):", output.err)
    if missing:  # which its reader fetches first, as the recipe says
        assert code == 2 and not (ROOT / missing[1]).exists()
        return
    runs = re.findall(r": (runs/\S+) does not exist, and no stage of this pipeline writes it", output.err)
    if runs:  # of a pipeline that the README runs before
        assert code == 2 and not any((ROOT / run).exists() for run in runs)
        return
    assert code == 0, f"{command}\n{output.out}\n{output.err}"
    if not recipes:
        options = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
        assert [option for option in options if option not in output.out] == [], f"{command}\n{output.out}"


@pytest.mark.parametrize("command", list({command.words: command for command in MAKES}.values()), ids=str)
def test_a_printed_make_target_is_there(command: Command) -> None:
    dry = [] if set(command.words[1:]) <= CHEAP else ["--dry-run"]
    made = ["-o", ".venv/.installed", "-o", "runs/demo/export/manifest.json"]  # as if all were there
    words = ["make", "--no-print-directory", *dry, *made, *command.words[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip()


def test_every_other_printed_command_is_one_we_know() -> None:
    """A command that no test here looks at is a promise nobody keeps: add how it is checked, or take it out."""
    known = {
        "git",
        "cd",
        "make",
        "python",
        "python3",
        "torchrun",
        "srun",
        "pip",
        "curl",
        "vllm",
        "open",
        "xdg-open",
        "sglang",
        "head",
    }
    assert [str(command) for command in COMMANDS if Path(command.words[0]).name not in known] == []
    python = [command for command in COMMANDS if command.words[0].startswith("python")]
    others = [command for command in python if module_call(command.words) is None]
    assert [str(command) for command in others if not is_script(command.words)] == []


def test_the_readme_begins_with_the_two_commands() -> None:
    assert DOCUMENTS[0].exists()
    first = [command.words for command in COMMANDS if command.document == "README.md"]
    assert ("make", "demo") in first[:4]
    assert ("make", "test") in first[:4]


def test_links_between_files_lead_somewhere() -> None:
    for path in filter(Path.exists, DOCUMENTS):
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text("utf-8")):
            assert (ROOT / target).exists(), f"{path.name}: {target}"


def test_commands_are_found_in_blocks() -> None:
    block = "```bash\n$ make demo  # ten minutes\nA=1 python -m data.prepare \\\n  r.yaml a=2 | head > x\n```\n"
    found = commands("R", f"x\n{block}```yaml\na: 1\n```\n")
    assert [(command.line, command.words) for command in found] == [
        (3, ("make", "demo")),
        (5, ("python", "-m", "data.prepare", "r.yaml", "a=2")),
        (5, ("head",)),
    ]
    launched = ("python", "-m", "train.launch", "--nproc-per-node", "2", "-m", "train.sft", "x.yaml")
    assert module_call(launched) == ("train.sft", ["x.yaml"])


@pytest.mark.parametrize("block", RECIPES.findall((ROOT / "README.md").read_text("utf-8")))
def test_the_readme_s_pieces_of_recipes_fit_the_demo_s(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    yaml = YAML(typ="safe")
    recipe = yaml.load(ROOT / "recipes" / "demo" / "data.yaml") | yaml.load(block)
    with open(tmp_path / "data.yaml", "w", encoding="utf-8") as file:
        yaml.dump(recipe, file)
    assert load_recipe(DataRecipe, tmp_path / "data.yaml").run_dir == "runs/demo/data"
