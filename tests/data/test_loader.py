"""Reading ahead: in order, only so far ahead, errors where they belong, no thread left behind."""

import threading
from collections.abc import Iterator
from itertools import count, islice

import pytest
import torch

from hymba_lightning.data.loader import Loader, read_ahead
from hymba_lightning.data.sequences import Batch
from hymba_lightning.data.token_stream import Chunk


def _batch(index: int) -> Batch:
    tokens = torch.full((2, 3), index)
    return Batch(tokens, tokens + 1, torch.empty(0, dtype=torch.int16))


def _reading_threads() -> int:
    return sum(thread.name.startswith("hymba-data") for thread in threading.enumerate())


def test_batches_come_in_order_and_end() -> None:
    assert [int(batch.inputs[0, 0]) for batch in read_ahead(_batch, range(5, 20), 3)] == list(range(5, 20))
    assert list(read_ahead(_batch, [], 3)) == []


def test_reads_only_so_far_ahead_and_leaves_no_thread() -> None:
    asked = []

    def indices() -> Iterator[int]:
        for index in count():
            asked.append(index)
            yield index

    batches = read_ahead(_batch, indices(), 3)
    assert asked == []
    list(islice(batches, 4))
    assert asked == list(range(7))
    assert _reading_threads() == 1
    batches.close()
    assert _reading_threads() == 0


def test_error_arrives_with_its_batch() -> None:
    def load(index: int) -> Batch:
        if index == 3:
            raise OSError("unreadable")
        return _batch(index)

    batches = read_ahead(load, count(), 4)
    assert [int(batch.inputs[0, 0]) for batch in islice(batches, 3)] == [0, 1, 2]
    with pytest.raises(OSError, match="unreadable"):
        next(batches)
    assert _reading_threads() == 0


def test_loader_can_be_iterated_again() -> None:
    loader = Loader(3, lambda: read_ahead(_batch, range(3), 1))
    assert len(loader) == 3
    assert [len(list(loader)) for _ in range(2)] == [3, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_are_pinned() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    for batch in read_ahead(_batch, range(3), 2, device):
        assert isinstance(batch, Batch)
        assert all(tensor.is_pinned() for tensor in (batch.inputs, batch.targets))
    (chunk,) = read_ahead(lambda i: Chunk(i, 1, torch.arange(9), torch.arange(8).short()), range(1), 2, device)
    assert chunk.tokens.is_pinned()
    assert (chunk.index, chunk.n_chunks) == (0, 1)
