"""What is asked of every entry of the zoo."""

import pytest
import torch

from linearize.errors import CaptureError, RewriteError, StateError
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
    assert compiled.program.max_positions == entry.limit or entry.whole_only
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


def check_carried(entry: Entry) -> None:
    """What mixes tokens and is no matched attention has the state that the table says, and no more."""
    found = [spec.shape for spec in zoo.compiled(entry.name).state_specs if spec.name.startswith("carried")]
    assert tuple(found) == entry.carried


def check_padded_steps(entry: Entry) -> None:
    """Rows with padding on the left, prefilled in two pieces and then stepped, give what they give in one call."""
    compiled, ids, mask = zoo.compiled(entry.name), zoo.tokens(2, 15), torch.ones(2, 15, dtype=torch.int64)
    ids[1, :4], mask[1, :4] = 0, 0
    found, state = [], None
    with torch.no_grad():
        for part, real in zip(ids.split((6, 7, 1, 1), 1), mask.split((6, 7, 1, 1), 1), strict=True):
            logits, state = compiled.step(part, state, attention_mask=real)
            found.append(logits)
        expected, _ = compiled.step(ids, attention_mask=mask)
    real = mask.bool()
    assert zoo.difference(torch.cat(found, 1)[real], expected[real]) <= 1e-4


def check_refusal(entry: Entry) -> None:
    """Models that are not taken raise the one error that the table names."""
    with pytest.raises((CaptureError, RewriteError), match=entry.error):
        zoo.compiled(entry.name)


def check_whole_only(entry: Entry) -> None:
    """What looks ahead runs on whole sequences, and says why it does not step."""
    compiled = zoo.compiled(entry.name)
    assert entry.whole_only in compiled.program.stateless_reason
    with pytest.raises(StateError, match="looks ahead"):
        compiled.step(zoo.tokens(1, 3))


def with_source_mask(entries: tuple[Entry, ...]) -> list[Entry]:
    """Entries of a library whose models take an attention mask."""
    return [entry for entry in entries if entry.family == "transformers" and not entry.error]


def takes_mask(entry: Entry) -> bool:
    return MASK in zoo.captured(entry.name).input_names()
