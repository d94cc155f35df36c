"""Prompt templates in the Prompt Poet dialect (Jinja2 that renders YAML parts), to the tokens of the dialogue format.

Differences on purpose: Jinja runs sandboxed; a value never enters the YAML source, so no text can add a part, a role
or a key, and every text arrives exactly as it was given; and a part is a message of the dialogue format.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.dialogue import NARRATOR, DialogueError, Encoder, Message, encode_message, speaker_prefix
from data.prompt_truncation import surviving_parts
from recipes.yaml_text import YamlError, parse_yaml

SPACE_MARKER = "<|space|>"  # Prompt Poet's: keeps white space at the edge of a content, which is stripped
ROLES = ("system", "user", "assistant")
_KEYS = ("name", "role", "speaker", "content", "truncation_priority", "expected_template_data_keys")
_PRINT = "_print_value"  # the filter around every expression that a template prints
_NAMED = re.compile(r"([^:\n]+):(?:[ \t\n]+|$)(.*)", re.DOTALL)

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


class PromptError(ValueError):
    """A template or values that make no prompt; the message names the template, the part and what was expected."""


@dataclass(frozen=True, slots=True)
class PromptPart:
    """One message of a prompt. The last part is the reply to generate: its text is None."""

    name: str
    role: str
    speaker: str
    text: str | None
    truncation_priority: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The parts that remain, the tokens to generate from, and how many parts truncation removed."""

    parts: tuple[PromptPart, ...]
    tokens: list[int]
    n_removed: int

    @property
    def character(self) -> str:
        """Who is to speak."""
        return self.parts[-1].speaker

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation that remains, without the reply."""
        return tuple(Message(part.speaker, part.text) for part in self.parts if part.text is not None)


def conversation_values(messages: Sequence[Message], character: str, scene: str = "") -> dict[str, Any]:
    """The values of the default template."""
    return {"messages": messages, "character": character, "scene": scene}


class PromptTemplate:
    """A compiled template.

    A part has `name`, `role` (system, user or assistant), `content`, optionally `speaker` and `truncation_priority`
    (0, the default, is never cut; higher is cut first). Without `speaker`, the content says it, as in
    "{{ user }}: {{ text }}", and the role system is the narrator. The last part has no text after its speaker, as in
    "{{ character }}:"; it is the reply to generate.
    """

    def __init__(self, source: str = DEFAULT_TEMPLATE, name: str = "template", directory: Path | None = None) -> None:
        loader = jinja2.FileSystemLoader(directory) if directory is not None else None
        self.name = name
        self.source = source
        self._environment = _Environment(
            loader=loader,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,  # a section ends with its line
            autoescape=False,
        )
        self._environment.filters[_PRINT] = lambda value: _current_texts.get()(value)
        self._environment.globals["escape_special_characters"] = lambda text: text  # nothing needs it here
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateError as error:
            raise PromptError(f"{name}: {_jinja_message(error)}") from None

    @classmethod
    def load(cls, path: Path | str) -> "PromptTemplate":
        """The template of a file; its `{% include %}`s are looked up in the file's directory."""
        path = Path(path)
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"{path}: cannot be read as a template ({error})") from None
        return cls(source, str(path), path.parent)

    def render(
        self,
        values: Mapping[str, Any],
        tokenizer: Encoder,
        token_limit: int | None = None,
        truncation_step: int | None = None,
    ) -> RenderedPrompt:
        """The prompt for `values` (text, numbers, Messages, lists and mappings), of at most `token_limit` tokens.

        Parts are removed in steps of `truncation_step` tokens (default a quarter of the limit), so that between two
        steps the prefix stays the same and a cache of it stays valid. Raises PromptError for a template or values that
        do not fit, and when the parts that are never cut exceed the limit.
        """
        parts = self._parts(values, tokenizer, token_limit)
        lengths = [len(part.tokens) for part in parts]
        kept = list(range(len(parts)))
        if token_limit is not None:
            step = truncation_step if truncation_step is not None else max(1, token_limit // 4)
            if token_limit < 1 or step < 1:
                raise PromptError(f"token_limit {token_limit} and truncation_step {step}: expected 1 or more")
            priorities = [part.truncation_priority for part in parts]
            kept = surviving_parts(lengths, priorities, token_limit - 1, step)  # 1 for <bos>
            n_tokens = 1 + sum(lengths[i] for i in kept)
            if n_tokens > token_limit:
                raise PromptError(
                    f"{self.name}: {n_tokens} tokens remain when everything that may be cut is gone, token_limit is "
                    f"{token_limit}; raise it or give more parts a truncation_priority"
                )
        tokens = [tokenizer.bos_id]
        for i in kept:
            tokens += parts[i].tokens
        return RenderedPrompt(tuple(parts[i] for i in kept), tokens, len(parts) - len(kept))

    def _parts(self, values: Mapping[str, Any], tokenizer: Encoder, token_limit: int | None) -> list[PromptPart]:
        texts = _Texts()
        context = {**{str(key): _plain(value, str(key)) for key, value in values.items()}, "token_limit": token_limit}
        token = _current_texts.set(texts)
        try:
            rendered = self._template.render(context)
        except jinja2.TemplateError as error:
            raise PromptError(f"{self.name}: {_jinja_message(error)}") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            raise PromptError(f"{self.name}: {error}") from None
        finally:
            _current_texts.reset(token)
        if not texts.is_intact(rendered):
            raise PromptError(f"{self.name}: a filter block cuts a value after it is printed; cut the value itself")
        try:
            records = parse_yaml(rendered, self.name).data
        except YamlError as error:
            raise PromptError(f"the YAML that the template renders is broken: {texts.expand(str(error))}") from None
        if not isinstance(records, list) or not records:
            raise PromptError(f"{self.name}: renders {type(records).__name__}, expected a YAML list of parts")
        last = len(records) - 1
        return [
            _part(record, f"{self.name}: part {number}", texts, values, tokenizer, number == last)
            for number, record in enumerate(records)
        ]


def _part(
    record: Any, where: str, texts: "_Texts", values: Mapping[str, Any], tokenizer: Encoder, is_last: bool
) -> PromptPart:
    """A part of the parsed YAML. The speaker is read before values are put in, so no text can name another."""
    if not isinstance(record, dict):
        raise PromptError(f"{where}: found {type(record).__name__}, expected a mapping with name, role and content")
    where = f"{where} ({texts.expand(str(record.get('name', 'unnamed')))})"
    unknown = [texts.expand(str(key)) for key in record if key not in _KEYS]
    if unknown:
        raise PromptError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(_KEYS)}")
    missing = [key for key in record.get("expected_template_data_keys") or [] if texts.expand(str(key)) not in values]
    if missing:
        raise PromptError(f"{where}: the values lack {texts.expand(str(missing[0]))!r}")
    role = texts.expand(str(record.get("role", "user")))
    if role not in ROLES:
        raise PromptError(f"{where}: role is {role!r}, expected {', '.join(ROLES)}")
    priority = texts.expand(str(record.get("truncation_priority", 0)))
    if not re.fullmatch("[0-9]{1,9}", priority):
        raise PromptError(f"{where}: truncation_priority is {priority!r}, expected a whole number, 0 or more")
    content = record.get("content")
    content = "" if content is None else str(content).strip()  # before values are put in: theirs stays
    speaker, text = _speaker_and_text(record, role, content, where)
    is_reply = is_last and not text
    if is_last != is_reply:
        raise PromptError(
            f'{where}: the last part has text; expected the reply to generate, as in "{{{{ character }}}}:"'
        )
    speaker, text = texts.expand(speaker), texts.expand(text.replace(SPACE_MARKER, " "))
    try:
        message = Message(speaker, text)
    except DialogueError as error:
        raise PromptError(f"{where}: {error}") from None
    if is_reply:
        tokens = [tokenizer.message_id, *tokenizer.encode(speaker_prefix(speaker))]
    else:
        tokens = encode_message(tokenizer, message)
    name = texts.expand(str(record.get("name", "")))
    return PromptPart(name, role, speaker, None if is_reply else text, 0 if is_reply else int(priority), tuple(tokens))


def _speaker_and_text(record: Mapping[str, Any], role: str, content: str, where: str) -> tuple[str, str]:
    if record.get("speaker") is not None:
        return str(record["speaker"]), content
    if role == "system":
        return NARRATOR, content
    named = _NAMED.match(content)
    if not named:
        raise PromptError(f'{where}: nobody says it; give it a speaker, or begin the content with "name: "')
    return named[1].strip(), named[2]


class _Texts:
    """The texts of one rendering, each behind a placeholder that nobody can guess: the template's output holds only
    placeholders, and they are exchanged for the texts after the YAML is parsed."""

    def __init__(self) -> None:
        self._nonce = str(secrets.randbits(128))  # digits: filters like `upper` leave them alone
        self._texts: list[str] = []
        self._placeholder = re.compile(f"\ue000{self._nonce}\ue001([0-9]+)\ue002")

    def __call__(self, value: Any) -> str:
        """The placeholder that the template prints for a value."""
        if isinstance(value, jinja2.Undefined):
            str(value)  # raises, naming the variable
        if value is None or isinstance(value, bool):
            value = {None: "", True: "true", False: "false"}[value]
        if isinstance(value, int | float):
            value = str(value)
        if not isinstance(value, str):
            raise TypeError(f"cannot print a {type(value).__name__}; print its texts one by one")
        self._texts.append(value)
        return f"\ue000{self._nonce}\ue001{len(self._texts) - 1}\ue002"

    def expand(self, text: str) -> str:
        """`text` with every placeholder exchanged, also inside texts that the template itself captured."""
        return self._placeholder.sub(lambda match: self.expand(self._texts[int(match[1])]), text)

    def is_intact(self, rendered: str) -> bool:
        """Whether every placeholder in the template's output is whole."""
        return re.search("[\ue000-\ue002]", self._placeholder.sub("", rendered)) is None


_current_texts: ContextVar[_Texts] = ContextVar("texts of the rendering in progress")


class _Environment(ImmutableSandboxedEnvironment):
    """Wraps every expression a template prints, but calls of macros, whose output is the template's own."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        macros = _macro_names(tree)
        for output in tree.find_all(nodes.Output):
            output.nodes = [child if _is_own(child, macros) else _wrapped(child) for child in output.nodes]
        return tree


def _macro_names(tree: nodes.Template) -> set[str]:
    names = {"caller", *(macro.name for macro in tree.find_all(nodes.Macro))}
    names.update(imported.target for imported in tree.find_all(nodes.Import))
    for imported in tree.find_all(nodes.FromImport):
        names.update(name if isinstance(name, str) else name[1] for name in imported.names)
    return names


def _is_own(node: nodes.Expr, macros: set[str]) -> bool:
    if isinstance(node, nodes.TemplateData):
        return True
    if not isinstance(node, nodes.Call):
        return False
    called = node.node.node if isinstance(node.node, nodes.Getattr) else node.node
    return isinstance(called, nodes.Name) and called.name in macros


def _wrapped(node: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, _PRINT, [], [], None, None, lineno=node.lineno)


def _plain(value: Any, key: str) -> Any:
    """The value as plain data, so that a template can reach nothing but data."""
    if isinstance(value, Message):
        return {"speaker": str(value.speaker), "text": str(value.text), "time": value.time}
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, f"{key}.{i}") for i, item in enumerate(value)]
    raise PromptError(f"value {key} is a {type(value).__name__}; expected text, numbers, lists and mappings of them")


def _jinja_message(error: jinja2.TemplateError) -> str:
    line = getattr(error, "lineno", None)
    return f"{f'line {line}: ' if line else ''}{error.message or type(error).__name__}"
