"""Scoring: windows cover each target once, batches change nothing, sliding windows give context, sums are exact."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hymba_lightning.data.sequences import Batch
from hymba_lightning.evaluation import Score, score_tokens
from hymba_lightning.evaluation.batches import score_batches
from hymba_lightning.evaluation.score import plan_windows
from hymba_lightning.model import Hymba, HymbaConfig

SMALL = HymbaConfig(
    vocab_size=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, window=8, d_state=4, bigram_buckets=32, bigram_dim=8
)


@pytest.fixture(scope="module")
def net() -> Hymba:
    torch.manual_seed(0)
    net = Hymba(SMALL)
    for parameter in net.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.2)
    return net


@given(n_tokens=st.integers(1, 200), n_context=st.integers(1, 60), seq_len=st.integers(1, 50), data=st.data())
def test_each_target_is_in_exactly_one_window(n_tokens, n_context, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    covered = []
    for window in plan_windows(n_tokens, n_context, seq_len, stride):
        assert 0 <= window.start < window.first < window.stop
        assert window.stop - 1 - window.start <= seq_len
        if stride < seq_len:
            assert window.first - window.start >= min(seq_len - stride, window.first)
        covered += range(window.first, window.stop)
    assert covered == list(range(n_context, n_context + n_tokens))


def test_cold_sequences_equal_separate_forward_passes(net):
    tokens = torch.randint(0, 64, (71,))
    nats = score_tokens(net, tokens, 1, seq_len=16, stride=16, batch_size=3)
    expected = []
    with torch.no_grad():
        for first in range(0, 70, 16):
            piece = tokens[first : first + 17][None]
            expected.append(net(piece[:, :-1], piece[:, 1:], reduction="none")[0])
    assert torch.allclose(nats, torch.cat(expected), atol=1e-5)
    assert nats.numel() == 70


def test_a_stride_of_one_scores_each_token_with_the_longest_context(net):
    tokens = torch.randint(0, 64, (40,))
    nats = score_tokens(net, tokens, 1, seq_len=12, stride=1, batch_size=4)
    with torch.no_grad():
        for target in (1, 5, 12, 13, 30, 39):
            start = max(target - 12, 0)
            logits = net(tokens[None, start:target])[0, -1]
            assert float(nats[target - 1]) == pytest.approx(-float(logits.log_softmax(-1)[tokens[target]]), abs=1e-4)


def test_batches_sum_in_double_precision_and_keep_the_training_mode(net):
    batches = [
        Batch(torch.randint(0, 64, (2, 10)), torch.randint(0, 64, (2, 10)), torch.full((2, 10), 3).short()),
        Batch(torch.randint(0, 64, (1, 7)), torch.randint(0, 64, (1, 7)), torch.full((1, 7), 2).short()),
    ]
    net.train()
    score = score_batches(net, iter(batches), torch.device("cpu"))
    assert net.training
    with torch.no_grad():
        nats = math.fsum(float(net(b.inputs, b.targets, reduction="sum")) for b in batches)
    assert score.n_tokens == 27
    assert score.n_bytes == 74
    assert score.bpb == pytest.approx(nats / (math.log(2) * 74), rel=1e-6)
    assert score.loss == pytest.approx(nats / 27, rel=1e-6)


def test_scores_add_as_sums():
    total = Score(10.0, 4, 20) + Score(1.0, 6, 2)
    assert total == Score(11.0, 10, 22)
    assert total.bpb == pytest.approx(11 / (22 * math.log(2)))
