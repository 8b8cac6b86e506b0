"""Families of transformers: every attention accounted for, and the compiler's round trip equal to the source."""

import pytest

from tests import zoo, zoo_checks
from tests.zoo import Entry

ENTRIES = zoo.TRANSFORMERS


def names(entries: tuple[Entry, ...]) -> list[object]:
    return [pytest.param(entry, id=entry.name) for entry in entries]


@pytest.mark.parametrize("entry", names(ENTRIES))
def test_every_attention_is_matched_or_refused_as_the_table_says(entry: Entry) -> None:
    zoo_checks.check_sites(entry)


@pytest.mark.parametrize("entry", names(ENTRIES))
def test_none_equals_the_source(entry: Entry) -> None:
    zoo_checks.check_none_equals_source(entry)


@pytest.mark.parametrize("entry", names(ENTRIES))
def test_none_equals_the_source_with_left_padding(entry: Entry) -> None:
    assert zoo_checks.takes_mask(entry)
    zoo_checks.check_left_padding(entry)


@pytest.mark.parametrize("entry", names(tuple(entry for entry in ENTRIES if entry.steps)))
def test_steps_equal_the_source(entry: Entry) -> None:
    zoo_checks.check_steps(entry)


@pytest.mark.parametrize("entry", names(tuple(entry for entry in ENTRIES if entry.carried)))
def test_what_is_no_matched_attention_has_the_state_that_the_table_says(entry: Entry) -> None:
    zoo_checks.check_carried(entry)
    zoo_checks.check_padded_steps(entry)


def test_the_table_names_at_least_forty_families() -> None:
    kinds = {type(zoo.source(entry.name)).__name__ for entry in zoo.TRANSFORMERS}
    assert len(kinds) >= 40, sorted(kinds)
