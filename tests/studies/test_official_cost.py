"""`hymba study released`: what a network of that family costs, on a small one."""

import torch
from official_statement import SMALL

from hymba_lightning import studies
from hymba_lightning.interop.official import config_from_hf
from hymba_lightning.studies.official_cost import measure, measure_all, random_network, table

CPU = torch.device("cpu")


def test_each_pair_of_batch_and_prompt_is_a_row():
    net = random_network(CPU, "bfloat16", config_from_hf(SMALL))
    assert net.blocks[0].attn.in_proj.weight.dtype == torch.bfloat16
    costs = list(measure_all(net, [1, 2], [20, 40], new_tokens=3, piece_tokens=16))
    assert [(cost.batch, cost.prompt) for cost in costs] == [(1, 20), (1, 40), (2, 20), (2, 40)]
    for cost in costs:
        assert cost.read_seconds > 0
        assert cost.ms_per_step > 0
        assert cost.weights_bytes == sum(p.numel() * p.element_size() for p in net.parameters())
    # Keys and values of two global layers grow with the prompt, in bfloat16: 2 heads of 8 and 16.
    assert costs[1].state_bytes - costs[0].state_bytes == 20 * 2 * 2 * (8 + 16) * 2
    assert costs[2].state_bytes > 1.5 * costs[0].state_bytes
    lines = table(costs).splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("| 2 | 40 | ")


def test_a_prompt_that_does_not_fit_is_left_out(monkeypatch):
    def full(net, batch, prompt, new_tokens, piece_tokens):
        if prompt > 20:
            raise torch.cuda.OutOfMemoryError("full")
        return measure(net, batch, prompt, new_tokens, piece_tokens)

    monkeypatch.setattr("hymba_lightning.studies.official_cost.measure", full)
    net = random_network(CPU, "float32", config_from_hf(SMALL))
    assert [cost.prompt for cost in measure_all(net, [1], [20, 40], 1, 16)] == [20]


def test_the_command_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr("hymba_lightning.studies.official_cost.preset", lambda: config_from_hf(SMALL))
    studies.run(["released", "--device", "cpu", "--batches", "1", "--prompts", "12", "--new_tokens", "2"])
    out = capsys.readouterr().out
    assert out.startswith("186,221 weights, bfloat16")
    assert "| 1 | 12 | " in out


def test_a_try_has_fewer_layers(capsys, monkeypatch):
    monkeypatch.setattr("hymba_lightning.studies.official_cost.preset", lambda: config_from_hf(SMALL))
    options = ["--device", "cpu", "--batches", "1", "--prompts", "9", "--new_tokens", "1", "--compute_dtype", "float32"]
    studies.run(["released", *options, "--layers", "2"])
    assert int(capsys.readouterr().out.split()[0].replace(",", "")) < 100_000
