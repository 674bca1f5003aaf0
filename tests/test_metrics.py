"""BitsPerByte: exact sums, one division, the same number whatever the precision and the number of ranks."""

import math
import os
import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hymba_lightning.metrics import BitsPerByte


def _updates(n: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(3, 1000, generator=generator) * 12, torch.randint(0, 9, (3, 1000), generator=generator).short())
        for _ in range(n)
    ]


def _expected(updates: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    nats = math.fsum(value for nats, _ in updates for value in nats.flatten().tolist())
    return nats / (math.log(2) * sum(int(count.long().sum()) for _, count in updates))


def test_equals_an_exact_sum() -> None:
    updates = _updates(20)
    metric = BitsPerByte()
    for nats, target_bytes in updates:
        metric.update(nats, target_bytes)
    assert float(metric.compute()) == pytest.approx(_expected(updates), rel=1e-13)
    assert metric.score.loss == pytest.approx(
        math.fsum(value for nats, _ in updates for value in nats.flatten().tolist()) / 60_000, rel=1e-13
    )
    assert metric.score.n_tokens == 60_000


def test_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    metric = BitsPerByte()
    metric.update(torch.tensor([1.0]), torch.tensor([1]))
    metric.update(torch.tensor([1.0]), torch.tensor([9]))
    assert float(metric.compute()) == pytest.approx(2 / (10 * math.log(2)))


@pytest.mark.parametrize("cast", ["to", "half", "bfloat16", "set_dtype"])
def test_sums_stay_float64_when_the_module_is_cast(cast: str) -> None:
    parent = torch.nn.Module()
    parent.bpb = BitsPerByte()
    parent.bpb.update(torch.tensor([1 / 3, 1000.1]), torch.tensor([1, 3]))
    before = float(parent.bpb.nats)
    if cast == "to":
        parent.to(torch.bfloat16)
    elif cast == "set_dtype":
        parent.bpb.set_dtype(torch.bfloat16)
    else:
        getattr(parent, cast)()
    assert parent.bpb.nats.dtype == torch.float64
    assert float(parent.bpb.nats) == before
    parent.bpb.reset()
    assert parent.bpb.nats.dtype == torch.float64


def test_stays_on_the_cpu_for_a_device_without_float64() -> None:
    metric = BitsPerByte()

    def to_mps(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("no float64 on MPS")
        return type("OnMps", (), {"device": torch.device("mps")})()

    metric._apply(to_mps)
    assert metric.nats.device.type == "cpu"
    assert metric.nats.dtype == torch.float64


def test_nothing_scored_is_an_error_not_a_nan() -> None:
    metric = BitsPerByte()
    metric.update(torch.empty(0, 8), torch.empty(0, 8, dtype=torch.int16))
    with pytest.raises(ValueError, match="0 bytes"):
        metric.compute()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        BitsPerByte().update(torch.ones(2, 3), torch.ones(3, 2, dtype=torch.int16))


def test_bytes_in_the_place_of_nats_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"target_bytes counts bytes, as integers, and is torch\.float32: nats come first"
    ):
        BitsPerByte().update(torch.tensor([1, 2]), torch.tensor([0.5, 0.25]))


def test_sums_begun_in_inference_mode_go_on_outside_of_it() -> None:
    with torch.inference_mode():
        metric = BitsPerByte()
        metric.update(torch.tensor([2.0]), torch.tensor([1]))
    metric.update(torch.tensor([4.0]), torch.tensor([1]))
    assert float(metric.compute()) == pytest.approx(3 / math.log(2))


def test_score_is_of_the_last_compute() -> None:
    metric = BitsPerByte()
    assert metric.score is None
    metric.update(torch.tensor([2.0]), torch.tensor([1]))
    metric.compute()
    metric.reset()
    assert metric.score is None


def _compute_on_rank(rank: int, port: int, updates: list) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    metric = BitsPerByte()
    # Uneven shares: a mean over ranks would show.
    for nats, target_bytes in updates[:1] if rank == 0 else updates[1:]:
        metric.update(nats, target_bytes)
    value = float(metric.compute())
    assert value == pytest.approx(_expected(updates), rel=1e-13)
    assert metric.score.n_tokens == 3000 * len(updates)
    assert metric.n_tokens == (3000 if rank == 0 else 3000 * (len(updates) - 1))
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_ranks_with_uneven_shares() -> None:
    mp.start_processes(_compute_on_rank, (random.randint(20_000, 40_000), _updates(5)), nprocs=2, start_method="fork")
