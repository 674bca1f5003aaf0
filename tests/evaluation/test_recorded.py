"""Recorded passes of an evaluation: the same scores as the network's own, from few recordings whatever the lengths."""

import pytest
import torch
from legality import ADAPT, MODES, NET, SEQ_LEN, VOCAB, chunks, lively_net

from hymba_lightning.evaluation import TTTConfig, carried, recorded, score_first_ttt
from hymba_lightning.evaluation.recorded import CALLS_BEFORE_RECORDING, MOST_KINDS, RecordedForward
from hymba_lightning.model import Hymba, RuntimeConfig
from hymba_lightning.model.gradients import MOST_GRAPHS, GraphRecordingError


def text(n_tokens, seed=3):
    return torch.randint(2, VOCAB, (n_tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def recordings(monkeypatch):
    """The results of what was recorded, each with its replays: a repetition overwrites the first's tensors, as a
    graph's does."""
    made = []

    def capture(compute, pool):
        result, replays = compute(), []

        def replay():
            replays.append(1)
            for old, new in zip(tensors(result), tensors(compute()), strict=True):
                old.copy_(new)

        made.append(replays)
        return replay, result

    monkeypatch.setattr(recorded, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return made


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [result[0], *result[1].tensors()]


@pytest.mark.parametrize("mode", list(MODES))
def test_a_stream_that_adapts_is_scored_as_by_the_network_itself(mode, recordings, monkeypatch):
    monkeypatch.setattr(carried, "REBASE_AT", 2 * SEQ_LEN)
    config, stream = TTTConfig(**(ADAPT | MODES[mode])), text(601)
    itself = score_first_ttt(lively_net(), chunks(stream, 2 * SEQ_LEN), SEQ_LEN, config)
    assert recordings == []
    made = RecordedForward.__init__
    monkeypatch.setattr(RecordedForward, "__init__", lambda self, forward, record: made(self, forward, record=True))
    replayed = score_first_ttt(lively_net(), chunks(stream, 2 * SEQ_LEN), SEQ_LEN, config)
    assert 0 < len(recordings) <= MOST_GRAPHS
    assert all(recordings)
    for mine, own in zip(replayed, itself, strict=True):
        torch.testing.assert_close(mine.nats, own.nats, rtol=0, atol=1e-5)
        assert torch.equal(mine.context, own.context)


def test_calls_of_a_kind_see_one_layout_before_and_while_they_are_recorded(recordings, monkeypatch):
    """Kernels may be tuned anew for other strides, which no graph holds."""
    monkeypatch.setattr(carried, "REBASE_AT", 2 * SEQ_LEN)
    net, seen = lively_net(), {}

    def forward(inputs, targets, *, state=None, **options):
        if state is not None:
            strides = tuple(tensor.stride() for tensor in (inputs, targets, *state.tensors()))
            seen.setdefault(state.position, set()).add(strides)
        return net(inputs, targets, state=state, **options)

    carried.score_onward(net, text(601), None, SEQ_LEN, RecordedForward(forward, record=True))
    assert len(recordings) == len(seen) == 2
    assert [len(layouts) for layouts in seen.values()] == [1, 1]


def test_what_was_returned_is_not_overwritten_by_the_next_call(recordings):
    forward, ids = RecordedForward(lively_net(), record=True), text(2 * SEQ_LEN + 1)
    pieces = ids[:-1].view(2, 1, SEQ_LEN), ids[1:].view(2, 1, SEQ_LEN)
    first = [forward(pieces[0][0], pieces[1][0], reduction="none") for _ in range(CALLS_BEFORE_RECORDING + 2)]
    before = first[-1].clone()
    forward(pieces[0][1], pieces[1][1], reduction="none")
    assert torch.equal(first[-1], before)


def test_ever_new_lengths_are_counted_and_recorded_up_to_a_number(recordings):
    forward = RecordedForward(lively_net(), record=True)
    for length in range(1, MOST_KINDS + 9):
        for _ in range(CALLS_BEFORE_RECORDING + 1):
            ids = text(length)[None]
            forward(ids, ids, reduction="none")
    assert len(recordings) == MOST_GRAPHS


def test_a_pass_that_no_graph_can_hold_is_told(recordings, monkeypatch):
    def refuse(compute, pool):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(recorded, "capture", refuse)
    forward, ids = RecordedForward(lively_net(), record=True), text(8)[None]
    for _ in range(CALLS_BEFORE_RECORDING):
        forward(ids, ids)
    with pytest.raises(GraphRecordingError, match=r"1 × 8 tokens cannot be recorded.*model\.cuda_graph to false"):
        forward(ids, ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_gives_the_nats_that_it_was_recorded_from(mode, dtype, monkeypatch):
    config, stream, nats = TTTConfig(**(ADAPT | MODES[mode] | {"epochs": 0})), text(601), []
    for record in (True, False):
        net = Hymba(NET, RuntimeConfig(compute_dtype=dtype)).cuda()
        net.load_state_dict(lively_net().state_dict())
        if not record:
            monkeypatch.setattr(recorded, "CALLS_BEFORE_RECORDING", 10**9)
        scored = score_first_ttt(net, chunks(stream, 2 * SEQ_LEN), SEQ_LEN, config)
        nats.append(torch.cat([chunk.nats for chunk in scored]))
    assert torch.equal(*nats)
