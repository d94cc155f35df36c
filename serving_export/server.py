"""The chat server: OpenAI-compatible HTTP and a chat page, over the reference engine.

python -m serving_export.server runs/demo/export [--host 127.0.0.1 --port 8000 --cache-mib 256]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from rich.console import Console
from starlette.exceptions import HTTPException

from data.dialogue import DialogueError
from serving_export.bundle import Bundle, open_bundle
from serving_export.chat_template import dialogue_of
from serving_export.engine import Engine, Event, PromptError, QueueFull
from serving_export.metrics import ServerMetrics
from serving_export.protocol import ChatRequest, Completion, RequestError, parse_request, usage
from serving_export.reply import GenerationFailed, Replier, Reply

CHAT_PAGE = Path(__file__).with_name("chat_page.html")
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
MAX_BODY_BYTES = 16 * 2**20
SHUTDOWN_SECONDS = 5


class ChatServer:
    """One bundle behind HTTP. Everything here runs on the event loop; only the engine has a thread of its own."""

    def __init__(self, bundle: Bundle, engine: Engine):
        self.bundle, self.engine = bundle, engine
        self.replier = Replier(engine, bundle.tokenizer)
        self.metrics = ServerMetrics(engine, bundle.name)
        self.started = int(time.time())

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        response = await self._complete(request)
        self.metrics.requests.labels(str(response.status_code)).inc()
        return response

    async def _complete(self, request: Request) -> Response:
        try:
            chat = parse_request(await _json_body(request))
            answer = self._begin(chat)
        except RequestError as error:
            return error_response(error)
        if chat.stream:
            return StreamingResponse(
                answer.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        leaving = asyncio.create_task(_disconnected(request))
        finishing = asyncio.create_task(answer.finish())
        try:
            await asyncio.wait({leaving, finishing}, return_when=asyncio.FIRST_COMPLETED)
            if not finishing.done():
                return Response(status_code=499)  # nobody reads it; the status is for the metrics
            return JSONResponse(finishing.result())
        except GenerationFailed as error:
            return error_response(_failure(error))
        finally:
            answer.cancel()
            leaving.cancel()
            finishing.cancel()

    def _begin(self, chat: ChatRequest) -> Answer:
        """Check a request against the model and queue its replies."""
        if chat.model is not None and chat.model != self.bundle.name:
            message = f"model: no model {chat.model!r} here; this server has {self.bundle.name!r}"
            raise RequestError(message, "model", "model_not_found", 404)
        defaults = self.bundle.defaults
        character = defaults.character if chat.character is None else chat.character
        try:
            messages = dialogue_of([m.model_dump() for m in chat.messages], defaults.user, character)
        except DialogueError as error:
            raise RequestError(f"messages: {error}", "messages") from None
        try:
            prompt = self.replier.encoder.encode_prompt(messages, character, chat.cache_salt)
        except DialogueError as error:
            raise RequestError(f"character: {error}", "character") from None
        try:
            return Answer(self, chat, prompt)
        except PromptError as error:
            raise RequestError(f"messages: {error}", "messages", "context_length_exceeded") from None
        except QueueFull as error:
            raise RequestError(f"too busy: {error}; try again later", code="overloaded", status=503) from None

    def models(self) -> dict[str, Any]:
        """GET /v1/models: the bundle, with the names its chats use."""
        return {"object": "list", "data": [self.model()]}

    def model(self) -> dict[str, Any]:
        """The bundle as an OpenAI model object; max_model_len, user and character are extensions."""
        return {
            "id": self.bundle.name,
            "object": "model",
            "created": self.started,
            "owned_by": "dramatis",
            "max_model_len": self.engine.max_length,
            "user": self.bundle.defaults.user,
            "character": self.bundle.defaults.character,
        }


class Answer:
    """The `n` replies to one request, and their way back as one body or as a stream."""

    def __init__(self, server: ChatServer, chat: ChatRequest, prompt: list[int]):
        self._server, self._chat, self._prompt = server, chat, prompt
        self._completion = Completion(server.bundle.name)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._arrived = time.perf_counter()
        self._latest = [self._arrived] * chat.n  # when each reply's last token came
        self._replies: list[Reply] = []
        try:
            for index in range(chat.n):
                self._replies.append(self._start(index, asyncio.get_running_loop()))
        except Exception:
            self.cancel()
            raise

    def _start(self, index: int, loop: asyncio.AbstractEventLoop) -> Reply:
        chat, default = self._chat, self._server.bundle.sampling
        seed = secrets.randbits(62) if chat.seed is None else (chat.seed * 1_000_003 + index) % 2**63
        sampling = self._server.replier.sampling(
            chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens,
            default.temperature if chat.temperature is None else chat.temperature,
            max(default.top_k if chat.top_k is None else chat.top_k, 0),
            default.top_p if chat.top_p is None else chat.top_p,
            seed,
        )

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return self._server.replier.start(self._prompt, sampling, emit, chat.cache_salt, chat.stop)

    async def finish(self) -> dict[str, Any]:
        """The whole answer. Raises GenerationFailed."""
        async for _ in self._texts():
            pass
        return self._completion.body([(r.text, r.finish_reason or "stop") for r in self._replies], self._usage())

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events. Leaving early, as at a disconnect, frees what the replies hold."""
        with_usage = self._chat.include_usage
        try:
            for index in range(len(self._replies)):
                opening = {"role": "assistant", "content": ""}
                yield _sse(self._completion.chunk(index, opening, None, with_usage))
            async for index, text, reason in self._texts():
                if text:
                    yield _sse(self._completion.chunk(index, {"content": text}, None, with_usage))
                if reason is not None:
                    yield _sse(self._completion.chunk(index, {}, reason, with_usage))
            if with_usage:
                yield _sse(self._completion.usage_chunk(self._usage()))
        except GenerationFailed as error:
            yield _sse(_failure(error).body())
        finally:
            self.cancel()
        yield "data: [DONE]\n\n"

    async def _texts(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(choice, new text, finish reason) as they come, until all replies have ended."""
        metrics = self._server.metrics
        while any(reply.finish_reason is None for reply in self._replies):
            index, event = await self._events.get()
            reply = self._replies[index]
            if reply.finish_reason is not None:  # cut by a stop string; what the engine drew meanwhile is dropped
                continue
            now = time.perf_counter()
            observed = metrics.inter_token_seconds if reply.drawn else metrics.time_to_first_token_seconds
            observed.observe(now - self._latest[index])
            self._latest[index] = now
            text = reply.take(event)
            yield index, text, reply.finish_reason
        metrics.request_seconds.observe(time.perf_counter() - self._arrived)

    def _usage(self) -> dict[str, Any]:
        n_drawn = sum(len(reply.drawn) for reply in self._replies)
        return usage(len(self._prompt), n_drawn, max(reply.n_cached for reply in self._replies))

    def cancel(self) -> None:
        """Free whatever is still being generated."""
        for reply in self._replies:
            reply.cancel()


class GracefulServer(uvicorn.Server):
    """A server that, told to stop, gives running replies some seconds and then ends them with a proper answer."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, wait, refuse what is left."""
        asyncio.get_running_loop().call_later(SHUTDOWN_SECONDS, self._engine.refuse_all)
        await super().shutdown(sockets)


def create_app(bundle: Bundle, engine: Engine) -> FastAPI:
    """The application; the engine runs while the application does."""
    server = ChatServer(bundle, engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="Dramatis", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/v1/chat/completions", server.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", server.models, methods=["GET"])

    @app.get("/v1/models/{name:path}", response_model=None)
    def model(name: str) -> dict[str, Any] | Response:
        if name == bundle.name:
            return server.model()
        return error_response(RequestError(f"no model {name!r} here", "model", "model_not_found", 404))

    @app.get("/health", response_model=None)
    def health() -> Response:
        alive = engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @app.get("/metrics", response_model=None)
    def metrics() -> Response:
        return Response(server.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_model=None)
    def chat_page() -> Response:
        return HTMLResponse(CHAT_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(RequestError(message, status=error.status_code))

    return app


def error_response(error: RequestError) -> Response:
    """An error as OpenAI's clients expect it."""
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.body(), error.status, headers)


def _failure(error: GenerationFailed) -> RequestError:
    return RequestError(str(error), status=503 if error.by_shutdown else 500)


async def _json_body(request: Request) -> object:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the body is longer than {MAX_BODY_BYTES:,} bytes", status=413)
    try:
        content = json.loads(bytes(body))
        # an escaped half of a surrogate pair is a string to Python and text to nobody
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON of Unicode text: {error}") from None
    return content


async def _disconnected(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _bound_socket(host: str, port: int) -> socket.socket:
    """A socket bound before anything slow happens. Raises OSError when the address cannot be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def _announce(console: Console, bundle: Bundle, engine: Engine, url: str) -> None:
    config = bundle.model.config
    n_tokens = engine.cache.allocator.n_pages * engine.cache.page_size
    console.print(f"[bold]{bundle.name}[/bold]: {config.n_parameters:,} parameters on {engine.device}")
    element_bytes = bundle.model.embed_tokens.weight.element_size()
    console.print(
        f"cache: {n_tokens:,} tokens of {config.kv_bytes_per_token(element_bytes):,} bytes; "
        f"a conversation may have {engine.max_length:,}"
    )
    console.print(f"chat page  [cyan]{url}/[/cyan]\nOpenAI API [cyan]{url}/v1[/cyan]   (Ctrl-C stops the server)")


def main(argv: list[str] | None = None) -> int:
    """Serve a bundle until SIGTERM or Ctrl-C; running replies then have a few seconds to end."""
    parser = argparse.ArgumentParser(
        prog="python -m serving_export.server", description="Serve an exported character model."
    )
    parser.add_argument("bundle", help="directory made by serving_export.export, such as runs/demo/export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--cache-mib", type=int, default=256, help="memory for keys and values (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        bound = _bound_socket(arguments.host, arguments.port)
    except (OSError, OverflowError) as error:
        address = f"{arguments.host}:{arguments.port}"
        print(f"cannot listen on {address}: {error}; choose another with --port", file=sys.stderr)
        return 1
    with bound:
        try:
            bundle = open_bundle(arguments.bundle, arguments.device)
            engine = bundle.engine(arguments.cache_mib)
        except ValueError as error:
            print(f"cannot serve {arguments.bundle}: {error}", file=sys.stderr)
            return 1
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        _announce(console, bundle, engine, f"http://{host}:{bound.getsockname()[1]}")
        # uvicorn raises the signal that ended it once more, for these handlers to swallow: a stop is a success
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        # its own timeout, which cuts connections, is only for clients that do not read
        config = uvicorn.Config(
            create_app(bundle, engine), log_level="warning", timeout_graceful_shutdown=3 * SHUTDOWN_SECONDS
        )
        GracefulServer(config, engine).run(sockets=[bound])
    console.print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
