"""The chat server: OpenAI-compatible HTTP and a chat page, over the reference engine.

python -m serving_export.server runs/demo/export [--host 127.0.0.1 --port 8000 --cache-mib 256]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from rich.console import Console
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from data.format.dialogue import DialogueError, check_speaker
from serving_export.bundle import Bundle, open_bundle
from serving_export.export.chat_template import dialogue_of
from serving_export.server.answer import Answer, EventStream, failure
from serving_export.server.conversation import EncodedPrompt
from serving_export.server.engine import Engine
from serving_export.server.metrics import ServerMetrics
from serving_export.server.protocol import ChatRequest, RequestError, shown
from serving_export.server.reply import Replier
from serving_export.server.request import GenerationFailed, PromptError, QueueFull
from serving_export.server.request_body import parse_body, read_body

CHAT_PAGE = Path(__file__).with_name("chat_page.html")
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_LOG = logging.getLogger(__name__)
CLIENT_LEFT = 499
N_THREADS = 4
SHUTDOWN_SECONDS = 5


class ChatServer:
    """The HTTP endpoints of one bundle. Parsing and encoding run on `threads`, not on the event loop."""

    def __init__(self, bundle: Bundle, engine: Engine, threads: Executor):
        self.bundle, self.engine = bundle, engine
        self.replier = Replier(engine, bundle.tokenizer)
        self.metrics = ServerMetrics(engine, bundle.name)
        self.started = int(time.time())
        self._threads = threads
        self._n_preparing = 0

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        response = await self._complete(request)
        self.metrics.requests.labels(str(response.status_code)).inc()
        return response

    async def _complete(self, request: Request) -> Response:
        try:
            body = await read_body(request, self.engine.max_length)
        except RequestError as error:
            return error_response(error)
        except ClientDisconnect:
            return self._gone("body")
        leaving = asyncio.create_task(_disconnected(request))
        answering = asyncio.create_task(self._answer(body))
        try:
            await asyncio.wait({leaving, answering}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering
            return Response(status_code=CLIENT_LEFT)
        finally:
            leaving.cancel()
            answering.cancel()

    async def _answer(self, body: bytes) -> Response:
        """The response. If cancelled, counts the stage at which the client disconnected."""
        answer: Answer | None = None
        try:
            answer, is_stream = await self._begin(body)
            if is_stream:
                return EventStream(answer, self._gone)
            content = await answer.finish()
        except asyncio.CancelledError:
            self._gone("encode" if answer is None else answer.stage)
            raise
        except RequestError as error:
            return error_response(error)
        except GenerationFailed as error:
            return error_response(failure(error))
        except Exception as error:
            _LOG.exception("a request failed")
            message = f"the server failed ({type(error).__name__}); its log says why"
            return error_response(RequestError(message, status=500))
        finally:
            if answer is not None and not is_stream:
                answer.cancel()
        return JSONResponse(content)

    async def _begin(self, body: bytes) -> tuple[Answer, bool]:
        """Start the answer to a request; also whether it is streamed. Raises RequestError."""
        try:
            if self._n_preparing + self.engine.n_waiting >= self.engine.max_waiting:
                raise QueueFull(f"{self.engine.max_waiting} requests are waiting already")
            self._n_preparing += 1
            try:
                loop = asyncio.get_running_loop()
                chat, prompt = await loop.run_in_executor(self._threads, self._prepare, body)
            finally:
                self._n_preparing -= 1
            return Answer(self.replier, self.metrics, self.bundle, chat, prompt), chat.stream
        except PromptError as error:
            raise RequestError(f"messages: {error}", "messages", "context_length_exceeded") from None
        except QueueFull as error:
            raise RequestError(f"too busy: {error}; try again later", code="overloaded", status=503) from None

    def _prepare(self, body: bytes) -> tuple[ChatRequest, EncodedPrompt]:
        """Parse a request, validate it and encode its prompt. Raises RequestError or PromptError."""
        chat = parse_body(body)
        if chat.model is not None and chat.model != self.bundle.name:
            message = f"model: no model {shown(chat.model)} here; this server has {self.bundle.name!r}"
            raise RequestError(message, "model", "model_not_found", 404)
        defaults = self.bundle.defaults
        character = defaults.character if chat.character is None else chat.character
        try:
            check_speaker(character)
        except DialogueError as error:
            raise RequestError(f"character: {error}", "character") from None
        try:
            messages = dialogue_of([m.model_dump() for m in chat.messages], defaults.user, character)
        except DialogueError as error:
            raise RequestError(f"messages: {error}", "messages") from None
        is_auto = chat.truncation == "auto"
        return chat, self.replier.encode(messages, character, chat.cache_salt, is_auto, chat.longest_reply)

    def _gone(self, stage: str) -> Response:
        """Count a disconnected client; the status of the response is for the metrics."""
        self.metrics.disconnects.labels(stage).inc()
        return Response(status_code=CLIENT_LEFT)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models: the bundle."""
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


class GracefulServer(uvicorn.Server):
    """On shutdown, running requests get some seconds to finish and are then cancelled with an error response."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, wait, cancel the remaining requests."""
        asyncio.get_running_loop().call_later(SHUTDOWN_SECONDS, self._engine.refuse_all)
        await super().shutdown(sockets)


def create_app(bundle: Bundle, engine: Engine) -> FastAPI:
    """The application; it starts and stops the engine."""
    threads = ThreadPoolExecutor(N_THREADS, thread_name_prefix="requests")
    server = ChatServer(bundle, engine, threads)
    page = CHAT_PAGE.read_text(encoding="utf-8")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)
        threads.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="Dramatis", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/v1/chat/completions", server.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", server.models, methods=["GET"])

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any] | Response:
        if name == bundle.name:
            return server.model()
        return error_response(RequestError(f"no model {shown(name)} here", "model", "model_not_found", 404))

    @app.get("/health", response_model=None)
    async def health() -> Response:
        alive = engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(server.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_model=None)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(RequestError(message, status=error.status_code))

    return app


def error_response(error: RequestError) -> Response:
    """An error response in OpenAI's format."""
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.body(), error.status, headers)


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _bound_socket(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it every second write waits 40 ms for an ACK
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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
    if engine.runner.why_plain is None:
        console.print("decoding: fused kernels in CUDA graphs")
    elif engine.device.type == "cuda":
        console.print(f"decoding: plain PyTorch, since {engine.runner.why_plain}")
    console.print(f"chat page  [cyan]{url}/[/cyan]\nOpenAI API [cyan]{url}/v1[/cyan]   (Ctrl-C stops the server)")


def main(argv: list[str] | None = None) -> int:
    """Serve a bundle until SIGTERM or Ctrl-C. The exit code is 1 if the address or the bundle cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m serving_export.server", description="Serve an exported character model."
    )
    parser.add_argument("bundle", help="directory made by serving_export.export, such as runs/demo/export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--cache-mib", type=int, default=256, help="memory for keys and values (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument(
        "--decoding", choices=("auto", "fused", "plain"), default="auto",
        help="fused kernels and CUDA graphs, plain PyTorch, or fused where it can be (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--deterministic", action="store_true", help="a reply does not depend on the others in its batch (GPU only)"
    )
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
            engine = bundle.engine(arguments.cache_mib, arguments.decoding, arguments.deterministic)
            with console.status("capturing CUDA graphs") if engine.runner.lag else contextlib.nullcontext():
                engine.runner.warm_up()
        except (ValueError, OSError) as error:
            print(f"cannot serve {arguments.bundle}: {error}", file=sys.stderr)
            return 1
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        _announce(console, bundle, engine, f"http://{host}:{bound.getsockname()[1]}")
        # A request of many small objects triggers garbage collection, which blocks the event loop: exempt the objects
        # loaded so far.
        gc.collect()
        gc.freeze()
        # uvicorn raises the signal that stopped it again; ignore it, so that the exit code is 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        # uvicorn's own timeout closes connections; it is only for clients that do not read their answer
        config = uvicorn.Config(
            create_app(bundle, engine), log_level="warning", timeout_graceful_shutdown=3 * SHUTDOWN_SECONDS
        )
        GracefulServer(config, engine).run(sockets=[bound])
    console.print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
