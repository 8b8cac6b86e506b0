"""Models written by people who never heard of this project, and models that cannot be taken."""

import pytest

from tests import zoo, zoo_checks
from tests.zoo import Entry

TAKEN = tuple(entry for entry in zoo.PLAIN if not entry.error)
LEFT = tuple(entry for entry in zoo.PLAIN if entry.error)


def names(entries: tuple[Entry, ...]) -> list[object]:
    return [pytest.param(entry, id=entry.name) for entry in entries]


@pytest.mark.parametrize("entry", names(TAKEN))
def test_every_attention_is_matched_or_refused_as_the_table_says(entry: Entry) -> None:
    zoo_checks.check_sites(entry)


@pytest.mark.parametrize("entry", names(TAKEN))
def test_none_equals_the_source(entry: Entry) -> None:
    zoo_checks.check_none_equals_source(entry)


@pytest.mark.parametrize("entry", names(tuple(entry for entry in TAKEN if entry.steps)))
def test_steps_equal_the_source(entry: Entry) -> None:
    zoo_checks.check_steps(entry)


@pytest.mark.parametrize("entry", names(tuple(entry for entry in TAKEN if entry.steps)))
def test_what_is_no_matched_attention_has_the_state_that_the_table_says(entry: Entry) -> None:
    zoo_checks.check_carried(entry)


@pytest.mark.parametrize("entry", names(tuple(entry for entry in TAKEN if entry.whole_only)))
def test_what_looks_ahead_runs_whole_and_says_why_it_does_not_step(entry: Entry) -> None:
    zoo_checks.check_whole_only(entry)


@pytest.mark.parametrize("entry", names(LEFT))
def test_what_cannot_be_taken_says_why(entry: Entry) -> None:
    zoo_checks.check_refusal(entry)
