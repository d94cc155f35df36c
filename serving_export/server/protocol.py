"""The OpenAI chat-completions protocol: fields of a request, and the JSON of answers and errors.

An unsupported field that would change the answer is rejected by name; one without effect is accepted.
"""

from __future__ import annotations

import reprlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

# Unsupported fields of the protocol with the values that have no effect; any other value is rejected.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# Labels of a request, which never change an answer: strings, and an object of strings.
_LABELS = frozenset({"prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user"})
_LABEL_OBJECT = "metadata"
MAX_MESSAGES = 10_000
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 80
# Keys of a reply that clients send back.
_NEUTRAL_IN_MESSAGE = frozenset({"annotations", "audio", "function_call", "reasoning_content", "refusal", "tool_calls"})

Stop = Annotated[str, Field(min_length=1)]


class RequestError(ValueError):
    """An invalid request: `param` is the field, `status` the HTTP status."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's format."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """`include_usage` adds a chunk with the usage before `[DONE]`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatMessage(BaseModel):
    """One message. The speaker is `name`, or depends on `role` if there is no name."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _no_tools(self) -> ChatMessage:
        for key, value in (self.model_extra or {}).items():
            if key not in _NEUTRAL_IN_MESSAGE or value not in (None, []):
                raise ValueError(f"{key} is not supported in a message; expected role, content and name")
        return self


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. `character`, `cache_salt`, `top_k` and `truncation` extend the protocol.

    `truncation` as in OpenAI's Responses API: "auto" drops the oldest messages of a conversation that is too long.
    """

    model_config = ConfigDict(extra="allow")
    messages: Annotated[list[ChatMessage], Field(min_length=1), FailFast()]
    model: str | None = None
    character: str | None = None
    cache_salt: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stop: Annotated[list[Stop], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_more(cls, stop: object) -> object:
        return [] if stop is None else [stop] if isinstance(stop, str) else stop

    @field_validator("n", "stream", mode="before")
    @classmethod
    def _null_is_unset(cls, value: object, info: Any) -> object:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def longest_reply(self) -> int | None:
        """The requested limit of tokens of a reply."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def parse_request(content: object) -> ChatRequest:
    """Validate a JSON body. Raises RequestError naming the first invalid field."""
    if not isinstance(content, dict):
        raise RequestError(f"the body is {type(content).__name__}; expected a JSON object")
    messages = content.get("messages")
    if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
        message = f"messages: {len(messages):,} messages; at most {MAX_MESSAGES:,} are accepted; drop old ones"
        raise RequestError(message, "messages", "context_length_exceeded")
    try:
        request = ChatRequest.model_validate(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        param = _dotted(first["loc"])
        found = "" if first["type"] == "missing" else f", found {shown(first['input'])}"
        raise RequestError(f"{param}: {first['msg'].removeprefix('Value error, ')}{found}", param) from None
    for key, value in (request.model_extra or {}).items():
        _check_without_effect(key, value)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options: only allowed when stream is true", "stream_options")
    both = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(both) > 1:
        raise RequestError("max_tokens: differs from max_completion_tokens; give one of them", "max_tokens")
    return request


def _check_without_effect(key: str, value: Any) -> None:
    if key in _LABELS or key == _LABEL_OBJECT:
        _check_label(key, value)
        return
    if key not in _NEUTRAL:
        raise RequestError(f"{key}: unknown field", key, "unknown_parameter")
    # `1 == True` in Python, so a bool only matches a bool
    if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[key]):
        raise RequestError(
            f"{key}: not supported by this server, and {shown(value)} would change the answer; leave it out",
            key,
            "unsupported_parameter",
        )


def _check_label(key: str, value: Any) -> None:
    if value is None or (key in _LABELS and isinstance(value, str)):
        return
    if key == _LABEL_OBJECT and isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return
    expected = "text" if key in _LABELS else "an object of texts"
    raise RequestError(f"{key}: expected {expected}, found {shown(value)}", key)


def shown(value: object) -> str:
    """A value for an error message, shortened; the cost does not depend on its length."""
    return _SHOWN.repr(value)


def _dotted(location: tuple[int | str, ...]) -> str:
    """messages[0].content from ("messages", 0, "content", "str"), without the names that pydantic appends."""
    out = ""
    for part in location:
        if isinstance(part, int):
            out += f"[{part}]"
        elif "[" in part or part in ("str", "dict"):
            break
        else:
            out += f".{part}" if out else part
    return out


def completion_head(model: str, n_left_out: int | None = None) -> dict[str, Any]:
    """What all bodies of one answer share; `n_left_out` is None for a request without truncation."""
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    return head if n_left_out is None else {**head, "messages_left_out": n_left_out}


def completion_body(
    head: Mapping[str, Any], texts_and_reasons: Sequence[tuple[str, str]], usage: Mapping[str, Any]
) -> dict[str, Any]:
    """A whole answer; one (text, finish_reason) a choice."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        for index, (text, reason) in enumerate(texts_and_reasons)
    ]
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage}


def completion_chunk(
    head: Mapping[str, Any], index: int, delta: Mapping[str, str], finish_reason: str | None, with_usage_field: bool
) -> dict[str, Any]:
    """A chunk of choice `index`; `with_usage_field`: with `"usage": null`, if a usage chunk follows at the end."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    body = {**head, "object": "chat.completion.chunk", "choices": [choice]}
    return {**body, "usage": None} if with_usage_field else body


def usage_chunk(head: Mapping[str, Any], usage: Mapping[str, Any]) -> dict[str, Any]:
    """The last chunk: no choice, the usage."""
    return {**head, "object": "chat.completion.chunk", "choices": [], "usage": usage}


def usage(n_prompt: int, n_completion: int, n_cached: int) -> dict[str, Any]:
    """Token counts; the cached tokens are included in the prompt's."""
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }
