"""A prompt template as a recipe names it: dialogues are trained as a prompt of that template will show them."""

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
    parts, such as a definition of the character; a dialogue of which it leaves out or changes a message is bad."""

    path: Location  # a Prompt Poet template; what it includes lies beside it
    values: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_a_template(self) -> Self:
        self.files()
        return self

    def apply(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue as the template says it. Raises PromptError where the two do not fit."""
        return _compiled(self.path).dialogue(dialogue, {"metadata": dialogue.metadata, **self.values})

    def files(self) -> list[Path]:
        """The template's file and those that it includes. Raises PromptError where one is not there or is none."""
        return [Path(name) for name, _ in _compiled(self.path).sources()]


@lru_cache(8)
def _compiled(path: str) -> PromptTemplate:
    return PromptTemplate.load(path)
