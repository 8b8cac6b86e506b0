"""Budgets, contexts and pins as they are written on a command line."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from linearize.errors import RecipeError
from linearize.planner.planning import Budget

UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = re.compile(r"^\s*(?P<value>\d+(\.\d+)?)\s*(?P<unit>[a-zA-Z%]*)\s*$")
_MIXER = re.compile(r"^\s*(?P<mixer>[^{}\s]+?)\s*(\{(?P<options>.*)\})?\s*$")
_PIN = re.compile(r"^\s*(?P<site>\d+)\s*=\s*(?P<mixer>[^{}\s]+)\s*(\{(?P<options>.*)\})?\s*$")


def parse_budget(text: str, source_bytes: int) -> Budget:
    """`25%` of the source's bytes, `3MiB`, or `2.5ms` a decoded token.

    Raises:
        RecipeError: it is none of these, or nothing.
    """
    match = _NUMBER.match(text)
    value, unit = (float(match["value"]), match["unit"].lower()) if match else (0.0, "")
    if match is not None and value > 0:
        if unit == "%":
            return Budget(value / 100 * source_bytes, text=text.strip())
        if unit in UNITS or not unit:
            return Budget(value * UNITS.get(unit, 1), text=text.strip())
        if unit in TIMES:
            return Budget(value * TIMES[unit], seconds=True, text=text.strip())
    raise RecipeError(f"cannot read the budget {text!r}; write 25%, 3MiB or 2.5ms")


def parse_context(text: str) -> int:
    """`32k` is 32,768 tokens.

    Raises:
        RecipeError: it is no number of tokens.
    """
    match = re.match(r"^\s*(\d+)\s*([kKmM]?)\s*$", text)
    count = int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()] if match else 0
    if count < 2:
        raise RecipeError(f"cannot read the context {text!r}; write a number of tokens, such as 4096 or 32k")
    return count


def parse_pin(text: str) -> tuple[int, tuple[str, dict[str, Any]]]:
    """`0=keep` or `3=slots{slots=256,window=32}`.

    Raises:
        RecipeError: it is none.
    """
    match = _PIN.match(text)
    if match is not None:
        return int(match["site"]), parse_mixer(f"{match['mixer']}{{{match['options'] or ''}}}")
    raise RecipeError(f"cannot read the pin {text!r}; write site=mixer, such as 0=keep or 3=slots{{slots=256}}")


def parse_mixer(text: str) -> tuple[str, dict[str, Any]]:
    """`keep` or `slots{slots=256,window=32}`.

    Raises:
        RecipeError: it is none.
    """
    match = _MIXER.match(text)
    try:
        options = tomllib.loads("x = {" + (match["options"] or "") + "}")["x"] if match else {}
    except tomllib.TOMLDecodeError:
        match = None
    if match is None:
        raise RecipeError(f"cannot read the mixer {text!r}; write mixer{{option=value}}, such as slots{{slots=256}}")
    return match["mixer"], options
