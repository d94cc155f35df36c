"""Every field has its effect, has none, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from serving_export.server.protocol import RequestError, parse_request

MESSAGES = [{"role": "user", "content": "hi"}]


def parse(**fields: Any) -> Any:
    return parse_request({"messages": MESSAGES, **fields})


def test_values() -> None:
    request = parse(
        model="m", temperature=0, top_p=0.5, top_k=-1, seed=3, n=2, stop="x", max_tokens=5, stream=True,
        stream_options={"include_usage": True}, character="Ann", cache_salt="s",
    )  # fmt: skip
    assert request.stop == ["x"]
    assert request.include_usage
    assert (request.temperature, request.top_k, request.n, request.max_tokens) == (0, -1, 2, 5)


def test_null_means_unset() -> None:
    request = parse(temperature=None, n=None, stop=None, stream=None, max_tokens=None, stream_options=None)
    assert request == parse()


def test_fields_without_effect_are_accepted() -> None:
    parse(frequency_penalty=0, presence_penalty=0.0, logit_bias={}, logprobs=False, tools=[], tool_choice="auto")
    parse(user="u", metadata={"a": "b"}, response_format={"type": "text"}, store=False)
    reply = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "tool_calls": None}
    parse_request({"messages": [reply]})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("reasoning_effort", "high"),
        ("store", True),
        ("frequency_penalty", False),
        ("best_of", 2),
        ("tempreature", 1),
        ("temperature", 2.5),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("n", 0),
        ("n", 17),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_completion_tokens", -1),
        ("seed", "a"),
        ("seed", 2**63),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("character", 5),
        ("messages", []),
        ("messages", "hi"),
    ],
)
def test_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**{field: value})
    body = caught.value.body()["error"]
    assert body["param"] == field
    assert body["message"].startswith(field + ":")
    assert body["type"] == "invalid_request_error"
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "hi"}, "messages[1].role"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": "x", "name": 5}, "messages[1].name"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]}, "messages[1]"),
        ({"role": "user", "content": "x", "nmae": "Bob"}, "messages[1]"),
        ("hi", "messages[1]"),
    ],
)
def test_refused_messages(message: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request({"messages": [*MESSAGES, message]})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ],
)
def test_refused_parts(fields: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("body", [[], "x", None, 5])
def test_body_is_an_object(body: object) -> None:
    with pytest.raises(RequestError, match="expected a JSON object"):
        parse_request(body)
