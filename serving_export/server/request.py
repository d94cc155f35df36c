"""A request of the engine: one reply to generate, the events that it produces, and why it was refused or failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from model.inference.generate import Sampling
from serving_export.server.detokenizer import Detokenizer

FinishReason = Literal["stop", "length", "cancelled", "error"]


class PromptError(ValueError):
    """A prompt that this engine can never serve."""


class QueueFull(RuntimeError):  # noqa: N818 (reads as what happened)
    """As many requests are waiting as the engine accepts."""


class GenerationFailed(RuntimeError):  # noqa: N818 (reads as what happened)
    """The engine ended a request before its reply was complete: by an error, or (None) because it is shutting down."""

    def __init__(self, error: str | None):
        super().__init__("the server is shutting down" if error is None else error)
        self.by_shutdown = error is None


@dataclass(frozen=True)
class Event:
    """One step of a request: a token, the text that is certain since, and in the last event why the reply ended.

    The last event has no token if the request was cancelled or failed; `error` is the message of a failure.
    """

    token: int | None
    text: str
    finish_reason: FinishReason | None
    error: str | None = None

    def check(self) -> None:
        """Raise GenerationFailed if the engine ended the request before its reply was complete."""
        if self.finish_reason in ("cancelled", "error"):
            raise GenerationFailed(self.error)


@dataclass(eq=False)
class Request:
    """One reply to generate: its tokens, cache pages and text. Only the engine's thread writes; all may read.

    `cancel` may be called from any thread, any number of times.
    """

    number: int
    tokens: list[int]  # the prompt, then the generated tokens
    sampling: Sampling
    emit: Callable[[Event], None]
    salt: str | None = None
    detokenizer: Detokenizer | None = None
    pages: list[int] = field(default_factory=list)
    n_computed: int = 0  # tokens whose keys and values are in `pages`
    n_cached: int | None = None  # prompt tokens from the prefix cache, known from the first admission on
    finish_reason: FinishReason | None = None
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def n_pending(self) -> int:
        """Tokens still to be computed; 1 in the decode phase."""
        return len(self.tokens) - self.n_computed

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def generated(self) -> list[int]:
        """Generated tokens, the stop token included."""
        return self.tokens[self.n_prompt :]

    @property
    def text(self) -> str:
        """The text of all events so far."""
        return "" if self.detokenizer is None else self.detokenizer.text

    @property
    def stage(self) -> str:
        """ "queue", "prefill" or "decode"."""
        return "decode" if self.n_generated else "queue" if self.n_cached is None else "prefill"

    def cancel(self) -> None:
        """Ask the engine to stop and free the pages; the last event then says "cancelled". No effect after the end."""
        self.is_cancelled = True
