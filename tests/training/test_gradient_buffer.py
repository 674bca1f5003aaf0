"""Gradients made in one buffer, as a CUDA graph needs them, train as those that are left to autograd."""

import injected
import pytest
import torch
from fit_process import finish, start_ranks, write_config
from tiny import tiny_data, tiny_module, tiny_trainer, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def buffered(monkeypatch):
    """Has every fit make its gradients in one buffer; nothing is recorded on a CPU."""

    def switch(on: bool) -> None:
        monkeypatch.setattr("hymba_lightning.training.module.uses_cuda_graph", lambda *_: on)

    return switch


def weights_after(folder, tmp_path, steps=6, data=None, **options):
    module = tiny_module()
    tiny_trainer(tmp_path, max_steps=steps, **options).fit(module, tiny_data(folder, **(data or {})))
    return module.net.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"limit_train_batches": 5, "accumulate_grad_batches": 2},
    ],
    ids=["plain", "accumulated", "clipped", "a window cut short by the epoch's end"],
)
def test_the_weights_are_the_same(folder, tmp_path, buffered, options):
    buffered(False)
    wanted = weights_after(folder, tmp_path, **options)
    buffered(True)
    found = weights_after(folder, tmp_path, **options)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_graph_asked_for_on_a_cpu_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"model\.cuda_graph is true, but the network is on cpu: leave it at null"):
        tiny_trainer(tmp_path, max_steps=1).fit(tiny_module(cuda_graph=True), tiny_data(folder))


@pytest.mark.ddp
def test_two_ranks_share_their_gradients(tmp_path):
    config = write_config(tmp_path)
    found = []
    for hook in (None, injected.buffered_gradients):
        run = tmp_path / f"run{len(found)}"
        options = ["--trainer.max_steps", "5", "--trainer.accumulate_grad_batches", "2"]
        ranks = start_ranks(["fit", "--config", str(config), "--run_dir", str(run), *options], run, 2, hook=hook)
        assert finish(ranks) == [0, 0], run.with_name(f"{run.name}.0").read_text()
        found.append(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
