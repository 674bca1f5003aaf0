"""The time of a step and its parts, on a tiny network."""

import pytest
import torch

from hymba_lightning.model import HymbaConfig, RuntimeConfig
from hymba_lightning.model.gradients import Gradients
from hymba_lightning.studies import step_time
from hymba_lightning.studies.step_time import header, measure, row

TINY = HymbaConfig(
    vocab_size=64, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, window=8, bigram_buckets=16, bigram_dim=8
)


CPU = torch.device("cpu")


def test_a_measurement_is_a_row_of_the_table():
    time = measure(TINY, RuntimeConfig("float32"), 32, 64, device=CPU, compile_net=False, n_steps=3, warmup=1)
    parts = (time.gradient, time.optimizer, time.average)
    assert all(part > 0 for part in (*parts, time.forward))
    assert time.forward < time.gradient
    assert time.spread[0] <= time.total <= time.spread[1]
    assert max(parts) < time.spread[1]
    assert time.tokens_per_s == pytest.approx(64_000 / time.total)
    cells = [cell.strip() for cell in row(time).split("|")]
    assert len(cells) == len(header(CPU).splitlines()[-1].split("|")) == len(header(CPU).splitlines()[-2].split("|"))
    assert [cells[1], cells[2], cells[3], cells[10]] == ["32", "64", "no", "–"]


def test_the_step_is_the_one_of_a_fit(monkeypatch):
    """Where a fit would record a CUDA graph, forward and backward are one call, made as often as there are steps."""
    calls, wanted = [], []

    class Counted(Gradients):
        def add(self, *args):
            calls.append(self)
            return super().add(*args)

    def as_on_a_gpu(*asked):
        wanted.append(asked)
        return True

    monkeypatch.setattr("hymba_lightning.training.graphed.Gradients", Counted)
    monkeypatch.setattr("hymba_lightning.studies.step_time.uses_cuda_graph", as_on_a_gpu)
    time = measure(TINY, RuntimeConfig("float32"), 32, 64, device=CPU, compile_net=False, n_steps=3, warmup=1)
    assert wanted == [("the network is on cpu", None, False)]
    # A graph is recorded at the fourth call, so that four steps are no measurement yet, whatever was asked for.
    assert len(calls) == 4 + 3
    assert time.forward is None
    assert time.gradient > 0
    # Nothing can be recorded on a CPU, and the row does not claim it.
    assert [row(time).split("|")[3].strip(), row(time).split("|")[6].strip()] == ["no", "–"]


def test_the_network_learns_in_the_step_that_is_timed(monkeypatch):
    """A step that made no gradient, or cleared it too early, would be a fast one."""
    seen = []
    original = step_time.build_optimizer

    def build(net, config):
        seen.append([p.detach().clone() for p in net.parameters()])
        seen.append(list(net.parameters()))
        return original(net, config)

    monkeypatch.setattr(step_time, "build_optimizer", build)
    for graphed in (False, True):
        monkeypatch.setattr(step_time, "uses_cuda_graph", lambda *_, graphed=graphed: graphed)
        measure(TINY, RuntimeConfig("float32"), 32, 64, device=CPU, compile_net=False, n_steps=1, warmup=4)
    before, plain, _, buffered = seen
    for a, b in zip(plain, buffered, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(start, a) for start, a in zip(before, plain, strict=True))


def test_a_graph_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="cuda_graph is true, but the network is on cpu"):
        measure(
            TINY, RuntimeConfig("float32"), 32, 64, device=CPU, compile_net=False, n_steps=1, warmup=0, cuda_graph=True
        )


def test_a_step_is_whole_sequences():
    with pytest.raises(ValueError, match="64 tokens a step are no multiple of seq_len 48"):
        measure(TINY, RuntimeConfig("float32"), 48, 64, device=CPU, compile_net=False, n_steps=1, warmup=0)
