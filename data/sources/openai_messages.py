"""Conversations in the format of the OpenAI chat API: {"messages": [{"role": ..., "content": ...}, ...]}."""

from typing import Literal

from data.sources.json_source import JsonSource
from data.sources.role_format import RoleFormat


class OpenaiMessagesFormat(RoleFormat):
    """A conversation a record."""

    kind: Literal["openai_messages"]


class OpenaiMessagesSource(OpenaiMessagesFormat, JsonSource):
    """Files with a conversation a line, or a .json list of them."""

    kind: Literal["openai_messages"]
