"""Compiled passes of an evaluation: the same scores, and few compilations whatever the lengths."""

import functools

import pytest
import torch
from legality import ADAPT, MODES, SEQ_LEN, VOCAB, chunks, lively_net

from hymba_lightning.evaluation import TTTConfig, carried, recorded, score_first_ttt
from hymba_lightning.evaluation.compiled import MOST_KINDS, CompiledForward
from hymba_lightning.evaluation.recorded import RecordedForward


@pytest.fixture
def compilations(monkeypatch):
    """The shapes of what was compiled, by dynamo alone: no compiler is needed."""
    made = []

    def backend(graph, examples):
        made.append([tuple(x.shape) for x in examples if isinstance(x, torch.Tensor) and x.dtype == torch.int64])
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield made
    torch._dynamo.reset()


def text(n_tokens):
    return torch.randint(2, VOCAB, (n_tokens,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("mode", "kinds"), [("cold", 2), ("sliding", MOST_KINDS + 1), ("carried", 3)])
def test_scores_and_updates_are_those_of_the_network_as_it_is(mode, kinds, compilations, monkeypatch):
    """Of carried pieces those at the two positions that come again are compiled; and one shape of updates, whose own
    length must not make a variable of scoring's."""
    monkeypatch.setattr(carried, "REBASE_AT", 2 * SEQ_LEN)
    nats = []
    for compiled in (False, True):
        config = TTTConfig(**(ADAPT | MODES[mode] | {"compile": compiled, "train_seq_len": 16, "batch_seqs": 3}))
        scored = score_first_ttt(lively_net(), chunks(text(600), 2 * SEQ_LEN), SEQ_LEN, config)
        nats.append(torch.cat([chunk.nats for chunk in scored]))
        assert bool(compilations) == compiled
    assert nats[1] == pytest.approx(nats[0], abs=1e-4)
    assert len(compilations) <= kinds
    assert all(type(size) is int for shapes in compilations for shape in shapes for size in shape)


@pytest.mark.parametrize("mode", ["cold", "carried"])
def test_nothing_is_compiled_while_a_pass_is_recorded(mode, compilations, monkeypatch):
    """No graph would hold it."""
    captures, made = [], RecordedForward.__init__

    def capture(compute, pool):
        before = len(compilations)
        result = compute()
        captures.append(len(compilations) - before)
        return (lambda: None), result

    monkeypatch.setattr(carried, "REBASE_AT", 2 * SEQ_LEN)
    monkeypatch.setattr(recorded, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(RecordedForward, "__init__", lambda self, forward, record: made(self, forward, record=True))
    config = TTTConfig(**(ADAPT | MODES[mode] | {"compile": True, "train_seq_len": 16, "score_batch_seqs": 2}))
    score_first_ttt(lively_net(), chunks(text(600), 2 * SEQ_LEN), SEQ_LEN, config)
    assert captures
    assert not any(captures)


class Doubles:
    def forward(self, inputs, targets):
        return 2 * inputs + targets

    __call__ = forward


def test_ragged_lengths_and_ever_new_batches_run_as_they_are(compilations):
    forward = CompiledForward(Doubles(), 8)
    for rows in [*range(1, 8), *range(1, 8)]:
        for length in (3, 8):
            ids = torch.randint(2, VOCAB, (rows, length))
            assert torch.equal(forward(ids, ids), 3 * ids)
    assert [shapes[0] for shapes in compilations] == [(rows, 8) for rows in range(1, MOST_KINDS + 1)]


def test_what_comes_once_is_not_compiled(compilations):
    forward = CompiledForward(Doubles(), 8)
    for rows in range(1, 50):
        ids = torch.randint(2, VOCAB, (rows, 8))
        forward(ids, ids)
    assert compilations == []
