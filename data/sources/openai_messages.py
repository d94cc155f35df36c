"""Conversations in the format of the OpenAI chat API: {"messages": [{"role": ..., "content": ...}, ...]}."""

from typing import Literal

from data.sources.json_source import JsonSource
from data.sources.role_format import RoleFormat


class OpenaiMessagesFormat(RoleFormat):
    """One conversation per record."""

    kind: Literal["openai_messages"]


class OpenaiMessagesSource(OpenaiMessagesFormat, JsonSource):
    """Files with one conversation per line, or a .json list of them."""

    kind: Literal["openai_messages"]
