"""Text as it comes: whole characters, and stop strings that arrive in parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linearize.serving.text import TextStream


class Bytes:
    """Tokens are bytes of UTF-8."""

    def decode(self, tokens: list[int], **_: object) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


@given(st.text(max_size=30), st.text(max_size=10))
def test_the_pieces_are_the_text_and_no_character_is_cut(text: str, prompt: str) -> None:
    stream = TextStream(Bytes(), list(prompt.encode()))
    pieces = [stream.push(token) for token in text.encode()]
    assert "".join([*pieces, stream.flush()]) == text
    assert "�" in text or not any("�" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stops", "found"),
    [
        ("one two three", ["two"], "one "),
        ("ababac", ["abac"], "ab"),
        ("aaab", ["b"], "aaa"),
        ("nothing of it", ["zzz"], "nothing of it"),
        ("it ends as a stop begi", ["begins"], "it ends as a stop begi"),
        ("first second", ["second", "first"], ""),
    ],
)
def test_a_stop_string_is_never_shown_though_it_comes_in_parts(text: str, stops: list[str], found: str) -> None:
    stream = TextStream(Bytes(), [], stops)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    assert "".join([*pieces, stream.flush()]) == found
    assert stream.stopped == any(stop in text for stop in stops)
