"""Streams, spans, validation sequences and chunks: who reads which token, and that none is lost or read twice."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_lightning.data.sequences import TrainSpans, ValSequences, first_span
from hymba_lightning.data.shard_writing import write_shard
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.token_stream import TokenStream, chunk_at, n_chunks

# Every token its own position, so that what was read shows where it was.
SIZES = (37, 5, 58)
TOKENS = list(range(sum(SIZES)))
BYTES = TokenBytes(np.arange(100) % 5, np.arange(100) % 2 == 0, np.arange(100) % 10 == 3)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stream")
    starts = np.cumsum([0, *SIZES])
    written = []
    for index, (start, size) in enumerate(zip(starts, SIZES, strict=False)):
        written.append(folder / f"s_{index}.bin")
        write_shard(written[-1], np.arange(start, start + size))
    return written


@given(st.integers(-110, 110), st.integers(-110, 110))
@settings(max_examples=60, deadline=None)
def test_slices_like_a_list(paths: list[Path], a: int, b: int) -> None:
    stream = TokenStream(paths)
    assert stream[a:b].tolist() == TOKENS[a:b]
    assert stream[a:b].dtype == torch.int64


def test_reads_past_the_end_from_the_beginning(paths: list[Path]) -> None:
    assert TokenStream(paths).read(95, 210).tolist() == TOKENS[95:] + TOKENS * 2 + TOKENS[:5]


def test_limit_cuts_the_stream(paths: list[Path]) -> None:
    stream = TokenStream(paths, limit=40)
    assert stream.n_tokens == len(stream) == 40
    assert stream[35:99].tolist() == [35, 36, 37, 38, 39]
    assert stream.read(38, 4).tolist() == [38, 39, 0, 1]
    assert TokenStream(paths, limit=1000).n_tokens == 100


def test_locates_a_position_in_its_file(paths: list[Path]) -> None:
    stream = TokenStream(paths)
    assert [stream.locate(p) for p in (0, 36, 37, 42, 99, 100)] == [
        (paths[0], 0),
        (paths[0], 36),
        (paths[1], 0),
        (paths[2], 0),
        (paths[2], 57),
        (paths[0], 0),
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_read_disjoint_spans_that_follow_each_other(paths: list[Path], world_size: int) -> None:
    spans = TrainSpans(TokenStream(paths), seq_len=6)
    seen = []
    for step in range(2):
        for rank in range(world_size):
            batch = spans.batch(first_span(step, 3, rank, world_size), 3)
            assert batch.inputs.shape == batch.targets.shape == (3, 6)
            assert batch.target_bytes.shape == (0,)
            assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
            seen += torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1).flatten().tolist()
    assert seen == [position % 100 for position in range(2 * world_size * 3 * 7)]


def test_shuffling_reads_every_whole_span_once_per_pass_in_another_order(paths: list[Path]) -> None:
    spans = TrainSpans(TokenStream(paths), seq_len=6, shuffle_seed=5)
    assert spans.spans_per_pass == 14
    passes = [[spans.start(epoch * 14 + span) for span in range(14)] for epoch in range(3)]
    for starts in passes:
        positions = sorted((start + offset) % 100 for start in starts for offset in range(7))
        assert len(set(positions)) == 98
        assert starts != sorted(starts)
    assert passes[0] != passes[1] != passes[2]
    again = TrainSpans(TokenStream(paths), seq_len=6, shuffle_seed=5)
    assert [again.start(span) for span in range(30, 10, -1)] == [spans.start(span) for span in range(30, 10, -1)]
    other = TrainSpans(TokenStream(paths), seq_len=6, shuffle_seed=6)
    assert [other.start(span) for span in range(14)] != passes[0]


@given(st.integers(2, 100), st.integers(1, 110), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_validation_scores_every_token_after_the_first_once(paths, n_tokens, seq_len, batch_size, world_size) -> None:
    sequences = ValSequences(TokenStream(paths, limit=n_tokens), BYTES, seq_len, batch_size)
    per_rank = sequences.batches_per_rank(world_size)
    assert per_rank >= 1
    targets = []
    for rank in range(world_size):
        for index in range(rank, per_rank * world_size, world_size):
            batch = sequences.batch(index)
            assert batch.inputs.shape == batch.targets.shape == batch.target_bytes.shape
            assert len(batch.inputs) <= batch_size
            assert batch.inputs.shape[1] <= seq_len
            assert torch.equal(batch.inputs + 1, batch.targets)
            assert all(row[0] % seq_len == 0 for row in batch.inputs)
            expected = BYTES.count(batch.inputs.numpy(), batch.targets.numpy())
            assert np.array_equal(batch.target_bytes.numpy(), expected)
            targets += batch.targets.flatten().tolist()
    assert sorted(targets) == TOKENS[1:n_tokens]


def test_ranks_make_the_same_number_of_steps(paths: list[Path]) -> None:
    sequences = ValSequences(TokenStream(paths), BYTES, 30, 1)
    assert sequences.n_batches == 4
    assert sequences.batches_per_rank(3) == 2
    assert sequences.batch(5).inputs.shape == (0, 30)
    assert sequences.batch(3).inputs.shape == (1, 9)


@given(st.integers(2, 100), st.integers(1, 120))
@settings(max_examples=50, deadline=None)
def test_chunks_cover_the_stream_with_one_token_of_context(paths: list[Path], n_tokens: int, chunk_tokens: int) -> None:
    stream = TokenStream(paths, limit=n_tokens)
    total = n_chunks(stream, chunk_tokens)
    targets = []
    for index in range(total):
        chunk = chunk_at(stream, BYTES, chunk_tokens, index)
        assert (chunk.index, chunk.n_chunks) == (index, total)
        assert len(chunk.tokens) == len(chunk.target_bytes) + 1 <= chunk_tokens + 1
        assert chunk.tokens[0] == index * chunk_tokens
        assert np.array_equal(chunk.target_bytes, BYTES.count(chunk.tokens[:-1].numpy(), chunk.tokens[1:].numpy()))
        targets += chunk.tokens[1:].tolist()
    assert targets == TOKENS[1:n_tokens]
