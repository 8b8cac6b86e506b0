"""The HTTP side: /v1/completions and /v1/chat/completions with streaming, /v1/models, /health."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from linearize.errors import LinearizeError
from linearize.plan import first_problem
from linearize.runtime.generate import Sampling
from linearize.runtime.model import LinearizedModel
from linearize.serving.batcher import Batcher, Full
from linearize.serving.job import Job
from linearize.serving.schema import Chat, Completion, Request
from linearize.serving.text import TextStream


@dataclass(frozen=True)
class Limits:
    """`slots` sequences run at once and `queue` wait; the rest are sent away with 503."""

    slots: int = 16
    queue: int = 64
    prompt_tokens: int = 131_072
    new_tokens: int = 4096
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0


class Refused(Exception):
    """An answer other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


@dataclass
class Answer:
    """One choice while it is made: its job, its text, and why it ended."""

    job: Job
    text: TextStream
    events: asyncio.Queue[tuple[int | None, Exception | None]]
    prompt_tokens: int
    finish_reason: str | None = None
    tokens: int = field(default=0)

    async def pieces(self) -> AsyncIterator[str]:
        """Its text as it comes.

        Raises:
            Refused: the model failed, or the server is shutting down.
        """
        while self.finish_reason is None:
            token, error = await self.events.get()
            if error is not None:
                status, kind = (503, "overloaded_error") if isinstance(error, Full) else (500, "server_error")
                raise Refused(status, f"generation failed: {error}", kind)
            if token is None:
                self.finish_reason = "length"
            elif token in self.job.ends:
                self.tokens, self.finish_reason = self.tokens + 1, "stop"
            else:
                self.tokens += 1
                yield self.text.push(token)
            if self.text.stopped:
                self.finish_reason = "stop"
        self.job.cancel()
        yield self.text.flush()


class Service:
    """A model, its tokenizer and its batcher behind the endpoints."""

    def __init__(
        self, model: LinearizedModel, tokenizer: Any, name: str, limits: Limits | None = None, key: str | None = None
    ) -> None:
        self.model, self.tokenizer, self.name, self.key = model, tokenizer, name, key
        self.limits = limits or Limits()
        self.batcher = Batcher(model, self.limits.slots, self.limits.queue)
        self.started = int(time.time())

    def app(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.batcher.close)

        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/completions", self._guarded(self.complete), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    async def health(self, _: HttpRequest) -> Response:
        batcher = self.batcher
        counts = {"running": len(batcher.running), "waiting": len(batcher.waiting), "slots": batcher.slots}
        return JSONResponse({"status": "ok", **counts, "state_bytes_a_sequence": self.model.state_bytes()})

    async def models(self, _: HttpRequest) -> Response:
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "linearize"}
        return JSONResponse({"object": "list", "data": [model]})

    def _guarded(self, handle: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
        """Every refusal becomes an answer in OpenAI's form."""

        async def guarded(request: HttpRequest) -> Response:
            try:
                if self.key is not None and not secrets.compare_digest(
                    request.headers.get("authorization", "").encode(), f"Bearer {self.key}".encode()
                ):
                    raise Refused(401, "a wrong or missing API key", "authentication_error")
                return await handle(request)  # type: ignore[no-any-return]
            except ClientDisconnect:
                return Response(status_code=499)
            except Refused as error:
                return refusal(error)
            except Full as error:
                return refusal(Refused(503, str(error), "overloaded_error"))
            except LinearizeError as error:
                return refusal(Refused(400, str(error)))

        return guarded

    async def complete(self, http: HttpRequest) -> Response:
        request = await self._parsed(http, Completion)
        prompts = [self._tokens(prompt) for prompt in request.prompts()]
        if not prompts:
            raise Refused(400, "prompt: there is none")
        return await self._answer(http, request, prompts, request.max_tokens or 16, "text_completion", _plain)

    async def chat(self, http: HttpRequest) -> Response:
        request = await self._parsed(http, Chat)
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise Refused(400, "the model's tokenizer has no chat template; use /v1/completions")
        messages = [message.model_dump() for message in request.messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like on roles that they do not know
            raise Refused(400, f"messages: the chat template refused them: {error}") from error
        prompt = self._checked(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        wanted = request.max_completion_tokens or request.max_tokens or self.limits.new_tokens
        return await self._answer(http, request, [prompt], wanted, "chat.completion", _message)

    async def _parsed(self, http: HttpRequest, kind: type[Any]) -> Any:
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in http.stream():
                    body += part
                    if len(body) > self.limits.body_bytes:
                        raise Refused(413, f"the body is larger than {self.limits.body_bytes:,} bytes")
        except TimeoutError as error:
            raise Refused(408, f"the body did not arrive in {self.limits.body_seconds:g} s") from error
        try:
            return kind.model_validate(json.loads(bytes(body)))
        except ValidationError as error:
            raise Refused(400, first_problem(error)) from error
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from error

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        return self._checked(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)

    def _checked(self, tokens: list[int]) -> list[int]:
        limit, vocabulary = self.limits.prompt_tokens, self.model.vocab_size
        if not tokens:
            raise Refused(400, "prompt: it has no tokens")
        if len(tokens) > limit:
            raise Refused(400, f"prompt: {len(tokens):,} tokens, and this server takes {limit:,}")
        if vocabulary is not None and not all(0 <= token < vocabulary for token in tokens):
            raise Refused(400, f"prompt: token ids must be within 0..{vocabulary - 1}")
        return tokens

    async def _answer(self, http: HttpRequest, request: Request, prompts: Sequence[list[int]], wanted: int, kind: str,
                      shape: Callable[[str, bool], dict[str, Any]]) -> Response:  # fmt: skip
        if wanted > self.limits.new_tokens:
            raise Refused(400, f"max_tokens: {wanted:,}, and this server makes at most {self.limits.new_tokens:,}")
        answers = [self._start(request, prompt, wanted) for prompt in prompts]
        self.batcher.submit([answer.job for answer in answers])
        about = {"id": f"{kind.split('.')[0]}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
        if request.stream:
            chunks = {**about, "object": "chat.completion.chunk" if kind == "chat.completion" else kind}
            return StreamingResponse(
                self._events(answers, request, chunks, shape), media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )  # fmt: skip
        texts = await self._whole(http, answers)
        choices = [
            {"index": index, **shape(text, False), "finish_reason": answer.finish_reason, "logprobs": None}
            for index, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ]
        return JSONResponse({**about, "object": kind, "choices": choices, "usage": usage(answers)})

    def _start(self, request: Request, prompt: list[int], wanted: int) -> Answer:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int | None, Exception | None]]()

        def listener(token: int | None, error: Exception | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (token, error))

        greedy = request.temperature == 0
        sampling = Sampling(
            do_sample=not greedy, temperature=request.temperature or 1.0, top_k=request.top_k, top_p=request.top_p,
            seed=request.seed,
        )  # fmt: skip
        job = Job(list(prompt), wanted, listener, sampling, end_tokens(self.model, self.tokenizer))
        return Answer(job, TextStream(self.tokenizer, prompt, request.stops()), events, len(prompt))

    async def _whole(self, http: HttpRequest, answers: Sequence[Answer]) -> list[str]:
        """The texts of all choices; cancelled when the client goes."""

        async def text(answer: Answer) -> str:
            return "".join([piece async for piece in answer.pieces()])

        async def gone() -> None:
            while not await http.is_disconnected():
                await asyncio.sleep(0.2)

        work: asyncio.Future[list[str]] = asyncio.gather(*(text(answer) for answer in answers))
        watch = asyncio.create_task(gone())
        try:
            await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
            if not work.done():
                raise ClientDisconnect
            return list(work.result())
        finally:
            watch.cancel()
            work.cancel()
            for answer in answers:
                answer.job.cancel()

    async def _events(self, answers: Sequence[Answer], request: Request, about: dict[str, Any],
                      shape: Callable[[str, bool], dict[str, Any]]) -> AsyncIterator[str]:  # fmt: skip
        """Server-sent events; leaving this generator, by its end or because the client has gone, frees the slots."""
        merged: asyncio.Queue[tuple[int, str | Exception | None]] = asyncio.Queue()

        async def forward(index: int, answer: Answer) -> None:
            try:
                async for piece in answer.pieces():
                    await merged.put((index, piece))
                await merged.put((index, None))
            except Refused as error:
                await merged.put((index, error))

        tasks = [asyncio.create_task(forward(index, answer)) for index, answer in enumerate(answers)]
        try:
            left = len(answers)
            while left:
                index, piece = await merged.get()
                if isinstance(piece, Exception):
                    yield event({"error": {"message": str(piece), "type": "server_error"}})
                    return
                left -= piece is None
                reason = answers[index].finish_reason if piece is None else None
                if piece != "":
                    choice = {"index": index, **shape(piece or "", True), "finish_reason": reason, "logprobs": None}
                    yield event({**about, "choices": [choice]})
            if request.with_usage:
                yield event({**about, "choices": [], "usage": usage(answers)})
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            for answer in answers:
                answer.job.cancel()


def end_tokens(model: LinearizedModel, tokenizer: Any) -> frozenset[int]:
    """The ids that end a text: those of the generation config, else the tokenizer's."""
    stored = model.files.get("generation_config.json")
    found = json.loads(stored).get("eos_token_id") if stored else None
    found = getattr(tokenizer, "eos_token_id", None) if found is None else found
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def _plain(text: str, _: bool) -> dict[str, Any]:
    return {"text": text}


def _message(text: str, streamed: bool) -> dict[str, Any]:
    return {"delta" if streamed else "message": {"role": "assistant", "content": text}}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    read, made = sum(answer.prompt_tokens for answer in answers), sum(answer.tokens for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def refusal(error: Refused) -> Response:
    headers = {"Retry-After": "1"} if error.status == 503 else None
    body = {"error": {"message": str(error), "type": error.kind, "code": error.status}}
    return JSONResponse(body, error.status, headers)
