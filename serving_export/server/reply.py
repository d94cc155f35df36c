"""From messages to a reply and back: encoding, generation and detokenising for the server and the terminal alike."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from data.format.dialogue import Message
from data.format.tokenizer import DialogueTokenizer
from data.prompt.fit import fit_prompt
from data.sources.record import LeftOut
from model.inference.generate import Sampling
from serving_export.server.conversation import ConversationEncoder
from serving_export.server.detokenizer import PieceTable, ReplyStream
from serving_export.server.engine import Engine, Event, PromptError

FinishReason = Literal["stop", "length"]


class GenerationFailed(RuntimeError):  # noqa: N818 (reads as what happened)
    """The engine ended a reply by itself: because of `error`, or (None) because it is stopping."""

    def __init__(self, error: str | None):
        super().__init__("the server is shutting down" if error is None else error)
        self.by_shutdown = error is None


@dataclass(frozen=True)
class EncodedPrompt:
    """The ids to generate a reply from, and how many of the oldest messages are not in them."""

    tokens: list[int]
    n_left_out: int = 0


class Replier:
    """Starts replies of characters on one engine. `encode` and `Reply.remember` may run on any thread."""

    def __init__(self, engine: Engine, tokenizer: DialogueTokenizer):
        self.engine = engine
        self.encoder = ConversationEncoder(tokenizer)
        self.pieces = PieceTable(tokenizer)
        self.tokenizer = tokenizer

    def sampling(self, max_new_tokens: int | None, temperature: float, top_k: int, top_p: float, seed: int) -> Sampling:
        """How to draw a reply: it ends at `<|end|>` and holds no other control token; None asks for all the room."""
        return Sampling(
            max_new_tokens=self.engine.max_length if max_new_tokens is None else max_new_tokens,
            stop_ids=(self.tokenizer.end_id,),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            forbidden_ids=self.tokenizer.forbidden_in_reply,
        )

    def encode(
        self,
        messages: Sequence[Message],
        character: str,
        salt: str | None = None,
        truncate: bool = False,
        longest_reply: int | None = None,
    ) -> EncodedPrompt:
        """The prompt of a conversation.

        With `truncate` the oldest messages go until a reply of `longest_reply` tokens fits, half the context at most
        and a quarter for None; the narrator's opening and the newest message stay (data/prompt/fit.py).
        Raises PromptError for a conversation that is too long: where its size tells, before anything is encoded.
        """
        if truncate:
            return self._truncated(messages, character, salt, longest_reply)
        room = self.engine.max_length - 1
        n_fewest = self.encoder.fewest_tokens(messages, character)
        if n_fewest > room:
            raise PromptError(
                f"the conversation has at least {n_fewest:,} tokens; at most {room:,} leave room for a reply"
            )
        return EncodedPrompt(self.encoder.encode_prompt(messages, character, salt))

    def _truncated(
        self, messages: Sequence[Message], character: str, salt: str | None, longest_reply: int | None
    ) -> EncodedPrompt:
        length = self.engine.max_length
        reply_tokens = length // 4 if longest_reply is None else min(longest_reply, length // 2)
        fitted = fit_prompt(self.encoder.message_encoder, messages, character, length, reply_tokens)
        if isinstance(fitted, LeftOut):
            raise PromptError(
                f"{fitted.reason}: of {length:,} tokens {reply_tokens:,} are for the reply, and neither the narrator's "
                "opening nor the newest message may be left out"
            )
        tokens = self.encoder.encode_prompt(fitted.messages, character, salt)
        # a reply may have been drawn in more pieces than the tokenizer needs for its text
        return EncodedPrompt(tokens if len(tokens) < length else fitted.tokens, fitted.n_cut)

    def start(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        emit: Callable[[Event], None],
        salt: str | None = None,
        stop: Sequence[str] = (),
    ) -> Reply:
        """Queue a prompt of `encode`; whoever gets the events gives each to the reply's `take`."""
        return Reply(self, prompt, sampling, emit, salt, stop)

    def stream(self, prompt: EncodedPrompt, sampling: Sampling, salt: str | None = None) -> Iterator[tuple[str, Reply]]:
        """The reply's text piece by piece, blocking; leaving the loop early frees what the reply holds."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        reply = self.start(prompt.tokens, sampling, events.put, salt)
        try:
            while reply.finish_reason is None:
                text = reply.take(events.get())
                if reply.finish_reason is not None:
                    reply.remember()
                yield text, reply
        finally:
            reply.cancel()


class Reply:
    """One reply in the making: the text given out so far, its ids, and why it ended."""

    def __init__(
        self,
        replier: Replier,
        prompt: Sequence[int],
        sampling: Sampling,
        emit: Callable[[Event], None],
        salt: str | None,
        stop: Sequence[str],
    ):
        self.prompt = list(prompt)
        self.drawn: list[int] = []
        self.n_cached = 0
        self.finish_reason: FinishReason | None = None
        self._replier = replier
        self._salt = salt
        self._text = ReplyStream(replier.pieces, stop)
        self._generation = replier.engine.submit(prompt, sampling, emit, salt)

    @property
    def text(self) -> str:
        return self._text.text

    @property
    def stage(self) -> str:
        """Where the engine is: "queue", "prefill" or "decode"."""
        return "decode" if self.drawn else "queue" if self._generation.n_cached is None else "prefill"

    def take(self, event: Event) -> str:
        """The text that is new with `event`. Raises GenerationFailed when the engine gave the reply up."""
        assert self.finish_reason is None, "the reply has ended"
        self.n_cached = event.n_cached
        new = ""
        if event.token is not None:
            self.drawn.append(event.token)
            new = self._text.push(event.token)
        if self._text.stopped:
            self.cancel()
            self.finish_reason = "stop"
            return new
        if event.finish_reason is None:
            return new
        if event.finish_reason not in ("stop", "length"):
            raise GenerationFailed(event.error)
        new += self._text.finish()
        self.finish_reason = event.finish_reason
        return new

    def remember(self) -> None:
        """Splice the ids of this ended reply when its conversation comes back. Takes time by the prompt's length."""
        assert self.finish_reason is not None
        is_closed = self.drawn[-1:] == [self._replier.tokenizer.end_id]
        content = self.drawn[:-1] if is_closed else self.drawn
        self._replier.encoder.remember_reply(self.prompt, content, self.text, self._salt)

    def cancel(self) -> None:
        """Stop generating; does nothing to a reply that has ended."""
        self._generation.cancel()
