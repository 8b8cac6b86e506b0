"""`linearize serve`: a compiled model behind an OpenAI-compatible HTTP endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli._mixers import Mixers
from linearize.cli._shell import say
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from socket import socket as Socket


def serve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What linearize compile wrote.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Sequences that run at once, each with its state.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait; more are answered 503.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of one request.")] = 4096,
    max_prompt: Annotated[int, typer.Option(min=1, help="Most tokens of one prompt.")] = 131_072,
    api_key: Annotated[
        str | None, typer.Option(envvar="LINEARIZE_API_KEY", help="Ask clients for it.", show_default=False)
    ] = None,
    compile_step: Annotated[bool, typer.Option("--compile", help="Compile the decode step first.")] = False,
    mixers: Mixers = None,
) -> None:
    """Answer /v1/completions and /v1/chat/completions, many at once, streaming or not.

    A sequence's state has a fixed size, so what the slots take is known before the first request.
    """
    try:
        import uvicorn

        from linearize.serving.app import Limits, Service
    except ImportError as error:
        raise LinearizeError(f'serving needs {error.name}: pip install "linearize[serve]"') from error
    import linearize
    from linearize.cli.generate import load_tokenizer
    from linearize.printing import bytes_text

    model, tokenizer = linearize.load(directory), load_tokenizer(directory)
    if compile_step:
        model.compile_step()
    limits = Limits(slots=slots, queue=queue, new_tokens=max_tokens, prompt_tokens=max_prompt)
    service = Service(model, tokenizer, directory.resolve().name, limits, api_key)
    say(f"{slots} slots of {bytes_text(model.state_bytes())} for {model.program.model_name} on {model.device}")
    if not service.batcher.together:
        say("its sequences are stepped one by one: a kept cache or its positions do not allow rows of other lengths")
    config = uvicorn.Config(service.app(), host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)
    with bound_socket(host, port) as socket:
        say(f"serving http://{host}:{socket.getsockname()[1]}/v1 as {service.name}; end with Ctrl-C")
        uvicorn.Server(config).run([socket])


def bound_socket(host: str, port: int) -> Socket:
    """A socket that listens there, so that the port is known, and taken, before anything is said.

    Raises:
        LinearizeError: the address cannot be had.
    """
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(128)
    except OSError as error:
        found.close()
        why = error.strerror or error
        raise LinearizeError(f"cannot listen on {host}:{port}: {why}; choose another --port") from error
    return found
