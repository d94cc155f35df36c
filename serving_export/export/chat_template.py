"""OpenAI chat messages as a dialogue, in Python and as the Jinja chat template of other engines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data.format.dialogue import NARRATOR, SPEAKER_END, DialogueError, Message, check_speaker
from data.format.encode import BOS, CONTROL_SURFACES, END, MESSAGE, TEXT_START, WORD_JOINER
from data.sources.chat_message import openai_message
from data.sources.speaker import OPENAI_ROLES, RoleNames, check_user

_TEMPLATE = """\
{#- A dialogue is <bos> and, for each message, <|message|>speaker: text<|end|>. The speaker is the message's name, or
its role's: system -> narrator, user -> `user`, assistant -> `character`; chat_template_kwargs may set these two.
Texts and names are escaped, so none of them can hold a control token. An engine returns a reply with the space that
follows "speaker:", so one leading space of an assistant's content is dropped. -#}
{%- set user = user if user is defined and user else @USER@ -%}
{%- set character = character if character is defined and character else @CHARACTER@ -%}
{%- macro escaped(text) -%}
{{- text@ESCAPE@ -}}
{%- endmacro -%}
{%- macro speaker(name) -%}
{%- if name is not string or not name | trim -%}
{{- raise_exception("a speaker's name must be text that is not blank") -}}
{%- endif -%}
{%- if name != name | trim -%}
{{- raise_exception("a speaker's name may not have white space around it: " ~ name) -}}
{%- endif -%}
{%- if @SPEAKER_END@ in name or "\\n" in name or "\\r" in name -%}
{{- raise_exception("a speaker's name may not contain ':' or a line break: " ~ name) -}}
{%- endif -%}
{{- escaped(name) -}}
{%- endmacro -%}
{%- macro content_of(message) -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] is defined and message['content'] is iterable and message['content'] is not mapping -%}
{%- for content in message['content'] -%}
{%- if content['type'] != "text" -%}
{{- raise_exception("a message's content may hold parts of type text only, found " ~ content['type']) -}}
{%- endif -%}
{{- "\\n" if not loop.first -}}{{- content['text'] -}}
{%- endfor -%}
{%- else -%}
{{- raise_exception("a message's content must be text or a list of text parts") -}}
{%- endif -%}
{%- endmacro -%}
{{- @BOS@ -}}
{%- for message in messages -%}
{%- if message['role'] not in @ROLES@ -%}
{{- raise_exception("a message's role must be system, developer, user or assistant, not '" ~ message['role'] ~ "'") -}}
{%- elif message['name'] is defined and message['name'] is not none -%}
{%- set name = message['name'] -%}
{%- elif message['role'] in ["system", "developer"] -%}
{%- set name = @NARRATOR@ -%}
{%- elif message['role'] == "user" -%}
{%- set name = user -%}
{%- else -%}
{%- set name = character -%}
{%- endif -%}
{%- if message['role'] == "user" and name == @NARRATOR@ -%}
{{- raise_exception("the user may not have the name " ~ name ~ ", whose messages are the scene") -}}
{%- endif -%}
{{- @MESSAGE@ -}}{{- speaker(name) -}}{{- @SPEAKER_END@ -}}
{%- set text = content_of(message) -%}
{%- if message['role'] == "assistant" -%}
{%- set text = text[1:] if text[:1] == @TEXT_START@ else text -%}
{%- endif -%}
{%- if message['role'] == "assistant" and name == character -%}
{#- what SFT trains: transformers' assistant mask marks it -#}
{%- generation -%}{{- @TEXT_START@ -}}{{- escaped(text) -}}{{- @END@ -}}{%- endgeneration -%}
{%- else -%}
{{- @TEXT_START@ -}}{{- escaped(text) -}}{{- @END@ -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- @MESSAGE@ -}}{{- speaker(character) -}}{{- @SPEAKER_END@ -}}
{%- endif -%}
"""


def chat_template(user: str, character: str) -> str:
    """The Jinja chat template of a bundle. The rendered text has the token ids of `encode_prompt(dialogue_of(...))`.

    Except that it drops one leading space of an assistant's content: see `engine_content`.
    """
    check_user(user)
    check_speaker(character)
    broken = [(surface, surface[0] + WORD_JOINER + surface[1:]) for surface in CONTROL_SURFACES]
    # Equal to `escape`: replacing one surface after another works because none contains another, escaped or not.
    steps = [(WORD_JOINER, WORD_JOINER * 2), *broken]
    filters = "".join(f" | replace({_literal(old)}, {_literal(new)})" for old, new in steps)
    literals: dict[str, str | list[str]] = {
        "BOS": BOS, "MESSAGE": MESSAGE, "SPEAKER_END": SPEAKER_END, "TEXT_START": TEXT_START, "END": END,
        "NARRATOR": NARRATOR, "ROLES": list(OPENAI_ROLES), "USER": user, "CHARACTER": character,
    }  # fmt: skip
    values = {name: _literal(value) for name, value in literals.items()} | {"ESCAPE": filters}
    return re.sub("@([A-Z_]+)@", lambda match: values[match[1]], _TEMPLATE)


def dialogue_of(messages: Sequence[Mapping[str, Any]], user: str, character: str) -> list[Message]:
    """OpenAI chat messages as messages of a dialogue, texts unchanged.

    Raises DialogueError with the message's number for an unknown role, an invalid name or content that is not text.
    """
    said = []
    for number, message in enumerate(messages):
        try:
            said.append(openai_message(message, RoleNames(user, character)))
        except DialogueError as error:
            raise DialogueError(f"message {number}: {error}") from None
    return said


def engine_content(text: str, role: str) -> str:
    """The message content that the chat template renders as `text`.

    Stock engines return a reply with the space that follows "speaker:", so the template drops one leading space of an
    assistant's content, and a text that starts with a space needs one more. Our server removes that space from its
    replies, so it does not change the content of messages.
    """
    return " " + text if role == "assistant" and text.startswith(" ") else text


def _literal(value: str | list[str]) -> str:
    """A Jinja literal; characters beyond ASCII are not escaped, since Jinja has no surrogate pairs."""
    return json.dumps(value, ensure_ascii=False)
