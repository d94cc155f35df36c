"""The sources a recipe can name. A new corpus: a module with a DialogueSource, and a line here."""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from data.sources.chat_jsonl import ChatJsonlSource
from data.sources.chitchat import ChitchatSource
from data.sources.hh_rlhf import HhRlhfSource
from data.sources.source import DialogueSource

SOURCES: dict[str, type[DialogueSource]] = {
    "chat_jsonl": ChatJsonlSource,
    "chitchat": ChitchatSource,
    "hh_rlhf": HhRlhfSource,
}

if TYPE_CHECKING:
    AnySource = DialogueSource
else:
    AnySource = Annotated[Union[tuple(SOURCES.values())], Field(discriminator="kind")]  # noqa: UP007 (made at run time)
