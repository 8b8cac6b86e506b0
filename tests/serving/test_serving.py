"""The HTTP endpoint: right under concurrency, streamed or not, and unmoved by garbage and by clients that leave."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from tests import zoo
from tests.serving.conftest import RECIPE, Characters

PROMPTS = [text * (1 + index) for index, text in enumerate(["a", "Hello", "def f(x):", "1,2,"] * 4)]
Serve = Callable[..., Any]


def expected(prompt: str, count: int, recipe: str = RECIPE, name: str = "llama") -> str:
    """What the model says alone."""
    tokenizer = Characters()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    return tokenizer.decode(zoo.compiled(name, recipe).generate(ids, count)[0, ids.shape[1] :].tolist())


def ask(url: str, timeout: float = 120, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"temperature": 0, **body}, timeout=timeout)


def streamed(url: str, path: str = "completions", **body: Any) -> list[dict[str, Any]]:
    """The events of a streamed answer, the last of which must be [DONE]."""
    sent = {"temperature": 0, "stream": True, **body}
    with httpx.stream("POST", f"{url}/v1/{path}", json=sent, timeout=120) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for event in events for choice in event["choices"])


def test_sixteen_streams_at_once_say_what_each_says_alone(serve: Serve) -> None:
    server = serve(slots=16)
    counts = [8 + 3 * index for index in range(16)]
    with ThreadPoolExecutor(16) as pool:
        jobs = [
            pool.submit(streamed, server.url, prompt=prompt, max_tokens=count)
            for prompt, count in zip(PROMPTS, counts, strict=True)
        ]
        found = [text_of(job.result()) for job in jobs]
    assert found == [expected(prompt, count) for prompt, count in zip(PROMPTS, counts, strict=True)]
    server.wait_until_idle()


def test_the_rest_are_served_while_clients_leave_and_send_garbage(serve: Serve) -> None:
    server = serve(slots=4, queue=64, body_bytes=20_000)

    def leaves(index: int) -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", timeout=120, json={
            "prompt": PROMPTS[index], "stream": True, "max_tokens": 4000, "temperature": 0,
        }) as answer:  # fmt: skip
            next(answer.iter_lines())

    def hangs_up(_: int) -> None:
        body = json.dumps({"prompt": "abc", "max_tokens": 4000}).encode()
        with socket.create_connection(server.socket.getsockname()) as plain:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            plain.sendall(head.encode() + body)

    def garbage(index: int) -> int:
        content = [b"\xff\xfe{", b"[" * 10_000, b'{"prompt": ' + b"1" * 15_000, b"x" * 30_000][index % 4]
        return httpx.post(f"{server.url}/v1/completions", content=content, timeout=120).status_code

    with ThreadPoolExecutor(24) as pool:
        good = [pool.submit(streamed, server.url, prompt=prompt, max_tokens=12) for prompt in PROMPTS]
        gone = [pool.submit(leaves, index) for index in range(4)] + [pool.submit(hangs_up, index) for index in range(4)]
        bad = [pool.submit(garbage, index) for index in range(8)]
        found = [text_of(job.result()) for job in good]
        for job in gone:
            job.result()
        codes = {job.result() for job in bad}
    assert found == [expected(prompt, 12) for prompt in PROMPTS]
    assert codes == {400, 413}
    server.wait_until_idle()
    assert ask(server.url, prompt="x", max_tokens=3).json()["choices"][0]["text"] == expected("x", 3)


def test_whole_answers_have_the_text_the_reason_and_the_usage(serve: Serve) -> None:
    server = serve()
    answer = ask(server.url, prompt=["abc", "Hello"], max_tokens=9).json()
    assert [choice["text"] for choice in answer["choices"]] == [expected("abc", 9), expected("Hello", 9)]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": 18, "total_tokens": 26}
    tokens = ask(server.url, prompt=Characters()("abc")["input_ids"], max_tokens=9).json()
    assert tokens["choices"][0]["text"] == expected("abc", 9)
    events = streamed(server.url, prompt=["abc", "Hello"], max_tokens=9, stream_options={"include_usage": True})
    assert events[-1]["usage"] == answer["usage"]
    for index, prompt in enumerate(["abc", "Hello"]):
        own = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == expected(prompt, 9)
        assert own[-1]["finish_reason"] == "length"


def test_a_chat_goes_through_the_template(serve: Serve) -> None:
    server = serve()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}]
    body = {"messages": messages, "max_tokens": 7, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected("u:hi;a:yo;", 7)}
    events = streamed(server.url, "chat/completions", messages=messages, max_tokens=7)
    said = "".join(event["choices"][0]["delta"]["content"] for event in events)
    assert said == expected("u:hi;a:yo;", 7)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_a_stop_string_ends_the_text_before_it(serve: Serve) -> None:
    server, whole = serve(), expected("abc", 30)
    stop = whole[11:14]
    before = whole[: whole.index(stop)]
    answer = ask(server.url, prompt="abc", max_tokens=30, stop=["never there", stop]).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (before, "stop")
    assert text_of(streamed(server.url, prompt="abc", max_tokens=30, stop=stop)) == before
    server.wait_until_idle()


def test_a_token_that_ends_a_text_ends_it_and_is_not_shown(serve: Serve) -> None:
    server, whole = serve(), expected("abc", 30)
    end = whole[9]
    content = json.dumps({"eos_token_id": [ord(end) - 32]}).encode()
    server.service.model.files = {"generation_config.json": content}
    answer = ask(server.url, prompt="abc", max_tokens=30).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(end)], "stop")
    assert answer["usage"]["completion_tokens"] == whole.index(end) + 1


def test_a_seed_repeats_a_sample_whatever_runs_beside_it(serve: Serve) -> None:
    server = serve()
    options = {"prompt": "abc", "max_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    alone = ask(server.url, seed=5, **options).json()["choices"][0]["text"]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(ask, server.url, seed=seed, **options) for seed in (5, 6, 7, 5)]
        found = [job.result().json()["choices"][0]["text"] for job in jobs]
    assert (found[0], found[3]) == (alone, alone)
    assert len(set(found)) > 1


@pytest.mark.parametrize("recipe", ["none", "lolcats{window=5}"])
def test_models_whose_rows_cannot_be_mixed_are_stepped_one_by_one(serve: Serve, recipe: str) -> None:
    name = "llama" if recipe == "none" else "position_parameter"
    server = serve(recipe, name, slots=3)
    assert not server.service.batcher.together
    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(ask, server.url, prompt=prompt, max_tokens=6) for prompt in PROMPTS[:5]]
        found = [job.result().json()["choices"][0]["text"] for job in jobs]
    assert found == [expected(prompt, 6, recipe, name) for prompt in PROMPTS[:5]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ""}, "prompt: it has no tokens"),
        ({"prompt": []}, "there is none"),
        ({"prompt": [[]]}, "prompt: it has no tokens"),
        ({"prompt": [5, 97]}, "token ids must be within 0..96"),
        ({"prompt": [-1]}, "token ids must be within 0..96"),
        ({"prompt": ["a"] * 17}, "at most 16 prompts"),
        ({"prompt": "a" * 300}, "300 tokens, and this server takes 200"),
        ({"prompt": "a", "max_tokens": 10**12}, "max_tokens: 1,000,000,000,000, and this server makes at most 4,096"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 2.5}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "n": 3}, "only n = 1 is done"),
        ({"prompt": "a", "logprobs": 5}, "is not done by this server"),
        ({"prompt": "a", "stop": ["x"] * 9}, "at most 4 stop strings"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ([], "valid"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(garbage_server: str, body: Any, message: str) -> None:
    answer = httpx.post(f"{garbage_server}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def garbage_server() -> Any:
    from linearize.serving.app import Limits, Service
    from tests.serving.conftest import Server, endless

    server = Server(Service(endless("llama", RECIPE), Characters(), "tiny", Limits(prompt_tokens=200)))
    yield server.url
    server.stop()


def test_a_full_server_says_so_and_serves_those_it_took(serve: Serve) -> None:
    server = serve(slots=1, queue=1)
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(ask, server.url, prompt="abc", max_tokens=150) for _ in range(8)]
        answers = [job.result() for job in jobs]
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
            assert "try again shortly" in answer.json()["error"]["message"]
        else:
            assert answer.json()["choices"][0]["text"] == expected("abc", 150)


def test_a_key_is_asked_for_and_the_model_is_listed(serve: Serve) -> None:
    server = serve(key="secret")
    assert ask(server.url, prompt="a").status_code == 401
    header = {"Authorization": "Bearer secret"}
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, headers=header).status_code == 200
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "tiny"
    health = httpx.get(f"{server.url}/health").json()
    assert (health["status"], health["slots"]) == ("ok", 16)
    assert health["state_bytes_a_sequence"] == zoo.compiled("llama", RECIPE).state_bytes()
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    bad = {"messages": [{"role": "wizard", "content": "x"}]}
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=bad, headers=header)
    assert refused.status_code == 400
    assert "the chat template refused them: roles alternate" in refused.json()["error"]["message"]


def test_a_step_that_fails_is_told_and_the_next_request_works(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    batcher = server.service.batcher
    own = batcher.model.decode

    def fails(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(batcher.model, "decode", fails)
    answer = ask(server.url, prompt="abc", max_tokens=5)
    assert answer.status_code == 500
    assert "generation failed: out of luck" in answer.json()["error"]["message"]
    monkeypatch.setattr(batcher.model, "decode", own)
    assert ask(server.url, prompt="abc", max_tokens=5).json()["choices"][0]["text"] == expected("abc", 5)
