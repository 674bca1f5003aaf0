"""What only a GPU can show: a clock that tells the GPU's time, and exactness of optimizer, resume and warm-up there."""

import copy
import os
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny_lightning import StopAt, TinyData, TinyModule, TinyNet, assert_same, make_batch, make_trainer

from hymba_lightning.callbacks.average import WeightAverage
from hymba_lightning.callbacks.checkpoint import TrainingCheckpoint
from hymba_lightning.callbacks.compile_warmup import CompileWarmup
from hymba_lightning.callbacks.wall_clock import WallClock
from hymba_lightning.training.optim import OptimizerConfig, build_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CYCLES = 40_000_000  # of the GPU's own clock: some 20 to 40 ms


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


class SleepyModule(TinyModule):
    """Keeps the GPU busy much longer than the CPU needs to launch the step; never waits for it."""

    def __init__(self):
        super().__init__(OptimizerConfig())
        self.ends, self.ahead = [], []

    def training_step(self, batch, batch_idx):
        self.ahead.append(sum(not event.query() for event in self.ends))
        torch.cuda._sleep(CYCLES)
        return self.loss(batch)

    def on_train_batch_end(self, *args):
        self.ends.append(torch.cuda.Event(enable_timing=True))
        self.ends[-1].record()


def test_the_clock_tells_the_gpus_time(tmp_path):
    # A first step in a fresh process compiles kernels, for seconds on a slow disk: not on this clock.
    make_trainer(tmp_path / "first", [], accelerator="gpu", max_steps=1).fit(SleepyModule(), datamodule=TinyData())
    module, clock = SleepyModule(), WallClock(2.5, recent_steps=3)
    trainer = make_trainer(tmp_path, [clock], accelerator="gpu")
    trainer.fit(module, datamodule=TinyData())
    torch.cuda.synchronize()
    assert trainer.global_step > 10, "too few steps to tell: is something else running on this GPU?"
    # On the GPU's own stopwatch, from the end of the first step to the end of the last.
    seconds = module.ends[0].elapsed_time(module.ends[-1]) / 1000
    step = seconds / (trainer.global_step - 1)
    assert step > 0.01
    assert max(module.ahead) <= 1  # the CPU is at most one step ahead, so that its readings are true
    assert seconds <= clock.elapsed() <= 2.5
    assert clock.elapsed() > 2.5 - 4 * step
    late = [r.elapsed for r in module.readings[5:]]
    for i, elapsed in enumerate(late):
        assert elapsed == pytest.approx((i + 5) * step + clock.elapsed() - seconds - step, abs=2.5 * step)


def test_work_in_flight_is_charged_to_the_time_before_a_pause(tmp_path):
    waited = []

    class Pause(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 10:
                start, before = time.monotonic(), clock.elapsed()
                with clock.paused():
                    waited.append((time.monotonic() - start, clock.elapsed() - before))
                    time.sleep(0.5)

    module, clock = SleepyModule(), WallClock()
    trainer = make_trainer(tmp_path, [clock, Pause()], accelerator="gpu", max_steps=15)
    trainer.fit(module, datamodule=TinyData())
    ((wall, charged),) = waited
    assert charged == pytest.approx(wall, abs=2e-3)
    assert charged > 0.005
    assert clock.elapsed() < module.ends[0].elapsed_time(module.ends[-1]) / 1000 - 0.3


def state_of(trainer, module, ema):
    optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())["state"]
    state = {f"{i}.{k}": v.cpu() for i, s in optimizer.items() for k, v in s.items()}
    state |= {f"average.{n}": w.cpu() for n, w in module.weights().items()}
    with ema.raw_weights(module):
        return state | {f"raw.{n}": w.cpu() for n, w in module.weights().items()}


def run(folder, *, callbacks=(), ckpt=None, seed=3):
    torch.manual_seed(seed)
    module, ema = TinyModule(), WeightAverage(decay=0.9)
    save = TrainingCheckpoint(str(folder), every_n_seconds=None, every_n_steps=3)
    trainer = make_trainer(
        folder, [WallClock(), ema, *callbacks, save], accelerator="gpu", max_steps=6, deterministic=True
    )
    trainer.fit(module, datamodule=TinyData(), ckpt_path=ckpt)
    return state_of(trainer, module, ema)


def test_resume_and_warm_up_are_exact(tmp_path):
    expected = run(tmp_path / "whole")
    assert_same(expected, run(tmp_path / "warm", callbacks=[CompileWarmup(3)]))
    run(tmp_path, callbacks=[StopAt(3)])
    assert_same(expected, run(tmp_path, ckpt=tmp_path / "last.ckpt", seed=4))


def test_optimizer_matches_the_cpu_and_its_state_travels():
    def steps(net, optimizer, device, indices):
        for index in indices:
            optimizer.zero_grad()
            batch = make_batch(index).to(device)
            torch.nn.functional.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()

    def make(device):
        torch.manual_seed(0)
        net = TinyNet(dropout=0.0).to(device)
        return net, build_optimizer(net, OptimizerConfig())

    net, optimizer = make("cpu")
    gpu_net, gpu_optimizer = make("cuda")
    steps(net, optimizer, "cpu", range(3))
    steps(gpu_net, gpu_optimizer, "cuda", range(3))
    for (name, p), q in zip(net.named_parameters(), gpu_net.parameters(), strict=True):
        assert (p - q.cpu()).norm() < 2e-2 * p.norm(), name
    # CPU checkpoint on the GPU and the other way round.
    gpu_net.load_state_dict(net.state_dict())
    gpu_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    saved = copy.deepcopy(gpu_optimizer.state_dict())
    steps(gpu_net, gpu_optimizer, "cuda", range(3, 5))
    assert all(g["fused"] for g in gpu_optimizer.param_groups if g["algorithm"] == "adam")
    again_net, again = make("cpu")
    again_net.load_state_dict(net.state_dict())
    again.load_state_dict(saved)
    steps(again_net, again, "cpu", range(3, 5))
    for (name, p), q in zip(again_net.named_parameters(), gpu_net.parameters(), strict=True):
        assert (p - q.cpu()).norm() < 2e-2 * p.norm(), name
