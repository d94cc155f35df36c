"""Prompt templates in the Prompt Poet dialect (Jinja2 that renders YAML parts), rendered to tokens of the dialogue
format.

A template has two levels. `parts` is Prompt Poet's: any roles, any contents, no tokenizer. `render` converts parts to
messages of the dialogue format, and requires a speaker for each and a last part that is the reply.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from data.format.dialogue import Dialogue, DialogueError, Message
from data.format.encode import Encoder
from data.format.message_encoder import MessageEncoder
from data.prompt.jinja import RESERVED, TemplateEnvironment, template_sources
from data.prompt.parts import PartReader, TemplatePart
from data.prompt.truncation import CONTEXT_COST, planned_parts, surviving_parts
from data.prompt.values import PromptError, Texts, current_texts, plain
from recipes.stage_errors import describe_os_error

ROLES = ("system", "user", "assistant")

DEFAULT_TEMPLATE = """\
{# The dialogue format: an optional scene, the conversation, and the character whose turn it is. #}
{% if scene %}
- name: scene
  role: system
  content: {{ scene }}
{% endif %}
{% for message in messages %}
- name: message
  role: {{ "assistant" if message.speaker == character else "user" }}
  speaker: {{ message.speaker }}
  content: {{ message.text }}
  truncation_priority: 1
{% endfor %}
- name: reply
  role: assistant
  speaker: {{ character }}
  content: ""
"""


class PromptPart(NamedTuple):
    """One message of a prompt. The last part is the reply to generate, with text None."""

    name: str
    role: str
    speaker: str
    text: str | None
    truncation_priority: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The parts after truncation, the tokens to generate from, and the number of removed parts."""

    parts: tuple[PromptPart, ...]
    tokens: list[int]
    n_removed: int

    @property
    def character(self) -> str:
        """The speaker of the reply."""
        return self.parts[-1].speaker

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation after truncation, without the reply."""
        return tuple(Message(part.speaker, part.text) for part in self.parts if part.text is not None)


def conversation_values(messages: Sequence[Message], character: str, scene: str = "") -> dict[str, Any]:
    """Values for the default template."""
    return {"messages": messages, "character": character, "scene": scene}


class PromptTemplate:
    """A compiled template.

    A part has `name`, `role` (default user), `content` or `sections`, and optionally `truncation_priority` (0, the
    default, is never cut; higher is cut first), `expected_template_data_keys`, and our extension `speaker`. To render
    tokens, a part needs the role system, user or assistant, and a speaker: the key, or the beginning of the content, as
    in "{{ user }}: {{ text }}", or the narrator for the role system. The last part must have no text after its speaker,
    as in "{{ character }}:"; it is the reply to generate.

    `functions` can be called by the template, in addition to Jinja's own. Not thread-safe.
    """

    def __init__(
        self,
        source: str = DEFAULT_TEMPLATE,
        name: str = "template",
        directory: Path | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self.environment = TemplateEnvironment(directory, functions or {})
        self._function_names = frozenset(functions or ())
        self._reader = PartReader(name)
        try:
            self._template = self.environment.from_string(source)
        except jinja2.TemplateError as error:
            raise PromptError(_jinja_message(error, name)) from None

    @classmethod
    def load(cls, path: Path | str, functions: Mapping[str, Callable[..., Any]] | None = None) -> "PromptTemplate":
        """The template in a file; `{% include %}` is relative to the file's directory."""
        path = Path(path)
        try:
            source = path.read_text(encoding="utf-8")
        except OSError as error:
            raise PromptError(f"{describe_os_error(error, path)}; expected a Prompt Poet template") from None
        except UnicodeDecodeError as error:
            raise PromptError(f"{path}: byte {error.start} is not UTF-8; save the template as UTF-8") from None
        return cls(source, str(path), path.parent, functions)

    def sources(self) -> Iterator[tuple[str, jinja2.nodes.Template]]:
        """Name and syntax tree of the template and of every file that it includes or imports by name. Raises
        PromptError for a file that is missing or invalid."""
        try:
            yield from template_sources(self.environment, self.source, self.name)
        except jinja2.TemplateNotFound as error:
            raise PromptError(f"{self.name}: it includes {error.name}, which is not in its folder") from None
        except jinja2.TemplateError as error:
            raise PromptError(_jinja_message(error, self.name)) from None

    def parts(
        self,
        values: Mapping[str, Any],
        token_limit: int | None = None,
        spans: list[list[tuple[str, int, str]]] | None = None,
    ) -> tuple[TemplatePart, ...]:
        """The parts for `values` (text, numbers, Messages, lists and mappings), as in Prompt Poet.

        `token_limit` is only passed to the template (-1 for None). Appends to `spans`, for each part, the values in it:
        the template that printed it, the line, the text. Raises PromptError for an invalid template or values.
        """
        reserved = [key for key in RESERVED if key in values]
        if reserved:
            raise PromptError(f"{self.name}: the value {reserved[0]} is reserved, every template has it; rename yours")
        texts = Texts()
        context = {str(key): plain(value, str(key)) for key, value in values.items()}
        context["token_limit"] = -1 if token_limit is None else token_limit
        token = current_texts.set(texts)
        try:
            rendered = self._template.render(context)
        except jinja2.TemplateError as error:
            raise PromptError(_jinja_message(error, self.name)) from None
        except PromptError:
            raise
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RecursionError) as error:
            raise PromptError(f"{self.name}: {error}") from None
        finally:
            current_texts.reset(token)
        known = frozenset((*context, *self._function_names, *RESERVED))
        numbers: list[list[int]] | None = None if spans is None else []
        try:
            parts = self._reader.read(rendered, texts, known, numbers)
        except PromptError as error:
            raise error if str(error).startswith(self.name) else PromptError(f"{self.name}: {error}") from None
        if spans is not None and numbers is not None:
            places = self.environment.places
            spans += [[(*places[texts.places[i]], texts.expand(texts.texts[i])) for i in span] for span in numbers]
        return parts

    def render(
        self,
        values: Mapping[str, Any],
        tokenizer: Encoder | MessageEncoder,
        token_limit: int | None = None,
        truncation_step: int | None = None,
        context_cost: float | None = None,
    ) -> RenderedPrompt:
        """The prompt for `values`, of at most `token_limit` tokens. Keep a MessageEncoder from turn to turn to tokenize
        each message once.

        Truncation cuts rarely and deeply, so that the prefix cache stays valid between cuts: either the average cost is
        `context_cost` of the context (default a quarter), or cuts are Prompt Poet's `truncation_step` tokens. Raises
        PromptError for an invalid template or values, and if the parts that are never cut exceed the limit.
        """
        encoder = tokenizer if isinstance(tokenizer, MessageEncoder) else MessageEncoder(tokenizer)
        _check_truncation(token_limit, truncation_step, context_cost)
        parts = self._messages(self.parts(values, token_limit), encoder)
        lengths = [len(part.tokens) for part in parts]
        kept = parts
        if token_limit is not None:
            priorities = [part.truncation_priority for part in parts]
            room = token_limit - 1  # 1 for <bos>
            if truncation_step is not None:
                numbers = surviving_parts(lengths, priorities, room, truncation_step)
            else:
                cost = CONTEXT_COST if context_cost is None else context_cost
                numbers = planned_parts(lengths, priorities, room, cost)
            kept = [parts[i] for i in numbers]
        tokens = [encoder.tokenizer.bos_id]
        for part in kept:
            tokens += part.tokens
        if token_limit is not None and len(tokens) > token_limit:
            raise PromptError(
                f"{self.name}: {len(tokens)} tokens remain after cutting everything that may be cut, token_limit is "
                f"{token_limit}; raise it or give more parts a truncation_priority"
            )
        return RenderedPrompt(tuple(kept), tokens, len(parts) - len(kept))

    def dialogue(self, dialogue: Dialogue, values: Mapping[str, Any] | None = None) -> Dialogue:
        """The dialogue as the template renders it, for training and evaluation: up to any reply, `encode_dialogue` of
        it begins with the ids of the prompt that serving would render there.

        The template gets `messages`, `character` and `values`. Raises PromptError if it omits or changes a message, or
        ends with another character's reply. Parts that it adds (such as definitions) have no time, and are trained only
        if the character says them.
        """
        given = conversation_values(dialogue.messages, dialogue.character) | dict(values or {})
        parts = self.parts(given)
        *said, last = [self._message(part, number) for number, part in enumerate(parts)]
        if last.text:
            said.append(last)  # no reply follows
        elif last.speaker != dialogue.character:
            raise PromptError(
                f"{self.name}: dialogue {dialogue.id!r}: the template's reply is by {last.speaker!r}, expected its "
                f"character {dialogue.character!r}"
            )
        unmatched = list(reversed(dialogue.messages))
        messages = []
        for message in said:
            if unmatched and (message.speaker, message.text) == (unmatched[-1].speaker, unmatched[-1].text):
                message = unmatched.pop()
            messages.append(message)
        if unmatched:
            number = len(dialogue.messages) - len(unmatched)
            raise PromptError(
                f"{self.name}: dialogue {dialogue.id!r}: message {number} ({unmatched[-1].speaker}: "
                f"{unmatched[-1].text[:40]!r}) is left out or changed; training needs every message unchanged"
            )
        return replace(dialogue, messages=tuple(messages))

    def _message(self, part: TemplatePart, number: int) -> Message:
        where = f"{self.name}: part {number} ({part.name})"
        if part.role not in ROLES:
            raise PromptError(f"{where}: role is {part.role!r}, expected {', '.join(ROLES)}")
        if part.text is None:
            raise PromptError(f"{where}: content is a {type(part.content).__name__}; only text can be tokens")
        if part.speaker is None:
            raise PromptError(f'{where}: it has no speaker; give one, or begin the content with "name: "')
        try:
            return Message(part.speaker, part.text)
        except DialogueError as error:
            raise PromptError(f"{where}: {error}") from None

    def _messages(self, parts: Sequence[TemplatePart], encoder: MessageEncoder) -> list[PromptPart]:
        """The parts as messages with their tokens, the last as the reply to generate."""
        messages = []
        *said, last = parts
        for number, part in enumerate(said):
            name, role, _, priority, _, speaker, text = part
            if not text or speaker is None or role not in ROLES:
                self._message(part, number)  # raises, unless only the text is empty
                assert speaker is not None and text is not None
            try:
                tokens = encoder.message(speaker, text)
            except DialogueError as error:
                raise PromptError(f"{self.name}: part {number} ({name}): {error}") from None
            messages.append(PromptPart(name, role, speaker, text, priority, tokens))
        reply = self._message(last, len(parts) - 1)
        if reply.text:
            raise PromptError(
                f"{self.name}: part {len(parts) - 1} ({last.name}): the last part has text; expected the reply to "
                'generate, as in "{{ character }}:"'
            )
        messages.append(PromptPart(last.name, last.role, reply.speaker, None, 0, encoder.opening(reply.speaker)))
        return messages


def _check_truncation(token_limit: int | None, step: int | None, cost: float | None) -> None:
    if token_limit is None and not (step is None and cost is None):
        raise PromptError("truncation_step and context_cost need a token_limit")
    if step is not None and cost is not None:
        raise PromptError("found truncation_step and context_cost, expected one of them")
    if (token_limit is not None and token_limit < 1) or (step is not None and step < 1):
        raise PromptError(f"token_limit {token_limit} and truncation_step {step}: expected 1 or more")
    if cost is not None and not 0 <= cost <= 0.5:
        raise PromptError(f"context_cost {cost}: expected a share from 0 (cut no more than needed) to 0.5")


def _jinja_message(error: jinja2.TemplateError, template: str) -> str:
    line = getattr(error, "lineno", None)
    name = getattr(error, "filename", None) or template
    return f"{name}: {f'line {line}: ' if line else ''}{error.message or type(error).__name__}"
