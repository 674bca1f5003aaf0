"""Carried evaluation: the stream is one sequence, in constant memory, at any position."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legality import CHUNK, MODES, NET, SEQ_LEN, VOCAB, chunks, evaluation, lively_net, stream

from hymba_lightning.evaluation import TTTConfig, score_first_ttt
from hymba_lightning.evaluation.carried import REBASE_AT, CarriedScorer, read, score_onward
from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.model.attention import turn_back


def whole(net: Hymba, tokens: torch.Tensor) -> torch.Tensor:
    """Nats of tokens[1:] from one forward pass."""
    with torch.no_grad():
        return net(tokens[None, :-1], tokens[None, 1:], reduction="none")[0]


@given(cuts=st.sets(st.integers(1, 99), max_size=6), piece=st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_any_cut_and_piece_gives_the_whole_sequences_nats(cuts, piece):
    net = lively_net()
    tokens = stream(101)
    scorer = CarriedScorer(net, piece, 0, rewarm=False)
    edges = [0, *sorted(cuts), 100]
    scored = [scorer.score(tokens[a : b + 1]) for a, b in itertools.pairwise(edges)]
    assert torch.allclose(torch.cat([part.nats for part in scored]), whole(net, tokens), atol=2e-4)
    assert torch.cat([part.context for part in scored]).tolist() == list(range(1, 101))


def test_chunks_of_the_stream_are_one_sequence():
    assert torch.allclose(evaluation(mode="carried", epochs=0)(stream()), whole(lively_net(), stream()), atol=2e-4)


def test_meta_tokens_stand_once_at_the_start_of_the_stream():
    net = lively_net(HymbaConfig.from_dict(NET.to_dict() | {"meta_tokens": 3}))
    scored = score_first_ttt(net, chunks(stream()), SEQ_LEN, TTTConfig(mode="carried", epochs=0))
    assert torch.allclose(torch.cat([chunk.nats for chunk in scored]), whole(net, stream()), atol=2e-4)


def test_a_state_made_anew_has_read_the_last_tokens_only():
    net, tokens = lively_net(), stream()
    scorer = CarriedScorer(net, SEQ_LEN, 30, rewarm=True)
    scorer.score(tokens[: CHUNK + 1])
    scorer.weights_changed()
    part = scorer.score(tokens[CHUNK : 2 * CHUNK + 1])
    assert torch.allclose(part.nats, whole(net, tokens[CHUNK - 30 : 2 * CHUNK + 1])[30:], atol=2e-4)
    assert part.context.tolist() == list(range(31, 31 + CHUNK))


def test_keep_goes_on_with_the_old_state():
    net, tokens = lively_net(), stream()
    scorer = CarriedScorer(net, SEQ_LEN, 30, rewarm=False)
    scorer.score(tokens[: CHUNK + 1])
    scorer.weights_changed()
    assert torch.allclose(
        scorer.score(tokens[CHUNK : 2 * CHUNK + 1]).nats, whole(net, tokens)[CHUNK : 2 * CHUNK], atol=2e-4
    )


def test_the_position_may_grow_without_end():
    """Past a limit the state is turned back to position 0; a net with window attention gives the same logits."""
    net = lively_net()
    with torch.no_grad():
        _, state = read(net, stream(40)[None], None, 64)
        far = state._replace(position=state.position)
        turned = net.compact(_moved(net, far, REBASE_AT + 7), REBASE_AT)
        assert turned.position == 0
        next_tokens = torch.randint(0, VOCAB, (1, 12))
        expected, _ = net.hidden(next_tokens, state, return_state=True)
        given_back, _ = net.hidden(next_tokens, turned, return_state=True)
    assert torch.allclose(expected, given_back, atol=1e-4)


def _moved(net, state, shift):
    """The state as if it had stood `shift` positions later all along."""
    layers = [layer._replace(keys=turn_back(layer.keys, -shift, net.config.rope_base)) for layer in state.layers]
    return state._replace(layers=layers, position=state.position + shift)


def test_the_state_keeps_no_more_than_it_holds():
    net = lively_net()
    _, state = score_onward(net, torch.randint(0, VOCAB, (601,)), None, 300)
    tensors = state.tensors()
    held = sum(tensor.nbytes for tensor in tensors)
    kept = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    assert kept <= 2 * held


def test_a_growing_state_is_refused():
    net = lively_net(HymbaConfig.from_dict(NET.to_dict() | {"global_layers": [1]}))
    with pytest.raises(ValueError, match="keeps every key"):
        score_first_ttt(net, chunks(stream()), SEQ_LEN, TTTConfig(mode="carried"))


def test_modes_give_each_token_the_context_they_promise():
    least = {}
    for name, mode in MODES.items():
        scored = score_first_ttt(lively_net(), chunks(stream()), SEQ_LEN, TTTConfig(epochs=0, **mode))
        context = torch.cat([chunk.context for chunk in scored])
        place = torch.arange(1, context.numel() + 1)
        assert bool((context <= place).all())
        least[name] = context
    assert least["cold"].tolist()[:CHUNK] == [*range(1, 25), *range(1, 25), *range(1, 13)]
    assert bool((least["sliding"] >= torch.arange(1, least["sliding"].numel() + 1).clamp_max(SEQ_LEN - 7)).all())
    assert least["carried"].tolist() == list(range(1, least["carried"].numel() + 1))
