"""A server in a thread, on a tiny model whose tokens are characters."""

from __future__ import annotations

import copy
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from linearize.runtime.model import LinearizedModel
from linearize.serving.app import Limits, Service
from tests import zoo

RECIPE = "lolcats{window=5}"


class Characters:
    """Token n is the character n + 32."""

    eos_token_id = None
    chat_template = "there is one"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) - 32 for character in text]}

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(token + 32) for token in tokens)

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        if any(message["role"] not in ("user", "assistant") for message in messages):
            raise ValueError("roles alternate")
        return "".join(f"{message['role'][0]}:{message['content']};" for message in messages)


def endless(name: str, recipe: str) -> LinearizedModel:
    """The zoo's model without a token that ends its texts: what it says has the length that is asked for."""
    model = copy.deepcopy(zoo.compiled(name, recipe))
    model.files = {}
    return model


class Server:
    """`url` answers until `stop`."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(service.app(), log_level="error"))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()

    def wait_until_idle(self, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while self.service.batcher.busy:
            assert time.monotonic() < until, "slots were not given back"
            time.sleep(0.02)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """`serve(recipe, key=..., slots=...)` starts a server; all are stopped at the end."""
    servers: list[Server] = []

    def start(recipe: str = RECIPE, name: str = "llama", key: str | None = None, **limits: Any) -> Server:
        service = Service(endless(name, recipe), Characters(), "tiny", Limits(**limits), key)
        servers.append(Server(service))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
