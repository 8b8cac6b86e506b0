"""What is asked of every entry of the zoo."""

import pytest
import torch

from linearize.errors import CaptureError, VerificationError
from linearize.program import MASK
from linearize.spec import NoMatch, Site
from tests import zoo
from tests.zoo import Entry

SHAPES = ((1, 1), (3, 20), (1, 33))  # traced was (2, 13)


def check_sites(entry: Entry) -> None:
    """Every attention matched or refused, with the mask, extras and reason that the table says."""
    sites = zoo.captured(entry.name).sites
    matched = [site for site in sites if isinstance(site, Site)]
    refused = [site for site in sites if isinstance(site, NoMatch)]
    assert [site.index for site in sites] == list(range(len(sites)))
    assert (len(matched), len(refused)) == (entry.matched, entry.refused), [site.reason for site in refused]
    for number, site in enumerate(matched):
        assert str(site.attention.mask) == entry.mask_of(number)
        assert set(entry.extras) <= set(site.extras)
    for near_miss in refused:
        assert entry.reason in near_miss.reason
        assert near_miss.nodes
        assert near_miss.module


def check_none_equals_source(entry: Entry) -> None:
    """Logits equal at batches and lengths that were not traced."""
    compiled = zoo.compiled(entry.name)
    assert compiled.program.max_positions == entry.limit or entry.refused
    for batch, length in SHAPES:
        ids = zoo.tokens(batch, length)
        with torch.no_grad():
            actual = compiled(ids).logits
        assert zoo.difference(actual, zoo.source_logits(entry.name, ids)) <= 1e-5, (batch, length)


def check_left_padding(entry: Entry) -> None:
    """Logits of real tokens equal the source's where it takes a mask; padding rows are nobody's business."""
    ids, mask = zoo.tokens(3, 17), torch.ones(3, 17, dtype=torch.int64)
    for row, padding in enumerate((0, 3, 12)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    with torch.no_grad():
        actual = zoo.compiled(entry.name)(ids, attention_mask=mask).logits
    expected = zoo.source_logits(entry.name, ids, mask)
    real = mask.bool()
    assert zoo.difference(actual[real], expected[real]) <= 1e-5


def check_steps(entry: Entry) -> None:
    """One by one, in two pieces and in one piece: the same logits, and those of the source."""
    compiled, ids = zoo.compiled(entry.name), zoo.tokens(2, 15)
    expected = zoo.source_logits(entry.name, ids)
    with torch.no_grad():
        for pieces in ((15,), (4, 11), (9, 6), (1,) * 15):
            found, state = [], None
            for part in ids.split(pieces, dim=1):
                logits, state = compiled.step(part, state)
                found.append(logits)
            actual = found[-1] if entry.last_only else torch.cat(found, dim=1)
            assert zoo.difference(actual, expected) <= 1e-4, pieces
            assert state is not None
            assert state.nbytes == compiled.state_bytes(batch=2, context=15)


def check_refusal(entry: Entry) -> None:
    """Models that are not taken raise the one error that the table names."""
    if entry.error:
        with pytest.raises(CaptureError, match=entry.error):
            zoo.captured(entry.name)
        return
    with pytest.raises(VerificationError, match=entry.not_stepped):
        zoo.compiled(entry.name)


def with_source_mask(entries: tuple[Entry, ...]) -> list[Entry]:
    """Entries of a library whose models take an attention mask."""
    return [entry for entry in entries if entry.family == "transformers" and not (entry.error or entry.not_stepped)]


def takes_mask(entry: Entry) -> bool:
    return MASK in zoo.captured(entry.name).input_names()
