"""What adapts, and how: chosen parameters alone move, each recipe lowers the loss, settings that cannot be say so."""

import pytest
import torch
from legality import ADAPT, SEQ_LEN, VARIANTS, chunks, lively_net, stream
from torch.nn import functional as F

from hymba_lightning.evaluation import ScoreFirstTTT, TTTConfig, score_first_ttt
from hymba_lightning.evaluation.adapt import Adapter, MuonSteps
from hymba_lightning.model.roles import Role, roles_of


def changed(net, before):
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


def with_roles(net, *roles):
    """Names of the parameters with one of these roles."""
    return {name for name, role in roles_of(net).items() if role in roles}


def block_matrices(net):
    return {f"blocks.{name}" for name in with_roles(net.blocks, Role.MATRIX)}


def adapted(**config):
    """Names of the parameters that a run over the stream changed, and the net."""
    net = lively_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    score_first_ttt(net, chunks(stream()), SEQ_LEN, TTTConfig(**(ADAPT | config)))
    return changed(net, before), net


def test_all_moves_everything():
    names, net = adapted()
    assert names == {name for name, _ in net.named_parameters()}


def test_mlp_moves_the_mlps_matrices():
    assert adapted(parameters="mlp")[0] == {f"blocks.{i}.mlp.{part}.weight" for i in (0, 1) for part in ("fc", "proj")}


def test_scalars_moves_what_is_no_matrix():
    names, net = adapted(parameters="scalars")
    assert names == with_roles(net, Role.CONVOLUTION, Role.DYNAMICS, Role.CONTROL, Role.SCALAR)
    assert "blocks.0.attn.A_log" in names
    assert "blocks.1.attn.conv1d.weight" in names
    assert "smeargate.gate" in names
    sizes = dict(net.named_parameters())
    assert sum(sizes[name].numel() for name in names) < 0.1 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("config", [{"parameters": "low_rank", "rank": 2}, {"optimizer": "muon", "lr": 0.01}])
def test_low_rank_and_muon_move_the_blocks_matrices(config):
    names, net = adapted(**config)
    assert names == block_matrices(net)
    assert "blocks.0.attn.kv_proj.weight" in names
    assert "blocks.0.attn.A_log" not in names


def test_beside_muon_the_rest_moves_by_its_own_rate():
    names, net = adapted(optimizer="muon", lr=0.01, rest_lr=0.1)
    assert names == {name for name, _ in net.named_parameters()}
    _, alone = adapted(optimizer="muon", lr=0.01, rest_lr=0.1, freeze_blocks=2)  # tables and gates in front: SGD alone
    _, sgd = adapted(optimizer="sgd", lr=0.1, freeze_blocks=2)
    start = dict(lively_net().named_parameters())
    for (name, p), (_, q) in zip(alone.named_parameters(), sgd.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not torch.equal(alone.tok_emb.weight, start["tok_emb.weight"])


def test_frozen_blocks_stay():
    names, _ = adapted(parameters="mlp", freeze_blocks=1)
    assert names == {"blocks.1.mlp.fc.weight", "blocks.1.mlp.proj.weight"}


def test_low_rank_changes_have_that_rank():
    _, net = adapted(parameters="low_rank", rank=2, lr=0.5)
    start = dict(lively_net().named_parameters())
    for name, p in net.named_parameters():
        if name in block_matrices(net):
            singular = torch.linalg.svdvals((p - start[name]).detach().double())
            assert singular[0] > 1e-5, name
            assert singular[2:].max() < 1e-2 * singular[0], name


def test_low_rank_gradients_are_the_factors_own():
    """One step of plain SGD on the factors, with gradients from autograd through W0 + B A."""
    net = lively_net()
    adapter = Adapter(net, TTTConfig(parameters="low_rank", rank=3, freeze_blocks=0, grad_clip=0, momentum=0))
    tokens = stream(50)[None]
    with torch.no_grad():
        for b, _ in adapter.factors:
            b.normal_(std=0.1)
    adapter._write_back()
    index = [name for name, p in net.named_parameters() if any(p is w for w in adapter.weights)].index(
        "blocks.1.mlp.fc.weight"
    )
    b, a = (factor.detach().clone().requires_grad_() for factor in adapter.factors[index])
    start = adapter._start[index]
    weights = {name: p.detach() for name, p in net.named_parameters()} | {"blocks.1.mlp.fc.weight": start + b @ a}
    torch.func.functional_call(net, weights, (tokens[:, :-1], tokens[:, 1:])).backward()
    net(tokens[:, :-1], tokens[:, 1:]).backward()
    adapter.update(0.1, torch.zeros(()))
    assert torch.allclose(adapter.factors[index][0], (b - 0.1 * b.grad).detach(), atol=1e-6)
    assert torch.allclose(adapter.factors[index][1], (a - 0.1 * a.grad).detach(), atol=1e-6)
    assert torch.allclose(adapter.weights[index], start + adapter.factors[index][0] @ adapter.factors[index][1])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_learns_what_it_read(name):
    """Adapting to a chunk lowers the loss on that chunk."""
    net = lively_net()
    ttt = ScoreFirstTTT(net, SEQ_LEN, TTTConfig(**(ADAPT | {"epochs": 20} | VARIANTS[name])))
    chunk = chunks(stream())[0]
    tokens = chunk.tokens[25:] if name == "documents" else chunk.tokens
    before = _loss(net, tokens)
    ttt.score_chunk(chunk)
    ttt.adapt_chunk(chunk)
    assert _loss(net, tokens) < before - 0.01


def _loss(net, tokens):
    with torch.no_grad():
        return float(F.cross_entropy(net(tokens[None, :-1])[0], tokens[1:]))


def test_documents_adapt_for_themselves():
    """After a chunk that starts a document the weights are those that this document's tokens alone would give."""
    config = TTTConfig(**(ADAPT | {"reset_at_bos": True, "lr_decay": "constant"}))
    net = lively_net()
    ttt = ScoreFirstTTT(net, SEQ_LEN, config)
    for chunk in chunks(stream())[:2]:  # the second holds starts at 90 and 100
        ttt.score_chunk(chunk)
        ttt.adapt_chunk(chunk)
    alone = lively_net()
    fresh = ScoreFirstTTT(alone, SEQ_LEN, config)
    second = chunks(stream())[1]
    only = second._replace(index=0, start=None, tokens=stream()[100:121], target_bytes=second.target_bytes[:20])
    fresh.score_chunk(only)
    fresh.adapt_chunk(only)
    for (name, a), b in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_anchor_holds_the_weights_near_the_artifacts():
    def distance(**config):
        net, start = adapted(**config)[1], lively_net()
        return sum(float((a - b).norm()) for a, b in zip(net.parameters(), start.parameters(), strict=True))

    assert distance(anchor=1.0) == 0
    assert distance(anchor=0.3) < 0.8 * distance()


def test_learning_rates_over_the_chunks():
    cosine, linear, constant = (TTTConfig(lr=2.0, lr_decay=decay) for decay in ("cosine", "linear", "constant"))
    assert [cosine.lr_at(i, 5) for i in (0, 2, 4)] == pytest.approx([2, 1, 0])
    assert [linear.lr_at(i, 5) for i in (0, 1, 4)] == pytest.approx([2, 1.5, 0])
    assert constant.lr_at(4, 5) == 2
    assert cosine.lr_at(0, 1) == 2


def test_dequantized_weights_are_what_adapts(tmp_path):
    """From an artifact: the scored and adapted net starts at the file's values, not at the trained ones."""
    from hymba_lightning.quantization import QuantizationConfig, load_artifact, save_artifact

    net = lively_net()
    with torch.no_grad():
        net.tok_emb.weight += 1e-5
    save_artifact(
        tmp_path / "a.hymba",
        net.state_dict(),
        config=net.config.to_dict(),
        tokenizer={},
        metadata={},
        scheme=QuantizationConfig(),
    )
    artifact = load_artifact(tmp_path / "a.hymba")
    loaded = artifact.network()
    ttt = ScoreFirstTTT(loaded, SEQ_LEN, TTTConfig(**(ADAPT | {"anchor": 1.0})))
    for chunk in chunks(stream())[:2]:
        ttt.score_chunk(chunk)
        ttt.adapt_chunk(chunk)
    for name, p in loaded.named_parameters():  # the anchor gives the start back
        assert torch.equal(p, artifact.state_dict[name]), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mode": "warm"}, "cold, sliding, carried"),
        ({"stride": 5}, "belong together"),
        ({"mode": "sliding"}, "belong together"),
        ({"mode": "carried", "drop_partial": True}, "drop_partial"),
        ({"optimizer": "muon", "parameters": "scalars"}, "matrices"),
        ({"optimizer": "adam"}, "sgd, muon"),
        ({"rest_lr": 0.1}, "rest_lr"),
        ({"rest_lr": 0.1, "optimizer": "muon", "parameters": "mlp"}, "rest_lr"),
        ({"anchor": 1.5}, "at most 1"),
        ({"limit_seconds": 0.0}, "limit_seconds"),
        ({"rank": 0}, "rank"),
        ({"lr": -1.0}, "lr"),
        ({"lr": 1e300}, "at most 1e6"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        TTTConfig(**config)


def test_nothing_left_to_adapt_is_refused():
    with pytest.raises(ValueError, match="no parameter is left"):
        ScoreFirstTTT(lively_net(), SEQ_LEN, TTTConfig(parameters="mlp", freeze_blocks=2))


def test_a_gpus_muon_makes_the_updates_of_a_cpus(monkeypatch):
    """torch's iteration is in bfloat16 even where the matrices are not; in float32 nothing is left between the two."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    nets = []
    for on_gpu in (False, True):
        if on_gpu:
            monkeypatch.setattr(
                Adapter, "_muon", lambda self, matrices: MuonSteps(matrices, self.config.lr, self.config.momentum)
            )
        config = TTTConfig(**(ADAPT | VARIANTS["muon and sgd"]))
        nets.append(lively_net())
        score_first_ttt(nets[-1], chunks(stream()), SEQ_LEN, config)
    start = lively_net()
    for by_torch, ours, before in zip(*(net.parameters() for net in (*nets, start)), strict=True):
        moved = (by_torch - before).norm()
        assert moved > 0
        assert (by_torch - ours).norm() < 1e-3 * moved
