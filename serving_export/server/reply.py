"""From messages to a reply's text, for the server and the terminal chat: encode, truncate, submit, remember."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from data.format.dialogue import Message
from data.format.tokenizer import DialogueTokenizer
from data.prompt.fit import fit_prompt
from data.sources.record import LeftOut
from model.inference.sampling import Sampling
from serving_export.server.conversation import ConversationEncoder, EncodedPrompt, history_digest
from serving_export.server.detokenizer import Detokenizer, PieceTable
from serving_export.server.engine import Engine
from serving_export.server.request import Event, PromptError, ServedRequest


class Replier:
    """Encodes conversations and submits requests for replies to one engine. Thread-safe."""

    def __init__(self, engine: Engine, tokenizer: DialogueTokenizer):
        self.engine = engine
        self.encoder = ConversationEncoder(tokenizer)
        self.pieces = PieceTable(tokenizer)
        self.tokenizer = tokenizer

    def sampling(self, max_new_tokens: int | None, temperature: float, top_k: int, top_p: float, seed: int) -> Sampling:
        """Sampling of a reply: `<|end|>` ends it, other control tokens are forbidden. max_new_tokens None: no limit."""
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

        With `truncate`, the oldest messages are dropped until a reply of `longest_reply` tokens fits (at most half of
        the context, a quarter for None); the narrator's opening and the newest message stay (data/prompt/fit.py).
        Raises PromptError for a conversation that is too long, without encoding it if its size is enough to tell.
        """
        if truncate:
            return self._truncated(messages, character, salt, longest_reply)
        room = self.engine.max_length - 1
        n_fewest = self.encoder.fewest_tokens(messages, character)
        if n_fewest > room:
            raise PromptError(
                f"the conversation has at least {n_fewest:,} tokens; at most {room:,} leave room for a reply"
            )
        return self.encoder.encode_prompt(messages, character, salt)

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
        prompt = self.encoder.encode_prompt(fitted.messages, character, salt)
        if len(prompt.tokens) >= length:  # a reply may have been generated with more tokens than its text needs
            prompt = EncodedPrompt(fitted.tokens, history_digest(fitted.tokens, salt))
        return replace(prompt, n_left_out=fitted.n_cut)

    def start(
        self,
        prompt: EncodedPrompt,
        sampling: Sampling,
        emit: Callable[[Event], None],
        salt: str | None = None,
        stop: Sequence[str] = (),
        after: ServedRequest | None = None,
    ) -> ServedRequest:
        """Submit a prompt; the reply ends before any of the texts `stop`. `emit` and `after`: see Engine.submit."""
        return self.engine.submit(prompt.tokens, sampling, emit, salt, Detokenizer(self.pieces, stop), after)

    def remember(self, prompt: EncodedPrompt, request: ServedRequest) -> None:
        """After the last event: reuse the generated ids when the conversation comes back with this reply."""
        generated = request.generated
        is_closed = generated[-1:] == [self.tokenizer.end_id]
        self.encoder.remember_reply(prompt, generated[:-1] if is_closed else generated, request.text)

    def stream(
        self, prompt: EncodedPrompt, sampling: Sampling, salt: str | None = None
    ) -> Iterator[tuple[str, ServedRequest]]:
        """The reply's text piece by piece, blocking. Closing the iterator cancels the request.

        Raises GenerationFailed.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = self.start(prompt, sampling, events.put, salt)
        try:
            is_over = False
            while not is_over:
                event = events.get()
                event.check()
                is_over = event.finish_reason is not None
                if is_over:
                    self.remember(prompt, request)
                yield event.text, request
        finally:
            request.cancel()
