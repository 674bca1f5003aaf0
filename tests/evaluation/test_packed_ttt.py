"""Test-time training of a network whose documents are packed: every mode scores a document by itself."""

import dataclasses

import pytest
import torch
from legality import ADAPT, CHUNK, MODES, NET, SEQ_LEN, VOCAB, chunks, lively_net, stream

from hymba_lightning.evaluation import TTTConfig, score_first_ttt

STARTS = [0, 25, 90, 100]
PACKED = dataclasses.replace(NET, packed_documents=True)


def nats(tokens, config=PACKED, **changes):
    """Of tokens[1:]."""
    scored = score_first_ttt(lively_net(config), chunks(tokens), SEQ_LEN, TTTConfig(**changes), stream=tokens)
    return torch.cat([chunk.nats for chunk in scored])


def with_other_tokens(first, last):
    tokens = stream()
    tokens[first:last] = (tokens[first:last] + 3) % (VOCAB - 2) + 2
    return tokens


@pytest.mark.parametrize("mode", MODES)
def test_what_stood_before_a_document_does_not_change_its_score(mode):
    """By no bit, as long as nothing was learned from it."""
    tokens, other = stream(), with_other_tokens(26, 90)
    before, after = (nats(text, epochs=0, **MODES[mode]) for text in (tokens, other))
    assert torch.equal(before[90:], after[90:])
    assert not torch.equal(before[25:89], after[25:89])
    reading = [nats(text, NET, epochs=0, **MODES[mode]) for text in (tokens, other)]
    assert not torch.equal(reading[0][90:], reading[1][90:]), "without the option it does"


def test_carried_scores_are_those_of_whole_documents():
    """Across chunks and pieces, up to the update: each document as one sequence from an empty state."""
    tokens, net = stream(), lively_net(PACKED)
    found = nats(tokens, epochs=0, **MODES["carried"])
    with torch.no_grad():
        for first, last in zip(STARTS, [*STARTS[1:], len(tokens)], strict=True):
            text = tokens[first:last]
            alone = net(text[None, :-1], text[None, 1:], reduction="none")[0]
            torch.testing.assert_close(found[first : last - 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_it_learns_in_every_mode(mode):
    """What it learned from the first chunk changes the scores of the second, and only those."""
    fixed, adapted = (nats(stream(), **ADAPT | {"epochs": epochs}, **MODES[mode]) for epochs in (0, 1))
    assert torch.equal(fixed[:CHUNK], adapted[:CHUNK])
    assert adapted.isfinite().all()
    assert not torch.equal(fixed[CHUNK:], adapted[CHUNK:])
