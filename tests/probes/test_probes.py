"""What a network's memory is worth: the cuts take away what they name, and the probes see it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import NET

from hymba_lightning.commands import run_command
from hymba_lightning.generation.loading import trained_seq_len
from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.probes import picture, positions
from hymba_lightning.probes.copying import copy_gain, distances
from hymba_lightning.probes.cuts import narrower_window, nats_of, without_attention, without_recurrence
from hymba_lightning.probes.decay import QUANTILES, decay_times
from hymba_lightning.probes.positions import Bin, Curve, by_position
from hymba_lightning.probes.recall import KEY, VALUE, _sequence, nats_of_values, recall

SECRET_EVERY, WINDOW, LENGTH = 4, 2, 64


def make_net(mixer: str = "mamba", **changes) -> Hymba:
    torch.manual_seed(0)
    net = Hymba(HymbaConfig(**(NET | {"mixer": mixer, "bigram_hash": False} | changes))).eval()
    with torch.no_grad():  # what starts at zero would hide every cut
        for parameter in net.parameters():
            if parameter.dim() == 2 and not parameter.any():
                parameter.normal_(std=0.05)
    return net


def ids(n: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, NET["vocab_size"], (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("merge", ["scalar", "concat"])
def test_a_cut_changes_the_loss_and_leaves_the_weights_as_they_were(mixer, merge):
    net, tokens = make_net(mixer, merge=merge), ids(2, 65)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    whole = nats_of(net, tokens)
    for cut in (without_attention(net), without_recurrence(net), narrower_window(net, 2)):
        with cut:
            assert not torch.allclose(nats_of(net, tokens), whole)
        assert torch.equal(nats_of(net, tokens), whole)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_without_attention_no_window_matters_and_without_recurrence_no_state_does():
    net, tokens = make_net(), ids(2, 65)
    with without_attention(net):
        plain = nats_of(net, tokens)
        with narrower_window(net, 1):
            assert torch.equal(nats_of(net, tokens), plain)
    with without_recurrence(net):
        torch.testing.assert_close(nats_of(net, tokens, forget_every=16), nats_of(net, tokens))


def test_a_state_is_emptied_where_it_is_said_to_be():
    net, tokens = make_net(), ids(2, 65)
    whole, forgetful = nats_of(net, tokens), nats_of(net, tokens, forget_every=32)
    torch.testing.assert_close(forgetful[:, :32], whole[:, :32])
    assert not torch.allclose(forgetful[:, 32:], whole[:, 32:])
    with without_attention(net):
        # The first token after the cut is still smeared with the one before it.
        again = nats_of(net, tokens, forget_every=32)[:, 33:]
        torch.testing.assert_close(again, nats_of(net, tokens[:, 32:])[:, 1:], rtol=1e-3, atol=1e-3)


def secrets(n: int, seed: int) -> torch.Tensor:
    """(n, LENGTH+1) noise in which every fourth token is the sequence's own: farther back than attention sees."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, 14, (n, LENGTH + 1), generator=generator)
    tokens[:, ::SECRET_EVERY] = torch.randint(2, 10, (n, 1), generator=generator)
    return tokens


@pytest.fixture(scope="module")
def carrier() -> Hymba:
    """A network that has learned to carry a sequence's secret in its state."""
    net = make_net(vocab_size=32, window=WINDOW, n_layers=2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(60):
        tokens = secrets(16, step)
        net(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def worse(curves) -> dict[str, tuple[float, float]]:
    return {curve.name: (curve.worse, curve.worse_error) for curve in curves}


def test_a_network_that_uses_its_state_is_told_from_one_that_does_not(carrier, monkeypatch):
    monkeypatch.setattr(positions, "FORGET_EVERY", (2,))
    tokens = secrets(32, 1000)
    one_byte = torch.ones(32, LENGTH)
    using = worse(by_position(carrier, tokens, one_byte))
    for name in ("recurrence off", "state emptied every 2"):
        assert using[name][0] > 0.05
        assert using[name][0] > 3 * using[name][1]
    with without_recurrence(carrier):
        not_using = worse(by_position(carrier, tokens, one_byte))
    assert not_using["recurrence off"] == (0, 0)
    assert abs(not_using["state emptied every 2"][0]) < 1e-5


def test_bins_hold_every_target_once_and_average_to_the_whole(carrier):
    tokens = secrets(4, 2000)
    n_bytes = torch.randint(1, 5, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    whole = by_position(carrier, tokens, n_bytes, rows=3)[0]
    assert [point.at_least for point in whole.bins] == [1, 2, 4, 8, 16, 32, 64]
    assert sum(point.tokens for point in whole.bins) == 4 * LENGTH
    nats = nats_of(carrier, tokens).double()
    assert whole.bpb == pytest.approx(float(nats.sum()) / int(n_bytes.sum()) / math.log(2))
    third = slice(3, 7)  # predicted from 4 to 7 tokens
    assert whole.bins[2].bpb == pytest.approx(float(nats[:, third].sum()) / int(n_bytes[:, third].sum()) / math.log(2))


@pytest.mark.parametrize("length", [64, 100])
def test_every_point_of_the_picture_lies_within_its_panel(monkeypatch, tmp_path, length):
    drawn = []
    monkeypatch.setattr(picture, "save_figure", lambda figure, path: drawn.extend(figure.axes))
    curve = Curve("attention off", 1.0, 0.1, 0.0, [Bin(2**power, 8, 1.0, 0.1, 0.1, 0.1) for power in range(7)])
    picture.draw([curve, curve], [], [], [], math.log2(length), tmp_path / "probe.png")
    (panel,) = drawn
    left, right = panel.get_xlim()
    for curve in panel.containers:
        assert all(left < x < right for x in curve.lines[0].get_xdata())


def test_one_sequence_has_no_spread(carrier):
    with pytest.raises(ValueError, match="at least 2 sequences"):
        by_position(carrier, secrets(1, 0), torch.ones(1, LENGTH))


class Copier:
    """Stands for a network that knows a token for certain where it followed the same token up to `reach` before."""

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def __call__(self, inputs, targets, *, state, return_state, reduction):
        nats = torch.ones(inputs.shape)
        for row, (ins, outs) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
            for t in range(len(ins)):
                seen = range(max(t - self.reach, 0), t)
                if any((ins[s], outs[s]) == (ins[t], outs[t]) for s in seen):
                    nats[row, t] = 0
        return nats, SimpleNamespace(layers=[], _replace=lambda **_: None)


def test_copying_is_seen_as_far_as_it_reaches():
    stream = torch.randint(0, 50_000, (3000,), generator=torch.Generator().manual_seed(3))
    found = copy_gain(Copier(reach=100), stream, 256, passage=16, passages=3)
    assert [one.distance for one in found] == [32, 64, 128, 240] == distances(256, 16)
    assert [round(one.gain, 2) for one in found] == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="too few to copy"):
        copy_gain(Copier(reach=1), stream[:200], 256, passage=16, passages=3)


@pytest.mark.parametrize("distance", [None, 4, 30, 59])
def test_a_question_has_its_answer_at_the_distance_it_says(distance):
    stream = torch.arange(100, 1100)
    for seed in range(20):
        tokens = _sequence(stream, LENGTH - 1, 4, distance, 7, torch.Generator().manual_seed(seed)).tolist()
        question = len(tokens) - KEY - VALUE
        asked = [place for place in range(question) if tokens[place : place + KEY] == tokens[question : question + KEY]]
        assert len(asked) == 1
        assert tokens[asked[0] + KEY : asked[0] + KEY + VALUE] == tokens[-VALUE:]
        assert distance is None or question - asked[0] == distance
        assert tokens.count(7) == 5


def test_recall_trains_a_copy(carrier):
    before = {name: value.clone() for name, value in carrier.state_dict().items()}
    found = recall(carrier, secrets(8, 5).flatten(), 48, pairs=1, steps=2, batch=2, questions=4)
    assert [one.distance for one in found] == [8, 16, 32, 44]
    assert all(0 <= one.right <= 1 for one in found)
    assert all(torch.equal(before[name], value) for name, value in carrier.state_dict().items())


def test_only_the_values_are_read_from_the_head():
    net, tokens = make_net(), ids(3, LENGTH)
    whole = net(tokens[:, :-1], tokens[:, 1:], reduction="none")[:, -VALUE:].flatten()
    torch.testing.assert_close(nats_of_values(net, tokens), whole)


def test_decay_times_are_those_of_the_time_steps():
    net = make_net()
    with torch.no_grad():
        for block in net.blocks:
            block.attn.dt_proj.weight.zero_()
            block.attn.dt_proj.bias.fill_(math.log(math.expm1(0.01)))
            block.attn.A_log.copy_(torch.arange(1, NET["d_state"] + 1).log().expand_as(block.attn.A_log))
    found = decay_times(net, ids(1, 32)[0])
    assert [one.layer for one in found] == [0, 1]
    each = torch.tensor([100, 50, 100 / 3, 25]).repeat(net.config.d_inner)
    wanted = torch.quantile(each, torch.tensor(QUANTILES)).tolist()
    for one in found:
        assert one.longest == pytest.approx(100, rel=1e-4)
        assert one.tokens == pytest.approx(wanted, rel=0.02)
    assert len(decay_times(make_net("mamba2"), ids(1, 32)[0])) == 2


def test_the_command_writes_what_it_prints(fitted_run, tmp_path, capsys):
    data = fitted_run.parent / "data"
    arguments = ["--seq_len", "64", "--sequences", "3", "--recall_steps", "1", "--out", str(tmp_path)]
    run_command("probe", [str(fitted_run / "artifact.hymba"), "--data_dir", str(data), *arguments, "--passages", "0"])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "probe.json").read_text())
    assert (tmp_path / "probe.png").stat().st_size > 10_000
    assert found["sequences"] == 3
    assert {one["questions"] for one in found["recalls"]} == {32}
    assert "share right of 32 questions" in printed
    assert f"{found['curves'][0]['bpb']:.4f}" in printed
    record = json.loads((fitted_run / "record.json").read_text())
    assert found["data"] == record["scores"][0]["data"]["digest"]
    assert found["file_sha256"] == record["artifact"]["sha256"]
    assert trained_seq_len(fitted_run / "artifact.hymba") == 64
    assert trained_seq_len(tmp_path / "artifact.hymba") is None
    with pytest.raises(ValueError, match="validation tokens are less than two sequences of 4,096"):
        run_command("probe", [str(fitted_run / "artifact.hymba"), "--data_dir", str(data), "--seq_len", "4096"])


@pytest.mark.parametrize(
    ("option", "least"),
    [
        ("--sequences 1", 2),
        ("--passages -1", 0),
        ("--passages 1", 2),
        ("--recall_steps -1", 0),
        ("--questions 0", 1),
        ("--seq_len 0", 1),
    ],
)
def test_a_number_too_small_is_named_before_anything_is_read(option, least):
    name, number = option.split()
    with pytest.raises(ValueError, match=f"{name[2:]} must be at least {least}.*, got {number}"):
        run_command("probe", ["nothing.hymba", "--data_dir", "nowhere", name, number])
