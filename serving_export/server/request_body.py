"""Read and parse the body of a chat request. Its size is limited while reading; parsing runs off the event loop."""

from __future__ import annotations

import json
import math
import re

from starlette.requests import Request

from serving_export.server.protocol import ChatRequest, RequestError, parse_request

MAX_BODY_BYTES = 16 * 2**20
# JSON of real text has 3 to 12 bytes a token, so a larger body does not fit the model's context.
_BYTES_PER_TOKEN, _SMALLEST_LIMIT = 32, 2**19
MAX_DIGITS = 4000  # of an integer; Python converts at most 4,300
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def longest_body(max_length: int) -> int:
    """Most bytes of a request to a model of `max_length` tokens."""
    return min(max(_BYTES_PER_TOKEN * max_length, _SMALLEST_LIMIT), MAX_BODY_BYTES)


async def read_body(request: Request, max_length: int) -> bytes:
    """The whole body. Beyond `longest_body` it is read but not kept, so that the client receives the error.

    Raises RequestError, and ClientDisconnect if the client disconnects before the end.
    """
    limit = longest_body(max_length)
    announced = request.headers.get("content-length", "")
    n_bytes = int(announced) if announced.isdecimal() else 0
    if n_bytes > MAX_BODY_BYTES:
        raise RequestError(f"the body has {n_bytes:,} bytes; at most {MAX_BODY_BYTES:,} are accepted", status=413)
    chunks: list[bytes] = []
    n_bytes = 0
    async for chunk in request.stream():
        n_bytes += len(chunk)
        if n_bytes > MAX_BODY_BYTES:
            raise RequestError(f"the body is longer than {MAX_BODY_BYTES:,} bytes", status=413)
        if n_bytes <= limit:
            chunks.append(chunk)
        else:
            chunks.clear()
    if n_bytes > limit:
        raise RequestError(
            f"messages: the body has {n_bytes:,} bytes; at most {limit:,} are accepted for a model of {max_length:,} "
            "tokens; drop old messages",
            "messages",
            "context_length_exceeded",
        )
    return b"".join(chunks)


def parse_body(body: bytes) -> ChatRequest:
    """Parse and validate a body. Too slow for the event loop. Raises RequestError."""
    try:
        text = body.decode("utf-8-sig")
        content = json.loads(text, parse_int=_integer)
        if _HALF_PAIR.search(text):  # an escaped half of a surrogate pair is a valid str but not valid Unicode
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON of Unicode text: {error}") from None
    return parse_request(content)


def _integer(digits: str) -> int | float:
    """An integer; with more than MAX_DIGITS digits infinity, so that its field is rejected by name."""
    return int(digits) if len(digits) <= MAX_DIGITS else math.copysign(math.inf, -1 if digits[0] == "-" else 1)
