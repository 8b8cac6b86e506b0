"""`linearize serve`: starts, answers, says where, and refuses an address that is taken."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.cli.conftest import assert_one_error


def test_it_serves_until_it_is_interrupted(compiled_dir: Path) -> None:
    code = "from linearize.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, "serve", str(compiled_dir), "--port", "0", "--slots", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = ""
        while (found := re.search(r"serving (http://\S+)/v1 as llama", said)) is None:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert "2 slots of" in said
        body = {"prompt": "hello", "max_tokens": 4}
        answer = httpx.post(f"{found[1]}/v1/completions", json=body, timeout=60, trust_env=False)
        assert answer.json()["usage"]["prompt_tokens"] == 5
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130, -signal.SIGINT)
    assert "Traceback" not in process.stderr.read()


def test_an_address_that_is_taken_is_refused(run: Any, compiled_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = run("serve", compiled_dir, "--port", port)
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr


def test_a_source_model_is_refused(run: Any, llama_dir: Path) -> None:
    assert_one_error(run("serve", llama_dir), "holds no linearize.json")
