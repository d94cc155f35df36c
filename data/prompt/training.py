"""A prompt template in a data recipe: dialogues are trained as prompts of that template."""

from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from data.format.dialogue import Dialogue
from data.prompt.template import PromptTemplate
from recipes.loader import Section
from recipes.run_identity import Location


class TrainingTemplate(Section):
    """The template gets `messages`, `character`, `metadata` (the dialogue's, after scrubbing) and `values`. It may add
    parts, such as a character definition; a dialogue with a message that it omits or changes is bad."""

    path: Location  # a Prompt Poet template; includes are relative to its folder
    values: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_a_template(self) -> Self:
        self.files()
        return self

    def apply(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue as the template renders it. Raises PromptError if they do not match."""
        return _compiled(self.path).dialogue(dialogue, {"metadata": dialogue.metadata, **self.values})

    def files(self) -> list[Path]:
        """The template's file and its includes. Raises PromptError for a missing or invalid file."""
        return [Path(name) for name, _ in _compiled(self.path).sources()]


@lru_cache(8)
def _compiled(path: str) -> PromptTemplate:
    return PromptTemplate.load(path)
