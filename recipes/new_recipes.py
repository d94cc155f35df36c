"""Copies of another folder's recipes, comments included, with values adapted to the data."""

from __future__ import annotations

import importlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from recipes.files import replace_directory

_VOCABULARIES = (384, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_CHARACTERS_A_PIECE = 200  # fewer occurrences are too few to learn a piece
_EPOCHS = 8  # over a small corpus; with a large one the copied recipe's max_steps is the limit
_FEWEST_STEPS = 20
_FEWEST_CONTEXTS = 2  # ranking needs the replies of other dialogues
_HELDOUT_DIALOGUES = 60
_SILENCES = (600.0, 3600.0, 86400.0)  # seconds, tried in this order
_SWAPPED = 0.2  # share of all dialogues
_WITH_DEPARTURES = "kind: chat_jsonl, ends_when_partner_leaves: true"
_RARER_LABEL = 0.03  # the rarer class needs at least this share of the labels
_OF_THE_DEMO = {
    "The demo's conversations (package chitchat-dataset)": "The conversations",
    "conversations of a later season than it was trained on": "conversations that none of them was trained on",
    "The demo, stage by stage: `make demo`, or ": "The pipeline, stage by stage: ",
    "The demo's model": "The model",
    "of the demo": "of the pipeline",
    "on the demo's conversations": "on the conversations",
}
"""Replacements in comments that are true of the demo only."""


@dataclass
class Choices:
    """Recipes by name, one line for each choice, and one for each property of the data to look at."""

    recipes: dict[str, Any]
    runs: str
    like: str
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def stages(self) -> list[str]:
        """The names of the recipes, in the pipeline's order."""
        return [entry["recipe"].removesuffix(".yaml") for entry in self.recipes["pipeline"]["stages"]]

    def set(self, recipe: str, key: str, value: Any, why: str) -> None:
        """Set a dotted key of a recipe, if that recipe exists, and record the reason."""
        if recipe not in self.recipes:
            return
        *sections, last = key.split(".")
        node = self.recipes[recipe]
        for section in sections:
            node = node[section]
        if node.get(last) != value:
            node[last] = value
            self.reasons.append(f"{recipe}: {key}: {_shown(value)} ({why})")

    def leave_out(self, stage: str, why: str) -> None:
        """Remove a stage, and record the reason."""
        if self.recipes.pop(stage, None) is not None:
            entries = self.recipes["pipeline"]["stages"]
            entries.remove(next(entry for entry in entries if entry["recipe"] == f"{stage}.yaml"))
            self.reasons.append(f"no {stage} stage: {why}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _yaml() -> YAML:
    yaml = YAML()
    yaml.width = 2**31
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml


def read_recipes(like: Path, runs: str) -> Choices:
    """The recipes of a folder, with all of their paths moved below `runs`."""
    yaml = _yaml()
    recipes = {file.stem: yaml.load(file) for file in sorted(like.glob("*.yaml"))}
    if "pipeline" not in recipes:
        stages = [{"recipe": f"{name}.yaml"} for name in ("data", "pretrain", "sft") if name in recipes]
        recipes["pipeline"] = {"runs": "", "stages": stages}
    old = f"runs/{like.name}"
    for recipe in recipes.values():
        _move(recipe, old, runs)
    recipes["pipeline"]["runs"] = runs
    return Choices(recipes, runs, like.name)


def _move(node: Any, old: str, new: str) -> None:
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(value, dict | list):
            _move(value, old, new)
        elif isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
            node[key] = new + value.removeprefix(old)


def choose(found: Any, like: Path, runs: str) -> Choices:
    """Adapt the recipes of `like` to what data.inspect.folder has found. Raises the errors that data.prepare would
    raise."""
    look = importlib.import_module("data.inspect.folder")
    choices = read_recipes(like, runs)
    _choose_data(choices, found)
    sides = _choose_split(choices, found)
    _choose_labels(choices, found, sides)
    vocab_size = max(v for v in _VOCABULARIES if v == _VOCABULARIES[0] or _fits(v, choices, found))
    tokenizer = look.fit_tokenizer(sides.train, vocab_size)
    lengths = look.token_lengths(sides.train, tokenizer)
    why = f"{found.n_bytes / 2**20:,.1f} MiB of conversations"
    choices.set("data", "tokenizer.vocab_size", tokenizer.vocab_size, why)
    choices.set("pretrain", "model.vocab_size", tokenizer.vocab_size, "the tokenizer's")
    row_length = _row_length(choices, lengths, look)
    most = look.quantile(lengths, 0.95)
    choices.set("data", "row_length", row_length, f"19 of 20 dialogues have {most:,} tokens or less")
    scale = max(1.0, found.n_bytes / look.n_bytes_of(found.dialogues)) if found.is_sample else 1.0
    _choose_steps(choices, int(sum(lengths) * scale), len(lengths), row_length)
    _choose_heldout(choices, sides, look, tokenizer)
    if (names := found.names.commonest()) is not None and "export" in choices.recipes:
        choices.set("export", "names.user", names[0], "who speaks to the character in most dialogues")
        choices.set("export", "names.character", names[1], "the character of most dialogues")
    if "eval" in choices.recipes:
        choices.recipes["eval"]["title"] = f"Dramatis evaluation: {Path(runs).name}"
    return choices


def _fits(vocab_size: int, choices: Choices, found: Any) -> bool:
    limit = choices.recipes["data"]["tokenizer"]["vocab_size"]
    n_characters = sum(len(message.text) for dialogue in found.dialogues for message in dialogue.messages)
    enough = found.is_sample or n_characters >= vocab_size * _CHARACTERS_A_PIECE
    return bool(vocab_size <= limit and enough)


def _choose_data(choices: Choices, found: Any) -> None:
    data = choices.recipes["data"]
    data["sources"] = [dict(found.source)]
    if found.why_no_departures and found.has_times:
        why = f"{found.why_no_departures}; for logs of people who came and left, write"
        choices.reasons.append(f"data: the end of a dialogue gives no engagement label ({why} {_WITH_DEPARTURES})")
    _warn_of_swapped_characters(choices, found)
    n_bad = len(found.bad)
    if n_bad:
        share = n_bad / found.n_records
        if share > data["max_bad_fraction"]:
            value = min(0.5, round(share * 1.2 + 0.005, 3))
            why = f"{n_bad:,} of {found.n_records:,} records are bad; look at them"
            choices.set("data", "max_bad_fraction", value, why)
    data["filters"] = {"min_speakers": 2, "min_messages": 2}


def _warn_of_swapped_characters(choices: Choices, found: Any) -> None:
    """Warn of two speakers of whom now one, now the other is the character: the model learns both sides."""
    names, n = found.names, len(found.dialogues)
    frequent = sorted(name for name, count in names.characters.items() if count > _SWAPPED * n)
    for one, other in combinations(frequent, 2):
        counts = names.partners[one][other], names.partners[other][one]
        if min(counts) > _SWAPPED * n:
            key = "sources.0.format.character" if "format" in found.source else "sources.0.character"
            in_data = f"set {key} in data.yaml to one of them" if found.kind == "chat_jsonl" else "name it in the data"
            choices.warnings.append(
                f"{one} is the character in {counts[0]:,} dialogues with {other}, {other} in {counts[1]:,} with {one}: "
                f"the model learns both. If only one is the character, {in_data}, and names.user and names.character "
                "in export.yaml"
            )


def _choose_split(choices: Choices, found: Any) -> Any:
    """The sides under the first split rule that holds out about the desired share."""
    look, schema = (
        importlib.import_module("data.inspect.folder"),
        importlib.import_module("data.pipeline.recipe").DataRecipe,
    )
    data = choices.recipes["data"]
    n = len(found.dialogues)
    heldout = round(min(0.2, max(0.002 if found.is_sample else 0.02, _HELDOUT_DIALOGUES / n)), 3)
    data["continue_within_seconds"] = None
    data.ca.items.pop("continue_within_seconds", None)  # its comment describes another value
    problems: list[str] = []
    # whoever takes part in every dialogue would link all of them
    everywhere = sorted(set.intersection(*({*dialogue.participants} for dialogue in found.dialogues)))
    for by_participant in (True, False):
        data["split"] = {"kind": "fraction", "heldout": heldout, "by_participant": by_participant}
        if by_participant and everywhere:
            data["split"]["characters"] = everywhere
        recipe = schema.model_validate_json(json.dumps(data))
        try:
            sides = look.split_found(found, recipe)
        except ValueError as error:
            problems.append(str(error))
            continue
        if found.is_sample:
            choices.reasons.append(f"data: split: {_shown(data['split'])} (not tried: only a sample was read)")
            return sides
        share = len(sides.heldout) / (len(sides.heldout) + len(sides.train))
        if not by_participant or share >= 0.4 * heldout:
            total = len(sides.heldout) + len(sides.train)
            counts = f"{len(sides.heldout):,} of {total:,} dialogues held out"
            linked = "" if by_participant else ", not by participant, because participants link too many dialogues"
            choices.reasons.append(f"data: split: {_shown(data['split'])} ({counts}{linked})")
            return sides
    raise look.LookError(f"{problems[-1]}")


def _choose_labels(choices: Choices, found: Any, sides: Any) -> None:
    """Choose the silence after which a partner counts as gone. Without labels of both classes, omit the scorer and what
    depends on it."""
    look = importlib.import_module("data.inspect.folder")
    own = look.labels_of_metadata(found.dialogues)
    tried = [None] if own else list(_SILENCES) if found.has_times else []
    for silence in tried:
        counts = [look.count_labels(side, silence) for side in (sides.train, sides.heldout)]
        if all(min(c[0], c[1]) >= max(2, _RARER_LABEL * c.total()) for c in counts):
            data = choices.recipes["data"]
            data["continue_within_seconds"] = silence
            why = f"after {counts[0][1]:,} turns the partner writes again, after {counts[0][0]:,} not"
            choices.reasons.append(f"data: continue_within_seconds: {_shown(silence)} ({why})")
            return
    choices.recipes["data"]["continue_within_seconds"] = None
    why = "the messages have no times and no labels" if not tried else "too few turns have one of the two labels"
    choices.leave_out("engagement", f"{why}, so there is no evidence whether a partner wrote again")
    _without_scorer(choices, found)


def _without_scorer(choices: Choices, found: Any) -> None:
    pairs = importlib.import_module("data.inspect.folder").PAIRS.get(found.kind)
    if "dpo" in choices.recipes:
        if pairs is not None and "format" not in found.source:
            files = [{"kind": "file", "path": str(file), "format": pairs} for file in found.files]
            choices.recipes["dpo"]["pairs"] = files
            choices.reasons.append("dpo: pairs: read from the data, because there is no scorer to rank sampled replies")
        else:
            choices.leave_out("dpo", "without a scorer, it needs a file of pairs")
    evaluation = choices.recipes.get("eval")
    if evaluation is not None:
        for key in ("scorer", "engagement", "preference"):
            evaluation.pop(key, None)
        if "dpo" not in choices.recipes:
            evaluation["models"].pop("dpo", None)
    if "export" in choices.recipes and "dpo" not in choices.recipes:
        choices.recipes["export"]["init_from"] = f"{choices.runs}/sft"


def _row_length(choices: Choices, lengths: list[int], look: Any) -> int:
    """The template's row length, or a shorter power of two that most dialogues fit."""
    longest = choices.recipes["data"]["row_length"]
    row_length = 128
    while row_length < look.quantile(lengths, 0.95):
        row_length *= 2
    return int(min(row_length, longest))


def _choose_steps(choices: Choices, n_tokens: int, n_dialogues: int, row_length: int) -> None:
    """At most the template's number of steps, limited to a few epochs of a small corpus."""
    n_rows = max(1, n_tokens // row_length)
    shares = {"pretrain": 1.0, "sft": 0.25, "engagement": 0.25}
    for stage, share in shares.items():
        if stage not in choices.recipes:
            continue
        loop = choices.recipes[stage]["loop"]
        epochs = _EPOCHS * share
        steps = int(epochs * n_rows / loop["rows_per_step"])
        why = f"{epochs:g} epochs of {n_rows:,} rows of {row_length} tokens"
        if steps < _FEWEST_STEPS:
            why = f"the minimum; {why} would be {steps}"
        _set_steps(choices, stage, max(_FEWEST_STEPS, steps), why)
    if "dpo" in choices.recipes:
        for number, pairs in enumerate(choices.recipes["dpo"]["pairs"]):
            if pairs["kind"] == "on_policy" and pairs["n_contexts"] > n_dialogues:
                pairs["n_contexts"] = n_dialogues
                choices.reasons.append(f"dpo: pairs.{number}.n_contexts: {n_dialogues} (one per dialogue)")


def _set_steps(choices: Choices, stage: str, steps: int, why: str) -> None:
    loop, schedule = choices.recipes[stage]["loop"], choices.recipes[stage]["schedule"]
    if steps >= loop["max_steps"]:
        return
    scale = steps / loop["max_steps"]
    choices.set(stage, "loop.max_steps", steps, why)
    for key in ("evaluate_every", "save_every"):
        loop[key] = max(1, min(steps, round(loop[key] * scale)))
    schedule["warmup_steps"] = max(1, min(steps // 4, round(schedule["warmup_steps"] * scale)))


def _choose_heldout(choices: Choices, sides: Any, look: Any, tokenizer: Any) -> None:
    """Lower counts that exceed the held-out data."""
    lengths = look.token_lengths(sides.heldout, tokenizer)
    row_length = choices.recipes["data"]["row_length"]
    n_rows = max(1, sum(lengths) // row_length)
    n = len(sides.heldout)
    for stage in ("pretrain", "sft", "engagement"):
        if stage in choices.recipes and choices.recipes[stage]["evaluation_rows"] > n_rows:
            choices.set(stage, "evaluation_rows", n_rows, f"{sum(lengths):,} tokens are held out")
    evaluation = choices.recipes.get("eval", {})
    if evaluation:
        before = sorted(_messages_before_last_reply(dialogue) for dialogue in sides.heldout)
        most = max(1, before[n // 5])  # the 20th percentile: four of five dialogues have at least as many
        if evaluation["contexts"]["min_messages"] > most:
            choices.set("eval", "contexts.min_messages", most, "the dialogues are short")
        n_contexts = sum(place >= evaluation["contexts"]["min_messages"] for place in before)
        why = f"{n_contexts} of {n} held-out dialogues have such a late reply"
        if n_contexts < _FEWEST_CONTEXTS:
            choices.leave_out("eval", f"{why}, at least {_FEWEST_CONTEXTS} are needed; more conversations give more")
            evaluation = {}
    for part in ("replies", "ranking", "user_sensitivity"):
        if part in evaluation and evaluation[part]["n_contexts"] > n_contexts:
            choices.set("eval", f"{part}.n_contexts", n_contexts, why)
    if "ranking" in evaluation and evaluation["ranking"]["n_distractors"] >= n_contexts:
        choices.set("eval", "ranking.n_distractors", max(1, n_contexts - 1), "the replies of the other contexts")
    if "export" in choices.recipes and choices.recipes["export"]["n_parity_conversations"] > n:
        choices.set("export", "n_parity_conversations", n, f"{n} dialogues are held out")


def _messages_before_last_reply(dialogue: Any) -> int:
    places = [place for place, message in enumerate(dialogue.messages) if message.speaker == dialogue.character]
    return int(places[-1]) if places else 0


def texts_of(choices: Choices, like_name: str, folder: str) -> Iterator[tuple[str, str]]:
    """(name, YAML text) of every recipe; comments that name the copied folder name the new one."""
    for name, recipe in choices.recipes.items():
        stream = io.StringIO()
        _yaml().dump(recipe, stream)
        lines = stream.getvalue().splitlines()
        yield name, "".join(f"{_renamed(line, like_name, folder, choices.runs)}\n" for line in lines)


def _renamed(line: str, like_name: str, folder: str, runs: str) -> str:
    before, mark, comment = line.partition("#")
    for old, new in {f"recipes/{like_name}": folder, f"runs/{like_name}": runs, **_OF_THE_DEMO}.items():
        comment = comment.replace(old, new)
    return before + mark + comment


def write_recipes(choices: Choices, folder: Path) -> None:
    """Write all files or none."""
    staging = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        for name, text in texts_of(choices, choices.like, str(folder)):
            (staging / f"{name}.yaml").write_text(text, encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()  # empty
        replace_directory(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
