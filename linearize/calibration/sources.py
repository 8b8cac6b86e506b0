"""Text to fit on and to measure on: files, JSON lines, folders, and mixtures of them, packed into rows of tokens.

    corpus.txt          UTF-8 text, one document
    notes.jsonl         a document a line: a string, or an object whose field `text` is one
    notes.jsonl:body    the same, of another field
    folder              all .txt, .md and .jsonl files below it, in the order of their names
    saved/              a folder that `datasets` wrote by save_to_disk; saved/@test:body for another split and field
    hf:org/name         a dataset of the hub, read as a stream; hf:org/name/config@split:field
    recall, long        rows made on the fly (`generated`): what is to be recalled, near and far, and in longer rows
    corpus.txt=3        any of these, three times as often in a mixture

Documents are joined by the tokenizer's end-of-text token and cut into rows of one length, so nothing is padded. A
dataset (`datasets`) needs the extra linearize[data].
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.calibration.generated import LONGER, distances_of, long_rows, recall_rows
from linearize.calibration.saved_datasets import hub_texts, is_saved, saved_texts
from linearize.errors import DataError

GENERATED = ("recall", "long")
DATASET = re.compile(r"(?P<hub>hf:)?(?P<path>[^@:]+)(@(?P<split>[^@:]+))?(:(?P<field>[^@:]+))?")
SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Source:
    """Where text comes from, the field of its JSON lines or rows, its weight in a mixture, and a dataset's split.

    `kind`: files, "saved" and "hub" datasets, or what is made on the fly ("recall", "long").
    """

    path: Path
    field: str = "text"
    weight: float = 1.0
    kind: str = "files"
    split: str = ""

    def __str__(self) -> str:
        return str(self.path) if self.kind == "hub" else self.path.name

    @property
    def is_generated(self) -> bool:
        return self.kind in GENERATED


@dataclass(frozen=True)
class Coverage:
    """What was read of a source: whole or part of it, in documents and tokens, and how many different tokens; of rows
    made on the fly (smallest, median, largest) distance to look back."""

    name: str
    documents: int
    tokens: int
    distinct: int
    distances: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        if self.distances is not None:
            low, _, high = self.distances
            back = f"recalled from {low} to {high:,} back"
            return f"{self.name} ({self.tokens:,} tokens, {self.distinct:,} different, {back})"
        documents = f"{self.documents:,} document" + ("s" if self.documents != 1 else "")
        return f"{self.name} ({self.tokens:,} tokens of {documents}, {self.distinct:,} different)"


class TextRows(Sequence[Tensor]):
    """Batches int64 [B, T] for `linearize.compile(calibration=...)`, and what they were made of."""

    def __init__(self, batches: list[Tensor], coverage: list[Coverage], vocabulary: int | None = None) -> None:
        self._batches, self.coverage, self.vocabulary = batches, coverage, vocabulary

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    @property
    def description(self) -> str:
        return ", ".join(map(str, self.coverage))

    def report(self) -> list[str]:
        """What the data covers, a line a shard and one for all of it."""
        every = torch.cat([batch.flatten() for batch in self._batches]).unique().numel()
        share = f" of the vocabulary's {self.vocabulary:,}" if self.vocabulary else ""
        tokens = sum(batch.numel() for batch in self._batches)
        lengths = sorted({batch.shape[1] for batch in self._batches})
        rows = f"{tokens:,} tokens in rows of {', '.join(map(str, lengths))}: {every:,} different token ids{share}"
        return [*map(str, self.coverage), rows]


def parse_source(text: str | Path) -> Source:
    """A source as it is written on the command line; a path that exists is taken as it stands.

    Raises:
        DataError: the weight is not above zero, or nothing is there.
    """
    found = str(text)
    if Path(found).exists():
        source = Source(Path(found), kind="saved" if is_saved(Path(found)) else "files")
        check_source(source)
        return source
    path, separator, weight = found.rpartition("=")
    share = _number(weight) if separator else 1.0
    path = path if separator and share is not None else found
    if share is not None and not 0 < share < float("inf"):
        raise DataError(f"{found}: the weight of a source must be above zero, not {weight}")
    special = _special(path, share or 1.0)
    if special is not None:
        return special
    name, colon, field = path.rpartition(":")
    if colon and field and name.endswith(".jsonl") and not Path(path).exists():
        source = Source(Path(name), field, share or 1.0)
    else:
        source = Source(Path(path), weight=share or 1.0)
    check_source(source)
    return source


def _special(text: str, weight: float) -> Source | None:
    """A dataset, or rows made on the fly; None for files."""
    if text in GENERATED:
        return Source(Path(text), weight=weight, kind=text)
    match = DATASET.fullmatch(text)
    if match is None:
        return None
    split, field = match["split"] or "", match["field"] or "text"
    if match["hub"]:
        return Source(Path(match["path"]), field, weight, "hub", split)
    path = Path(match["path"])
    return Source(path, field, weight, "saved", split) if is_saved(path) else None


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
    for file in files_of(source) if source.kind == "files" else ():
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
    if source.kind == "saved":
        yield from (text for text in saved_texts(source.path, source.split, source.field) if text.strip())
    elif source.kind == "hub":
        name, config = "/".join(source.path.parts[:2]), "/".join(source.path.parts[2:])
        yield from (text for text in hub_texts(name, config, source.split, source.field) if text.strip())
    for file in files_of(source) if source.kind == "files" else ():
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


def read_rows(
    source: Source, tokenizer: Any, length: int, tokens: int, vocabulary: int | None = None
) -> tuple[Tensor, Coverage]:
    """int64 [rows, length], at most `tokens` tokens in all; one shorter row where there is less than `length`.

    Raises:
        DataError: see `documents`; or fewer than 2 tokens are there, or a token is not in the model's vocabulary.
    """
    ids = array("q")
    count, between = 0, tokenizer.eos_token_id
    for text in documents(source):
        ids.extend([between] if ids and between is not None else [])
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        count += 1
        if len(ids) >= tokens:
            break
    found = torch.tensor(ids, dtype=torch.int64)[: max(tokens, 2)]
    if not count:
        raise DataError(f"{source.path} is empty; calibration needs text")
    if found.numel() < 2:
        raise DataError(f"{source.path} holds {found.numel()} token; calibration needs at least 2")
    if vocabulary is not None and int(found.max()) >= vocabulary:
        raise DataError(
            f"{source.path} gives token id {int(found.max())}, outside the model's vocabulary 0..{vocabulary - 1}: its "
            "tokenizer is another model's"
        )
    rows = found[None] if found.numel() < length else found[: found.numel() // length * length].reshape(-1, length)
    return rows, Coverage(str(source), count, rows.numel(), int(rows.unique().numel()))


def read_mixture(
    sources: Sequence[Source],
    tokenizer: Any,
    length: int,
    tokens: int,
    batch: int,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> TextRows:
    """Rows of several sources by their weights, mixed evenly, `tokens` tokens in all or what is there.

    Every prefix holds about the right shares, so a held-out part does too. A source that runs out leaves its place to
    the others. Rows made on the fly are of `length` too, but those of "long" `generated.LONGER` times that, within
    the model's `limit`.

    Raises:
        DataError: see `read_rows`; or one of several sources does not fill a row.
    """
    total = sum(source.weight for source in sources)
    wanted = {source: max(2, round(tokens * source.weight / total)) for source in sources}
    texts = [source for source in sources if not source.is_generated]
    read = [read_rows(one, tokenizer, length, wanted[one], vocabulary) for one in texts]
    pool = torch.cat([rows.flatten() for rows, _ in read]) if read else torch.arange(vocabulary or len(tokenizer))
    long = min(LONGER * length, limit or LONGER * length)
    made = [
        _made(one, pool, long if one.kind == "long" else length, wanted[one]) for one in sources if one.is_generated
    ]
    usual = [*read, *(one for one in made if one[0].shape[1] == length)]
    batches = _mixed(usual, list(zip(texts, read, strict=True)), length, batch, len(sources))
    longer = [rows.split(max(1, batch * length // rows.shape[1])) for rows, _ in made if rows.shape[1] != length]
    parts = [batches, *map(list, longer)]
    taken = [iter(part) for part in parts]
    order = evenly([len(part) for part in parts])
    return TextRows([next(taken[i]) for i in order], [coverage for _, coverage in [*read, *made]], vocabulary)


def _made(source: Source, pool: Tensor, length: int, tokens: int) -> tuple[Tensor, Coverage]:
    """Rows made on the fly, always the same ones for the same text."""
    generator = torch.Generator().manual_seed(0)
    draw = recall_rows if source.kind == "recall" else long_rows
    made = draw(max(1, tokens // length), length, pool, generator)
    ids = made.input_ids
    return ids, Coverage(source.kind, len(ids), ids.numel(), int(ids.unique().numel()), distances_of(made))


def _mixed(
    read: list[tuple[Tensor, Coverage]],
    texts: list[tuple[Source, tuple[Tensor, Coverage]]],
    length: int,
    batch: int,
    count: int,
) -> list[Tensor]:
    """Batches of rows of one length, of all sources evenly."""
    for source, (rows, _) in texts:
        if count > 1 and rows.shape[1] < length:
            raise DataError(f"{source.path} gives {rows.shape[1]} tokens, less than one row of {length}; leave it out")
    order = evenly([len(rows) for rows, _ in read])
    taken = [iter(rows) for rows, _ in read]
    mixed = [next(taken[index]) for index in order]
    return [torch.stack(mixed[start : start + batch]) for start in range(0, len(mixed), batch)]


def evenly(counts: Sequence[int]) -> list[int]:
    """Index i `counts[i]` times, each spread evenly over the whole."""
    places = [((done + 0.5) / count, index) for index, count in enumerate(counts) for done in range(count)]
    return [index for _, index in sorted(places)]
