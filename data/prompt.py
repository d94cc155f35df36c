"""Prompt templates: Prompt Poet files to the tokens of the dialogue format. The public names, and two commands:

python -m data.prompt check recipes/templates/group_chat.yml.j2
python -m data.prompt reuse chitchat:chitchat-dataset qmsum:corpora/qmsum
"""

from data.message_encoder import MessageEncoder
from data.prompt_parts import Section, TemplatePart, role_messages
from data.prompt_template import (
    DEFAULT_TEMPLATE,
    ROLES,
    PromptPart,
    PromptTemplate,
    RenderedPrompt,
    conversation_values,
)
from data.prompt_values import PromptError

__all__ = [
    "DEFAULT_TEMPLATE",
    "ROLES",
    "MessageEncoder",
    "PromptError",
    "PromptPart",
    "PromptTemplate",
    "RenderedPrompt",
    "Section",
    "TemplatePart",
    "conversation_values",
    "role_messages",
]
