"""A tokenizer of a few sentences and a small random model, for what needs no trained ones."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn

from data.format.tokenizer import DialogueTokenizer, train_tokenizer
from model.config import ModelConfig, TailSharing
from model.transformer import Transformer
from serving_export.bundle import PAGE_SIZE, Bundle, SamplingDefaults
from serving_export.export.manifest import Defaults
from serving_export.server.__main__ import create_app
from serving_export.server.engine import Engine

# tiny models run many times faster on one thread than on a crowd of them
torch.set_num_threads(1)

SENTENCES = [
    "Hello there, how are you doing today?",
    "I am fine, thank you. It rains  a lot in November!",
    "Ada: did you see the 42 ducks on the pond? Yes, all of them; they were loud.",
    "Ich weiß nicht, was soll es bedeuten, daß ich so traurig bin.",
    "user narrator Ada Bob and the other ones talk about the weather and the rain",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and lose much when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> DialogueTokenizer:
    return train_tokenizer(SENTENCES * 3, None, 400, character_coverage=1.0)


@pytest.fixture(scope="session")
def model(tokenizer: DialogueTokenizer) -> Transformer:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=6, n_heads=4, d_head=16, d_ff=48, layers="SSG",
        window=12, kv_sharing=TailSharing(kind="tail", n_layers=3), final_logit_softcap=30.0, max_length=256,
    )  # fmt: skip
    built = Transformer(config, attention="reference", seed=5).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return built


NAME = "runs/demo/export"


class Running:
    """A server on a free port."""

    def __init__(self, model: Transformer, tokenizer: DialogueTokenizer):
        self.tokenizer = tokenizer
        self.engine = Engine(model, n_pages=400, page_size=PAGE_SIZE)
        bundle = Bundle(NAME, model, tokenizer, Defaults("Bob", "Ada", 256), SamplingDefaults(1.0, 0, 1.0))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(create_app(bundle, self.engine), log_level="warning"))
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def ask(self, messages: list[dict[str, str]], **fields: Any) -> Any:
        extra = {key: fields.pop(key) for key in ("character", "cache_salt", "top_k") if key in fields}
        return self.client.chat.completions.create(model=NAME, messages=messages, extra_body=extra, **fields)

    def close(self) -> None:
        self.client.close()
        self.http.close()
        self.server.should_exit = True
        self._thread.join()

    def metric(self, name: str) -> float:
        """A metric's value by name and labels, 0 where it is not there yet."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith(f"dramatis_{name}")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def send(self, body: dict[str, Any], n_bytes: int | None = None) -> socket.socket:
        """A connection on which the first `n_bytes` of a chat request's body were sent."""
        raw = json.dumps(body).encode()
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw[:n_bytes])
        return connection

    def wait_until_idle(self) -> None:
        for _ in range(600):
            if not self.engine.n_running and not self.engine.n_waiting:
                return
            time.sleep(0.05)
        raise AssertionError("the engine still has requests")


@pytest.fixture(scope="module")
def running(model: Transformer, tokenizer: DialogueTokenizer) -> Iterator[Running]:
    server = Running(model, tokenizer)
    yield server
    server.close()
