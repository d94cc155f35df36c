"""A request of the server: the events that its reply produces, and why it was refused or failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from model.inference.request import Request
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
class ServedRequest(Request):
    """A request with the receiver of its events and its text. Only the engine's thread writes; all may read."""

    emit: Callable[[Event], None] = field(kw_only=True)
    detokenizer: Detokenizer | None = None
    finish_reason: FinishReason | None = None
    is_cancelled: bool = False
    on_cancel: Callable[[ServedRequest], None] = lambda request: None

    @property
    def text(self) -> str:
        """The text of all events so far."""
        return "" if self.detokenizer is None else self.detokenizer.text

    @property
    def stage(self) -> str:
        """ "queue", "prefill" or "decode"."""
        return "decode" if self.n_generated else "queue" if self.n_cached is None else "prefill"

    def cancel(self) -> None:
        """Ask the engine to stop and free the pages; the last event then says "cancelled". No effect after the end.

        May be called from any thread, any number of times.
        """
        if not self.is_cancelled:
            self.is_cancelled = True
            self.on_cancel(self)
