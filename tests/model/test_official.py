"""The network of the released Hymba models: what it computes, cut anywhere, and what its config refuses."""

import copy

import official_statement as statement
import pytest
import torch
from official_statement import SMALL

from hymba_lightning import Hymba, HymbaConfig, RuntimeConfig, SamplingConfig, generate
from hymba_lightning.interop import official
from hymba_lightning.model.roles import Role, roles_of
from hymba_lightning.ops.testing import rms_ratio

VARIANTS = {
    "all of it": {},
    "own head, no meta tokens, plain rotation": {
        "tie_word_embeddings": False,
        "num_memory_tokens": 0,
        "rope_type": "default",
    },
    "no groups, all global": {"kv_reuse_group": None, "sliding_window": None},
    "narrow values": {"mamba_expand": 1, "num_key_value_heads": 6},
}
IDS = torch.randint(1, 96, (2, 37), generator=torch.Generator().manual_seed(5))


def network(change=None, runtime=None) -> Hymba:
    config = SMALL | (change or {})
    own = official.config_from_hf(config)
    net = Hymba(own, runtime)
    net.load_state_dict(official.weights_from_hf(own, statement.random_weights(config)))
    return net.eval()


@pytest.fixture(scope="module")
def net() -> Hymba:
    return network()


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_every_gradient_are_the_statements(change):
    config = SMALL | change
    weights = {name: w.double().requires_grad_() for name, w in statement.random_weights(config).items()}
    expected = torch.stack([statement.logits(config, weights, row) for row in IDS.tolist()])
    ours = network(change).train()
    got = ours(IDS)
    assert torch.allclose(got.double(), expected, rtol=0, atol=1e-4)
    asked = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * asked).sum().backward()
    (got * asked.float()).sum().backward()
    for name, parameter in ours.named_parameters():
        wanted = weights[official.name_in_hf(name)].grad
        error = (parameter.grad.double().view_as(wanted) - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-4, (name, error)


def test_the_loss_is_plain_cross_entropy(net):
    targets = IDS.roll(-1, 1)
    wanted = torch.nn.functional.cross_entropy(net(IDS).flatten(0, 1), targets.flatten())
    assert torch.allclose(net(IDS, targets), wanted, rtol=0, atol=1e-6)
    assert net(IDS, targets, reduction="none").shape == targets.shape


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_a_sequence_may_be_cut_anywhere(change):
    net = network(change)
    whole = net(IDS)
    for cut in (1, 2, 3, 4, 8, 9, 10, 17, 36):
        one, state = net(IDS[:, :cut], return_state=True)
        two, _ = net(IDS[:, cut:], state=state, return_state=True)
        assert rms_ratio(torch.cat([one, two], 1), whole) < 1e-5, cut
    state, pieces = None, []
    for piece in IDS.split([1, 1, 9, 3, 1, 1, 14, 2, 1, 4], 1):
        out, state = net(piece, state=state, return_state=True)
        # As often as possible: positions begin again at 0.
        state = net.compact(state, rebase_at=1)
        assert state.position == 0
        pieces.append(out)
    assert rms_ratio(torch.cat(pieces, 1), whole) < 2e-5


@torch.no_grad()
def test_a_state_stays_small_but_for_global_layers(net):
    _, state = net(IDS, return_state=True)
    for layer, kept in enumerate(state.layers):
        owner = net.config.kv_owners[layer]
        wanted = 0 if owner != layer else IDS.size(1) + 5 if layer in (0, 3) else 8
        assert kept.keys.shape == (2, wanted, 2, 8)
        assert kept.values.shape == (2, wanted, 2, 16)
        assert len(kept.recurrent) == (4 if owner == layer and layer not in (0, 3) else 2)


@torch.no_grad()
def test_rows_of_unequal_length_get_what_they_get_alone(net):
    rows = [IDS[0, :n].tolist() for n in (3, 20, 11, 1)]
    config = SamplingConfig(max_new_tokens=14, temperature=0.0)
    together = list(zip(*generate(net, rows, config), strict=True))
    for row, got in zip(rows, together, strict=True):
        text = list(row)
        for _ in range(14):
            text.append(int(net(torch.tensor([text]))[0, -1].argmax()))
        assert list(got) == text[len(row) :]


def test_recomputing_blocks_changes_no_gradient(net):
    gradients = []
    for checkpointing in (False, True):
        other = network(runtime=RuntimeConfig(activation_checkpointing=checkpointing)).train()
        other(IDS, IDS).backward()
        gradients.append([p.grad for p in other.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


def test_bfloat16_is_near(net):
    half = network(runtime=RuntimeConfig(compute_dtype="bfloat16"))
    with torch.no_grad():
        error = rms_ratio(half(IDS).float(), net(IDS))
        again = rms_ratio(official.with_bfloat16_matrices(half)(IDS).float(), net(IDS))
    assert 1e-4 < error < 0.05
    assert 1e-4 < again < 0.05


def test_roles_copies_and_configs(net):
    roles = roles_of(net)
    assert {roles[name] for name in roles if "norm" in name} == {Role.CONTROL}
    assert roles["blocks.0.attn.in_proj.weight"] is Role.MATRIX
    assert type(copy.deepcopy(net)) is type(net) is not Hymba
    assert HymbaConfig.from_dict(net.config.to_dict()) == net.config
    assert type(Hymba(HymbaConfig(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1))) is Hymba
    # Files of networks without any of it say nothing of it.
    assert not {"kv_groups", "mlp_width", "rope_scale", "norm_eps", "mixer"} & set(HymbaConfig().to_dict())


OFF = {"mixer": "official", "smear_gate": False, "bigram_hash": False, "n_layers": 4}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mixer": "official"}, "no such part: smear_gate=False, bigram_hash=False"),
        ({**OFF, "branch_norm": True}, "no such part: branch_norm=False"),
        ({"kv_groups": [[0, 1]]}, "kv_groups and norm_eps are of mixer 'official', and this is 'mamba'"),
        ({"norm_eps": 1e-5}, "kv_groups and norm_eps are of mixer 'official', and this is 'mamba'"),
        ({**OFF, "kv_groups": [[1]]}, r"two or more rising layers from 0 to 3.* look at \[\[1\]\]"),
        ({**OFF, "kv_groups": [[2, 1]]}, r"look at \[\[2, 1\]\]"),
        ({**OFF, "kv_groups": [[0, 1], [1, 2]]}, "no layer in two of them"),
        ({**OFF, "kv_groups": [[3, 4]]}, r"look at \[\[3, 4\]\]"),
        ({**OFF, "kv_groups": [[0, 1]], "global_layers": [0]}, "with the same window"),
        ({"rope_scale": 0.5}, "rope_scale must be finite and at least 1"),
        ({"mlp_width": -1}, "mlp_width=-1 must not be negative"),
        ({"logit_softcap": -1.0}, "positive and finite, or 0 for none"),
    ],
)
def test_a_config_that_cannot_be_is_one_sentence(fields, said):
    with pytest.raises(ValueError, match=said):
        HymbaConfig(**fields)


def test_a_wider_mlp_a_scaled_rotation_and_no_softcap_are_for_our_own_network_too():
    config = HymbaConfig(
        vocab_size=64, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, mlp_width=24, rope_scale=4.0, logit_softcap=0.0
    )
    net = Hymba(config)
    assert net.blocks[0].mlp.fc.weight.shape == (24, 32)
    assert config.resolved_rope_base == pytest.approx(10000 * 7 ** (16 / 14))
    torch.nn.init.normal_(net.tok_emb.weight, std=9.0)
    ids = IDS % 64
    assert net(ids).abs().max() > 30
    wanted = torch.nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.flatten())
    assert torch.allclose(net(ids, ids), wanted)


def test_it_compiles_as_one_graph():
    net = network({"num_hidden_layers": 3, "global_attn_idx": [0], "kv_reuse_group": [[1, 2]]})
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(IDS), net(IDS), rtol=0, atol=1e-5)
