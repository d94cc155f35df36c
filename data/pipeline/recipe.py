"""The recipe of data.prepare. Not part of the entry point, so that other processes can unpickle its classes."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from data.clean.near_duplicates import NearDuplicates
from data.clean.records import Filters
from data.clean.scrub import Scrub
from data.clean.split import SplitRule
from data.format.tokenizer import MODEL_FILE
from data.pipeline.executor import Executor, LocalSettings
from data.pipeline.tokenizer_stage import TokenizerFile, TokenizerRule
from data.prompt.training import TrainingTemplate
from data.sources.registry import AnySource
from recipes.loader import Section
from recipes.plan_check import PlanCheck
from recipes.run_identity import Location, MayChange
from recipes.run_inputs import names_below


class DataRecipe(Section):
    """A recipe of data.prepare. The result does not depend on the executor or the number of tasks."""

    stage: Literal["data"]
    run_dir: Location
    seed: int
    sources: tuple[AnySource, ...] = Field(min_length=1)
    split: SplitRule
    tokenizer: TokenizerRule
    row_length: int = Field(ge=16)
    # A dialogue longer than a row becomes several documents. Later ones begin with context without loss: the narrator's
    # opening and the newest messages before the split, up to this fraction of a row. 0: none.
    context_fraction: float = Field(default=0.25, ge=0, le=0.5)
    filters: Filters = Filters()
    # Replace personal data in texts, names, ids and metadata by placeholders and hashes; null: keep it.
    scrub: Scrub | None = None
    # Exact duplicates are always removed; null keeps near-duplicates.
    near_duplicates: NearDuplicates | None = None
    # A template that renders the dialogues as prompts will be; null: the default template.
    prompt_template: TrainingTemplate | None = None
    # A partner who has not written after this time is gone (engagement label 0); null: any later message counts.
    continue_within_seconds: float | None = Field(gt=0)
    # A larger fraction of quarantined records of any one source is an error.
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    # Local processes, Slurm or Ray.
    executor: MayChange[Executor] = LocalSettings(kind="local")
    # Tasks of each stage; null: as many as workers.
    tasks: MayChange[int | None] = Field(default=None, ge=1)
    # Size of a unit, which is read and tokenized at once, and not repeated after an interruption.
    unit_bytes: int = Field(default=64 << 20, ge=1)
    # Tokens that are packed at once; limits the memory of a task.
    pack_tokens: int = Field(default=16_000_000, ge=1)
    rows_per_shard: int = Field(default=65_536, ge=1)

    @property
    def n_tasks(self) -> int:
        """The number of tasks of a parallel stage."""
        return self.tasks or self.executor.workers or 1

    @property
    def context_tokens(self) -> int:
        """The maximum number of context tokens that a document repeats."""
        return int(self.context_fraction * self.row_length)

    def inputs(self) -> dict[str, Path]:
        """The files that it reads. Raises SourceError if a source is missing."""
        found: dict[str, Path] = {}
        for number, source in enumerate(self.sources):
            key, files = f"sources.{number}", source.inputs()
            location = getattr(source, "path", None)  # None for an installed package
            found |= names_below(key, location, files) if location else {f"{key}: {path.name}": path for path in files}
        if isinstance(self.tokenizer, TokenizerFile):
            path = Path(self.tokenizer.path)
            found["tokenizer"] = path / MODEL_FILE if path.is_dir() else path
        if self.prompt_template:
            template = self.prompt_template
            found |= names_below("prompt_template", Path(template.path).parent, template.files())
        return found

    def check_plan(self, plan: PlanCheck) -> None:
        """Raise errors of the sources, and of an empty side, before anything runs."""
        plan.data(self.run_dir)

    @model_validator(mode="after")
    def _tasks_are_said(self) -> Self:
        if self.tasks is None and self.executor.workers is None:
            raise ValueError(f"tasks: expected a number where executor.kind {self.executor.kind} has no workers")
        return self
