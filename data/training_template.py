"""A prompt template as a recipe names it: dialogues are trained as a prompt of that template will show them."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import jinja2
from pydantic import Field, model_validator

from data.dialogue import Dialogue
from data.prompt_jinja import sources
from data.prompt_template import PromptTemplate
from data.prompt_values import PromptError
from recipes.loader import Section


class TrainingTemplate(Section):
    """The template gets `messages`, `character`, `metadata` (the dialogue's, after scrubbing) and `values`. It may add
    parts, such as a definition of the character; a dialogue of which it leaves out or changes a message is bad."""

    path: str  # a Prompt Poet template; what it includes lies beside it
    values: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_a_template(self) -> Self:
        list(self.files())
        return self

    def apply(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue as the template says it. Raises PromptError where the two do not fit."""
        return _compiled(self.path).dialogue(dialogue, {"metadata": dialogue.metadata, **self.values})

    def files(self) -> Iterator[Path]:
        """The template's file and those that it includes. Raises PromptError where one is not there or is none."""
        template = _compiled(self.path)
        try:
            for name, _ in sources(template.environment, template.source, template.name):
                yield Path(name)
        except jinja2.TemplateNotFound as error:
            raise PromptError(f"{self.path}: it includes {error.name}, which is not in its folder") from None
        except jinja2.TemplateError as error:
            raise PromptError(f"{self.path}: {error}") from None


@lru_cache(8)
def _compiled(path: str) -> PromptTemplate:
    return PromptTemplate.load(path)
