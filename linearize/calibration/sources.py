"""Text to fit on and to measure on: files, JSON lines, folders, and mixtures of them, packed into rows of tokens.

    corpus.txt          UTF-8 text, one document
    notes.jsonl         a document a line: a string, or an object whose field `text` is one
    notes.jsonl:body    the same, of another field
    folder              all .txt, .md and .jsonl files below it, in the order of their names
    corpus.txt=3        any of these, three times as often in a mixture

Documents are joined by the tokenizer's end-of-text token and cut into rows of one length, so nothing is padded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.errors import DataError

SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Source:
    """Where text comes from, the field of its JSON lines, and its weight in a mixture."""

    path: Path
    field: str = "text"
    weight: float = 1.0

    def __str__(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Coverage:
    """What was read of a source: whole or part of it, in documents and tokens, and how many different tokens."""

    name: str
    documents: int
    tokens: int
    distinct: int

    def __str__(self) -> str:
        documents = f"{self.documents:,} document" + ("s" if self.documents != 1 else "")
        return f"{self.name} ({self.tokens:,} tokens of {documents}, {self.distinct:,} different)"


class TextRows(Sequence[Tensor]):
    """Batches int64 [B, T] for `linearize.compile(calibration=...)`, and what they were made of."""

    def __init__(self, batches: list[Tensor], coverage: list[Coverage]) -> None:
        self._batches, self.coverage = batches, coverage

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    @property
    def description(self) -> str:
        return ", ".join(map(str, self.coverage))


def parse_source(text: str | Path) -> Source:
    """A source as it is written on the command line; a path that exists is taken as it stands.

    Raises:
        DataError: the weight is not above zero, or nothing is there.
    """
    found = str(text)
    if Path(found).exists():
        check_source(Source(Path(found)))
        return Source(Path(found))
    path, separator, weight = found.rpartition("=")
    share = _number(weight) if separator else 1.0
    path = path if separator and share is not None else found
    if share is not None and not 0 < share < float("inf"):
        raise DataError(f"{found}: the weight of a source must be above zero, not {weight}")
    name, colon, field = path.rpartition(":")
    if colon and field and name.endswith(".jsonl") and not Path(path).exists():
        source = Source(Path(name), field, share or 1.0)
    else:
        source = Source(Path(path), weight=share or 1.0)
    check_source(source)
    return source


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_source(source: Source) -> None:
    """Fail before the model is loaded when a source cannot be used.

    Raises:
        DataError: it is missing, unreadable, empty, or a folder without text.
    """
    for file in files_of(source):
        try:
            with file.open("rb") as stream:
                empty = not stream.read(1)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}") from error
        if empty and not source.path.is_dir():
            raise DataError(f"{file} is empty; calibration needs text")


def files_of(source: Source) -> list[Path]:
    if not source.path.is_dir():
        return [source.path]
    found = sorted(path for path in source.path.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not found:
        raise DataError(f"the folder {source.path} holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    return found


def documents(source: Source) -> Iterator[str]:
    """The texts of a source that are not blank.

    Raises:
        DataError: a file cannot be read or is no UTF-8, or a line is no JSON or has no text in its field.
    """
    for file in files_of(source):
        texts = _lines(file, source.field) if file.suffix == ".jsonl" else iter([_whole(file)])
        yield from (text for text in texts if text.strip())


def _whole(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


def _lines(file: Path, field: str) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _document(line, f"{file}, line {number}", field)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


def _document(line: str, where: str, field: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error.msg})") from error
    text = value.get(field) if isinstance(value, dict) else value
    if not isinstance(text, str):
        has = f"; it has {', '.join(sorted(value))}" if isinstance(value, dict) else ""
        raise DataError(f"{where}: no text in the field {field!r}{has}")
    return text


def read_rows(source: Source, tokenizer: Any, length: int, tokens: int) -> tuple[Tensor, Coverage]:
    """int64 [rows, length], at most `tokens` tokens in all; one shorter row where there is less than `length`.

    Raises:
        DataError: see `documents`; or fewer than 2 tokens are there.
    """
    ids: list[int] = []
    count, between = 0, tokenizer.eos_token_id
    for text in documents(source):
        ids += [between] if ids and between is not None else []
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        count += 1
        if len(ids) >= tokens:
            break
    found = torch.tensor(ids, dtype=torch.int64)[: max(tokens, 2)]
    if not count:
        raise DataError(f"{source.path} is empty; calibration needs text")
    if found.numel() < 2:
        raise DataError(f"{source.path} holds {found.numel()} token; calibration needs at least 2")
    rows = found[None] if found.numel() < length else found[: found.numel() // length * length].reshape(-1, length)
    return rows, Coverage(str(source), count, rows.numel(), int(rows.unique().numel()))


def read_mixture(sources: Sequence[Source], tokenizer: Any, length: int, tokens: int, batch: int) -> TextRows:
    """Rows of several sources by their weights, mixed evenly, `tokens` tokens in all or what is there.

    Every prefix holds about the right shares, so a held-out part does too. A source that runs out leaves its place to
    the others.

    Raises:
        DataError: see `read_rows`; or one of several sources does not fill a row.
    """
    total = sum(source.weight for source in sources)
    read = [read_rows(one, tokenizer, length, max(2, round(tokens * one.weight / total))) for one in sources]
    for source, (rows, _) in zip(sources, read, strict=True):
        if len(sources) > 1 and rows.shape[1] < length:
            raise DataError(f"{source.path} gives {rows.shape[1]} tokens, less than one row of {length}; leave it out")
    order = evenly([len(rows) for rows, _ in read])
    taken = [iter(rows) for rows, _ in read]
    mixed = [next(taken[index]) for index in order]
    batches = [torch.stack(mixed[start : start + batch]) for start in range(0, len(mixed), batch)]
    return TextRows(batches, [coverage for _, coverage in read])


def evenly(counts: Sequence[int]) -> list[int]:
    """Index i `counts[i]` times, each spread evenly over the whole."""
    places = [((done + 0.5) / count, index) for index, count in enumerate(counts) for done in range(count)]
    return [index for _, index in sorted(places)]
