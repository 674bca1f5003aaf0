"""The time of a step and its parts, on a tiny network."""

import pytest
import torch

from hymba_lightning.model import HymbaConfig, RuntimeConfig
from hymba_lightning.studies.step_time import header, measure, row

TINY = HymbaConfig(
    vocab_size=64, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, window=8, bigram_buckets=16, bigram_dim=8
)


def test_a_measurement_is_a_row_of_the_table():
    device = torch.device("cpu")
    time = measure(TINY, RuntimeConfig("float32"), 32, 64, device=device, compile_net=False, n_steps=3, warmup=1)
    parts = (time.forward, time.backward, time.optimizer, time.average)
    assert all(part > 0 for part in parts)
    assert time.spread[0] <= time.total <= time.spread[1]
    assert max(parts) < time.spread[1]
    assert time.tokens_per_s == pytest.approx(64_000 / time.total)
    cells = row(time).split("|")
    assert len(cells) == len(header(device).splitlines()[-1].split("|"))
    assert [cells[1].strip(), cells[2].strip(), cells[9].strip()] == ["32", "64", "–"]


def test_a_step_is_whole_sequences():
    with pytest.raises(ValueError, match="64 tokens a step are no multiple of seq_len 48"):
        measure(
            TINY, RuntimeConfig("float32"), 48, 64, device=torch.device("cpu"), compile_net=False, n_steps=1, warmup=0
        )
