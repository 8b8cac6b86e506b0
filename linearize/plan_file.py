"""A plan read from a file that a person may have edited: every problem is told with the line that it stands in."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from linearize.errors import RecipeError
from linearize.mixers import mixer_class
from linearize.mixers.share import sharing_problem
from linearize.plan import Plan
from linearize.spec import Site

Place = tuple[str | int, ...]
_SPACE = re.compile(r"[ \t\r\n]*")
_ATOM = re.compile(r"[^,\]}\s]+")
VERSIONS = (1, 2)


@dataclass(frozen=True)
class PlanFile:
    """A plan, and the line of every field of its file by place: ("entries", 2, "mixer")."""

    path: Path
    plan: Plan
    lines: dict[Place, int]

    def check(self, sites: Sequence[Site]) -> None:
        """The plan fits a model: it names each matched site once, and each mixer can replace its site.

        Raises:
            RecipeError: with the line of the entry that does not fit, or naming the sites that are not there.
        """
        by_index = {site.index: site for site in sites}
        seen: dict[int, int] = {}
        for number, entry in enumerate(self.plan.entries):
            if entry.site not in by_index:
                known = sorted(by_index)
                raise self.error(
                    ("entries", number, "site"), f"the model has no matched site {entry.site}; it has {known}"
                )
            if entry.site in seen:
                first = self.lines[("entries", seen[entry.site], "site")]
                raise self.error(("entries", number, "site"), f"site {entry.site} is planned in line {first} already")
            seen[entry.site] = number
            self._check_mixer(number, by_index[entry.site])
        self.plan.check(list(by_index))
        for number in range(len(self.plan.entries)):
            self._check_sharing(number, by_index)

    def _check_mixer(self, number: int, site: Site) -> None:
        entry = self.plan.entries[number]
        try:
            refusal = mixer_class(entry.mixer).refusal_with(site, entry.options)
        except (TypeError, ValueError) as error:
            raise self.error(("entries", number, "options"), f"{entry.mixer}: {error}") from error
        if refusal is not None:
            why = f"site {site.index} ({site.module}): {refusal}; plan keep there"
            raise self.error(("entries", number, "mixer"), why)

    def _check_sharing(self, number: int, by_index: dict[int, Site]) -> None:
        """A cache that is read is another site's, kept and of the same shape."""
        entry = self.plan.entries[number]
        if entry.mixer != "share":
            return
        source = by_index.get(entry.options["of"])
        planned = self.plan.entry(source.index).mixer if source is not None else ""
        problem = sharing_problem(by_index[entry.site], source, planned)
        if problem is not None:
            raise self.error(("entries", number, "options", "of"), f"site {entry.site}: {problem}")

    def error(self, place: Place, problem: str) -> RecipeError:
        return RecipeError(f"{self.path} line {line_of(self.lines, place)}: {dotted(place)}: {problem}")


def read_plan(path: str | Path) -> PlanFile:
    """Raises RecipeError: see `Plan.load`."""
    file = Path(path)
    text = _text(file)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path} line {error.lineno}: not JSON: {error.msg}") from error
    lines = lines_of(text)
    version = data.get("version", 1) if isinstance(data, dict) else 1
    if version not in VERSIONS:
        line = line_of(lines, ("version",))
        raise RecipeError(f"{path} line {line}: version: {version!r} is not known here; this linearize reads 1 and 2")
    try:
        found = PlanFile(file, Plan.model_validate(data), lines)
    except ValidationError as error:
        problem = error.errors()[0]
        place = tuple(problem["loc"])
        told = f"{dotted(place)}: {problem['msg']}" if place else problem["msg"]
        raise RecipeError(f"{path} line {line_of(lines, place)}: {told}") from error
    for number, entry in enumerate(found.plan.entries):
        _check_names(found, ("entries", number), entry.mixer, entry.options)
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the plan {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not UTF-8 text (byte {error.start})") from error


def _check_names(found: PlanFile, place: Place, mixer: str, options: dict[str, Any]) -> None:
    """The mixer exists and has these options, and so have the parts that it may hold."""
    try:
        taken = set(inspect.signature(mixer_class(mixer).__init__).parameters) - {"self", "spec"}
    except RecipeError as error:
        raise found.error((*place, "mixer"), str(error)) from error
    for name in options:
        if name not in taken:
            known = ", ".join(sorted(taken)) or "none"
            raise found.error((*place, "options", name), f"{mixer} has no option {name!r}; it takes {known}")
    parts = options.get("parts", [])
    for number, part in enumerate(parts if isinstance(parts, list) else []):
        if isinstance(part, dict) and isinstance(part.get("options", {}), dict):
            inner = (*place, "options", "parts", number)
            _check_names(found, inner, str(part.get("mixer", "")), part.get("options", {}))


def dotted(place: Place) -> str:
    return ".".join(str(part) for part in place)


def line_of(lines: dict[Place, int], place: Place) -> int:
    """The line of a place, or of the nearest thing around it that the file has."""
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 1)


# ---- where every value of a JSON text stands -------------------------------------------------------------------------


def lines_of(text: str) -> dict[Place, int]:
    """{place: line from 1} of every value of a valid JSON text, a member of an object at its key."""
    found: dict[Place, int] = {}
    _value(text, _skip(text, 0), (), found)
    return found


def _value(text: str, at: int, place: Place, found: dict[Place, int]) -> int:
    """Note the value that starts at `at`, and all in it; where it ends."""
    found.setdefault(place, text.count("\n", 0, at) + 1)
    if text[at] == "{":
        return _members(text, at, place, found)
    if text[at] == "[":
        return _items(text, at, place, found)
    if text[at] == '"':
        return int(scanstring(text, at + 1, True)[1])
    match = _ATOM.match(text, at)
    return match.end() if match else at + 1


def _members(text: str, at: int, place: Place, found: dict[Place, int]) -> int:
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, end = scanstring(text, at + 1, True)
        found[(*place, key)] = text.count("\n", 0, at) + 1
        at = _value(text, _skip(text, _skip(text, end) + 1), (*place, key), found)
        at = _next(text, at)
    return at + 1


def _items(text: str, at: int, place: Place, found: dict[Place, int]) -> int:
    at, number = _skip(text, at + 1), 0
    while text[at] != "]":
        at = _next(text, _value(text, at, (*place, number), found))
        number += 1
    return at + 1


def _next(text: str, at: int) -> int:
    """Behind the comma, if one follows."""
    at = _skip(text, at)
    return _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at
