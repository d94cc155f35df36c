"""The recipe of an evaluation and its workspace: data, contexts and models, checked against each other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from rich.console import Console
from rich.table import Table

from data.clean.ledger import reasons_text
from data.format.dialogue import Dialogue
from data.format.dialogue_json import read_dialogues
from data.format.tokenizer import MODEL_FILE, DialogueTokenizer
from data.packed.shards import PackedDataset
from eval.context import Reply, ReplyContext, human_texts, select_contexts
from eval.figure import HUMAN
from eval.models import Models
from eval.parts.engagement import EngagementSection
from eval.parts.perplexity import PerplexitySection
from eval.parts.preference import PreferenceSection
from eval.parts.ranking import RankingSection
from eval.parts.user_sensitivity import UserSensitivitySection
from eval.shared_participants import SharedParticipants
from eval.statistics import Bootstrap
from model.config import ModelConfig
from model.inference.sampling import Sampling
from model.weights import load_config
from recipes.loader import Section
from recipes.plan_check import PlanCheck
from recipes.run_directory import RunDirectoryError, read_done
from recipes.run_identity import Location


class EvalError(ValueError):
    """Inputs of an evaluation are missing or do not match each other."""


class BootstrapSection(Section):
    """Number of resamples and confidence level of the intervals."""

    n_resamples: PositiveInt = 2000
    confidence_level: PositiveFloat = 0.95

    def over(self, heldout: PackedDataset, seed: int) -> Bootstrap:
        """Intervals over the dialogues of these shards, widened if people take part in several, or if several have the
        same id, which are pieces of one conversation."""
        participants, ids = (heldout.dialogues[key].to_pylist() for key in ("participants", "id"))
        n_people = 1 + max((person for people in participants for person in people), default=-1)
        numbers = {identity: n_people + number for number, identity in enumerate(dict.fromkeys(ids))}
        links = [[*people, numbers[identity]] for people, identity in zip(participants, ids, strict=True)]
        return Bootstrap(self.n_resamples, self.confidence_level, seed, SharedParticipants(links))

    @model_validator(mode="after")
    def _below_one(self) -> "BootstrapSection":
        if self.confidence_level >= 1:
            raise ValueError(f"confidence_level: found {self.confidence_level}, expected less than 1 (0.95 is usual)")
        return self


class ContextSection(Section):
    """Contexts have at least `min_messages`; the oldest are dropped to fit `max_prompt_tokens`."""

    max_prompt_tokens: PositiveInt
    min_messages: PositiveInt = 2


class ReplySection(Section):
    """How many replies are sampled from each model, with which sampling, and how many the report shows."""

    n_contexts: PositiveInt
    max_new_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 0
    top_p: PositiveFloat = 1.0
    shown: NonNegativeInt = 12


class EvalRecipe(Section):
    """Models (name: run directory) to evaluate, the scorer, and the parts of the report; omitted parts are skipped."""

    stage: Literal["eval"]
    run_dir: Location
    title: str
    data: Location
    models: dict[str, Location]
    scorer: Location | None = None
    seed: NonNegativeInt
    threads: PositiveInt | None = None
    batch_tokens: PositiveInt = 8192
    bootstrap: BootstrapSection = BootstrapSection()
    contexts: ContextSection
    replies: ReplySection
    perplexity: PerplexitySection | None = None
    ranking: RankingSection | None = None
    engagement: EngagementSection | None = None
    preference: PreferenceSection | None = None
    user_sensitivity: UserSensitivitySection | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "EvalRecipe":
        if not self.models:
            raise ValueError("models: found none, expected at least one line `name: run directory`")
        if HUMAN in self.models:
            raise ValueError(f"models.{HUMAN}: this name is reserved for the replies in the data; choose another")
        for part in ("engagement", "preference"):
            if getattr(self, part) is not None and self.scorer is None:
                raise ValueError(f"{part}: needs a scorer; set `scorer: <run directory>` or remove this section")
        if self.preference is not None:
            for key, name in (("model", self.preference.model), ("against", self.preference.against)):
                if name not in self.models:
                    known = ", ".join(self.models)
                    raise ValueError(f"preference.{key}: found {name!r}, expected one of the models: {known}")
        return self

    def inputs(self) -> dict[str, str]:
        """The run directories that it reads, by name."""
        scorer = {} if self.scorer is None else {"scorer": self.scorer}
        return {"data": self.data, **{f"models.{name}": path for name, path in self.models.items()}, **scorer}

    def check_plan(self, plan: PlanCheck) -> None:
        """Check models, contexts and held-out dialogues against each other, as far as they are known."""
        plan.check_inputs(self.inputs())
        if self.scorer is not None:
            plan.check_reward_model("scorer", self.scorer)
        facts = plan.data(self.data)
        scorer = [("scorer", self.scorer)] if self.scorer is not None else []
        for name, path in [*((f"models.{name}", path) for name, path in self.models.items()), *scorer]:
            config = plan.config(path)
            for problem in facts.misfits(config.vocab_size, config.max_length) if facts and config else ():
                plan.problem(problem)
            if config and (problem := too_long(name, path, config, self, facts.row_length if facts else 0)):
                plan.problem(problem)
        if facts and facts.heldout is not None:
            replies = human_texts(facts.heldout, self.contexts.min_messages)
            if len(replies) < 2 and (fits := _min_messages_that_fits(facts.heldout, self.contexts.min_messages)):
                plan.problem(f"contexts.min_messages: {fits} is the most that two held-out dialogues have")
            _, lowered = fit_counts(self, len(replies), len(set(replies)))
            for line in lowered:
                plan.note(line)

    def parts(self) -> list[str]:
        """The parts that will be evaluated, in order."""
        optional = ("perplexity", "ranking", "engagement", "preference", "user_sensitivity")
        chosen = [name for name in optional if getattr(self, name) is not None]
        return [*chosen, "quality"]


@dataclass
class Workspace:
    """What the parts work on. The quality part fills `replies`, the preference part `reply_scores`."""

    recipe: EvalRecipe
    tokenizer: DialogueTokenizer
    train: PackedDataset
    heldout: PackedDataset
    n_dialogues: int
    models: Models
    contexts: list[ReplyContext]
    bootstrap: Bootstrap
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    reply_scores: dict[str, Any] = field(default_factory=dict)

    @property
    def reply_contexts(self) -> list[ReplyContext]:
        """The contexts that every model replies to, the first ones."""
        return self.contexts[: self.recipe.replies.n_contexts]

    @property
    def sampling(self) -> Sampling:
        """The sampling of replies: no control token but <|end|>."""
        section, tokenizer = self.recipe.replies, self.tokenizer
        return Sampling(
            max_new_tokens=section.max_new_tokens,
            stop_ids=(tokenizer.end_id,),
            temperature=section.temperature,
            top_k=section.top_k,
            top_p=section.top_p,
            seed=self.recipe.seed,
            forbidden_ids=tokenizer.forbidden_in_reply,
        )


def open_workspace(recipe: EvalRecipe, console: Console) -> Workspace:
    """Load data and contexts, check the models against them, print how many dialogues have no context.

    Raises EvalError, or an error of the readers, naming what does not match.
    """
    for name, path in recipe.inputs().items():
        check_finished(name, path)
    data = Path(recipe.data)
    tokenizer = DialogueTokenizer.load(data)
    train, heldout = PackedDataset(data / "train"), PackedDataset(data / "heldout")
    runs = {f"models.{name}": path for name, path in recipe.models.items()}
    for name, path in (runs if recipe.scorer is None else {**runs, "scorer": recipe.scorer}).items():
        check_fits(name, path, load_config(Path(path) / "model"), tokenizer, recipe, heldout.row_length)
    dialogues = list(read_dialogues(data / "dialogues" / "heldout.jsonl"))
    contexts = heldout_contexts(dialogues, tokenizer, recipe.seed, recipe.contexts, console)
    recipe, lowered = fit_counts(recipe, len(contexts), len({context.human_tokens for context in contexts}))
    for line in lowered:
        console.print(line, highlight=False, soft_wrap=True)
    bootstrap = recipe.bootstrap.over(heldout, recipe.seed)
    models = Models(recipe.models, recipe.scorer)
    return Workspace(recipe, tokenizer, train, heldout, len(dialogues), models, contexts, bootstrap)


def heldout_contexts(
    dialogues: Sequence[Dialogue], tokenizer: DialogueTokenizer, seed: int, section: ContextSection, console: Console
) -> list[ReplyContext]:
    """All contexts of the held-out dialogues; prints the number of dialogues without one, by reason."""
    left_out: Counter[str] = Counter()
    contexts = select_contexts(
        dialogues, tokenizer, len(dialogues), seed, section.max_prompt_tokens, section.min_messages, left_out
    )
    told = f"{len(contexts)} contexts of at most {section.max_prompt_tokens} tokens from {len(dialogues)} dialogues"
    console.print(f"{told}; none: {reasons_text(left_out)}" if left_out else told, highlight=False, soft_wrap=True)
    return contexts


def check_finished(name: str, path: str) -> None:
    """Raise RunDirectoryError unless `path` is a finished run directory."""
    if not Path(path).is_dir():
        raise RunDirectoryError(f"{name}: {path} does not exist; run its stage first")
    if read_done(path) is None:
        raise RunDirectoryError(f"{name}: {path} is not finished (it has no done.json); run its stage to the end first")


def print_inputs(inputs: Mapping[str, str], console: Console) -> None:
    """Print which of these run directories exist and are finished."""
    table = Table("input", "run directory", "state")
    for name, path in inputs.items():
        try:
            check_finished(name, path)
            state = "ready"
        except ValueError as error:
            state = str(error).removeprefix(f"{name}: ").removeprefix(path).strip()
        table.add_row(name, path, state)
    console.print(table)


def check_tokenizer(name: str, path: str, tokenizer: DialogueTokenizer, data: str) -> None:
    """Raise EvalError unless the model of run directory `path` was trained with the tokenizer of `data`."""
    own = Path(path) / "model" / MODEL_FILE
    if not own.is_file() or own.read_bytes() != tokenizer.model_bytes:
        found = f"{own} does not exist" if not own.is_file() else f"{own} is another tokenizer"
        raise EvalError(f"{name}: {found}, expected that of data: {data}; evaluate a model on its own data")


def check_fits(
    name: str, path: str, config: ModelConfig, tokenizer: DialogueTokenizer, recipe: EvalRecipe, row_length: int
) -> None:
    """Raise EvalError if a model was trained with another tokenizer or has a max_length that is too small."""
    check_tokenizer(name, path, tokenizer, recipe.data)
    if problem := too_long(name, path, config, recipe, row_length):
        raise EvalError(problem)


def too_long(name: str, path: str, config: ModelConfig, recipe: EvalRecipe, row_length: int) -> str | None:
    """The error message for a max_length that is too small for the recipe; None if it is sufficient."""
    longest = max(row_length, recipe.contexts.max_prompt_tokens + recipe.replies.max_new_tokens)
    if longest <= config.max_length:
        return None
    return (
        f"{name}: max_length of {path} is {config.max_length} tokens, and {longest} are asked for "
        f"(rows of {row_length}; contexts.max_prompt_tokens + replies.max_new_tokens)"
    )


def _min_messages_that_fits(dialogues: Sequence[Dialogue], asked: int) -> int | None:
    """The largest min_messages below `asked` that gives the two contexts that an evaluation needs."""
    return next((n for n in range(asked - 1, 0, -1) if len(human_texts(dialogues, n)) >= 2), None)


def fit_counts(recipe: EvalRecipe, n_contexts: int, n_replies: int) -> tuple[EvalRecipe, list[str]]:
    """Lower counts of the recipe to what the held-out dialogues allow; returns a line for each lowered count.

    `n_contexts`: number of contexts; `n_replies`: number of their distinct human replies. Raises EvalError if there is
    nothing to evaluate on.
    """
    if n_contexts < 2:
        raise EvalError(
            f"{n_contexts} contexts found, at least 2 are needed (one a held-out dialogue whose character answers "
            f"somebody after {recipe.contexts.min_messages} messages); hold out more dialogues"
        )
    if recipe.ranking is not None and n_replies < 2:
        raise EvalError("ranking: all held-out replies are the same text; hold out more dialogues, or remove ranking")
    limits = {"n_contexts": (n_contexts, "contexts"), "n_distractors": (n_replies - 1, "other replies")}
    changed, lines = {}, []
    for part in ("replies", "ranking", "user_sensitivity"):
        section = getattr(recipe, part)
        lowered = {}
        for key, (limit, what) in limits.items():
            wanted = getattr(section, key, 0)
            if wanted > limit:
                lowered[key] = limit
                lines.append(f"{part}.{key}: {wanted} asked for, {limit} {what} found held out; {limit} are used")
        if lowered:
            changed[part] = section.model_copy(update=lowered)
    return recipe.model_copy(update=changed), lines
