"""The network: cut-anywhere state, options, starts, bfloat16. Parity with the reference is in tests/interop."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from small_network import SMALL

from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.costs import matmul_params, train_flops_per_token
from hymba_lightning.model.hymba import outline
from hymba_lightning.ops.testing import rms_ratio


def small(runtime: RuntimeConfig | None = None, **changes) -> Hymba:
    """A small network whose zero-initialised matrices are random, so that every path carries signal."""
    torch.manual_seed(0)
    net = Hymba(HymbaConfig(**(SMALL | changes)), runtime)
    for parameter in net.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"meta_tokens": 3},
        {"global_layers": [1]},
        {"kv_share_every": 2, "merge": "channel", "branch_norm": True},
        {"expand": 2, "tie_embeddings": False, "smear_gate": False, "d_conv": 2},
        {"window": 1},
        {"layer_windows": [3, 8, 1, 12]},
        {"layer_windows": [3, 8, 1, 12], "global_layers": [1]},
        {"branch_gate": 5},
        {"value_gate": True},
        {"dynamics_norm": True},
        {"merge": "concat", "expand": 2, "branch_norm": True, "branch_gate": 3},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_a_sequence_cut_anywhere_gives_the_logits_of_the_whole(changes):
    net = small(**changes).eval()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(0, 64, (2, 40), generator=generator)
    inputs[:, 17] = net.config.bos_id
    with torch.no_grad():
        whole = net(inputs)
        for cuts in ([1, 2, 17, 18, 39], [20], list(range(1, 40))):
            pieces, state = [], None
            for first, stop in zip([0, *cuts], [*cuts, 40], strict=True):
                logits, state = net(inputs[:, first:stop], state=state, return_state=True)
                pieces.append(logits)
            assert rms_ratio(torch.cat(pieces, dim=1), whole) < 1e-5
    windows = net.config.layer_windows or [net.config.window] * net.config.n_layers
    for i, (layer, window) in enumerate(zip(state.layers, windows, strict=True)):
        assert layer.keys.size(1) == (40 if i in net.config.global_layer_set() else window - 1) + (
            net.config.meta_tokens if i in net.config.global_layer_set() else 0
        )


def test_the_future_does_not_reach_the_past():
    net = small().eval()
    inputs = torch.randint(2, 64, (1, 30))
    changed = inputs.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 64
    with torch.no_grad():
        before, after = net(inputs), net(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20], after[:, 20])


def test_probabilities_sum_to_one():
    with torch.no_grad():
        logits = small()(torch.randint(0, 64, (1, 16)))
    assert torch.allclose(logits.softmax(-1).sum(-1), torch.ones(1, 16), atol=1e-6)


def test_embeddings_do_not_reach_across_a_document_start_unless_asked():
    inputs = torch.randint(2, 64, (1, 12))
    inputs[0, 6] = 1
    other = inputs.clone()
    other[0, 5] = (inputs[0, 5] + 7) % 60 + 2
    for reset in (True, False):
        net = small(reset_at_bos=reset)
        from hymba_lightning.model.embedding import embed_tokens

        def embed(ids, net=net, reset=reset):
            return embed_tokens(
                ids, net.tok_emb, net.bigram_hash, net.smeargate, dtype=torch.float32, bos_id=1 if reset else None
            )[0][0, 6]

        assert torch.equal(embed(inputs), embed(other)) is reset


def test_only_the_window_is_seen():
    """With the Mamba branch and the smear silenced, a key `window` back does not matter and one closer does."""
    net = small(n_layers=2, smear_gate=False, bigram_hash=False).eval()
    with torch.no_grad():
        for block in net.blocks:
            block.attn.mamba_out_proj.weight.zero_()
        net.blocks[1].attn.proj.weight.zero_()  # one layer of attention left: no relaying
        inputs = torch.randint(2, 64, (1, 20))
        base = net(inputs)[0, 19]
        for distance, seen in ((7, True), (8, False)):
            changed = inputs.clone()
            changed[0, 19 - distance] = 1
            assert torch.equal(net(changed)[0, 19], base) is not seen


def test_the_full_network_has_the_reference_size():
    with torch.device("meta"):
        net = Hymba(HymbaConfig(ortho_init=False, dt_init="linear"))
    assert sum(p.numel() for p in net.parameters()) == 27_161_151


def test_the_time_step_starts_log_uniform_between_its_bounds():
    dt = torch.nn.functional.softplus(
        small(dt_init="mamba", d_model=256, n_heads=4).blocks[0].attn.dt_proj.bias.detach()
    )
    assert float(dt.min()) >= 0.001 * 0.999
    assert float(dt.max()) <= 0.1 * 1.001
    assert abs(float(dt.log().mean()) - math.log(0.01)) < 0.35
    plain = torch.nn.functional.softplus(small(dt_init="linear", d_model=256).blocks[0].attn.dt_proj.bias.detach())
    assert 0.5 < float(plain.mean()) < 0.9


def test_a_fresh_network_is_the_same_on_any_number_of_threads():
    """Matrices are made orthogonal by factors that several threads would round in another order."""
    before, starts = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            starts.append(Hymba(HymbaConfig(**(SMALL | {"d_model": 64, "n_heads": 4, "n_kv_heads": 2}))).state_dict())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [name for name in starts[0] if not torch.equal(starts[0][name], starts[1][name])] == []


def test_starts_orthogonal_and_zero():
    torch.manual_seed(0)
    net = Hymba(HymbaConfig(**SMALL))
    weight = net.blocks[0].attn.c_q.weight.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(32), atol=1e-5)
    for block in net.blocks:
        assert not block.attn.proj.weight.any()
        assert not block.mlp.proj.weight.any()
    loss = net(torch.randint(0, 64, (1, 8)), torch.randint(0, 64, (1, 8)))
    assert float(loss.detach()) == pytest.approx(math.log(64), abs=0.05)


def test_gates_on_the_branches_start_open_and_then_act_on_their_own_channels():
    torch.manual_seed(0)
    inputs = torch.randint(2, 64, (1, 12))
    plain, gated = small(), Hymba(HymbaConfig(**SMALL, branch_gate=5))
    gated.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(gated(inputs), plain(inputs))
        mixer, x = gated.blocks[0].attn, torch.randn(1, 3, 32)
        attended, scanned = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
        mixer.branch_gate[1] = -1000 * x[0, 2, :5]  # attention's second head, shut for the last token
        mixer.branch_gate[4] = 1000 * x[0, 2, :5]  # the scan's first channels, wide open
        out_attended, out_scanned = mixer.gated(x, attended, scanned)
    assert not out_attended[0, 2, 8:16].any()
    assert torch.equal(out_attended[0, 2, :8], attended[0, 2, :8])
    assert torch.equal(out_scanned[0, 2, :8], 2 * scanned[0, 2, :8])
    assert torch.equal(out_scanned[0, 2, 8:], scanned[0, 2, 8:])


def test_branches_side_by_side_are_a_sum_of_two_projections():
    net = small(merge="concat", n_layers=2).eval()
    names = {name.rsplit(".", 2)[1] for name, _ in net.named_parameters() if ".attn." in name}
    assert "mamba_out_proj" not in names
    x = torch.randn(2, 9, 32)
    mixer, seen = net.blocks[0].attn, []
    mixer.proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    from hymba_lightning.model.attention import rope_table

    with torch.no_grad():
        out, _ = mixer(x, rope_table(0, 9, net.config.head_dim, 10000.0, x.device), None, False)
        attended, scanned = seen[0].split([32, 32], dim=-1)
        weight = mixer.proj.weight
        torch.testing.assert_close(out, attended @ weight[:, :32].T + scanned @ weight[:, 32:].T)
        other = small(n_layers=2).eval()
        assert sum(p.numel() for p in other.parameters()) - sum(p.numel() for p in net.parameters()) == 2  # the α


def test_gated_values_and_normalised_dynamics_are_what_their_names_say():
    torch.manual_seed(0)
    inputs = torch.randint(2, 64, (1, 12))
    net = small(value_gate=True, dynamics_norm=True).eval()
    with torch.no_grad():
        _, state = net(inputs[:, :6], return_state=True)
        scaled = small(value_gate=True, dynamics_norm=True).eval()
        scaled.load_state_dict(net.state_dict())
        for block in scaled.blocks:
            block.attn.x_proj.weight.mul_(3)
        whole, other = net(inputs), scaled(inputs)
    # x·sigmoid(x) is never below -0.2785, whatever the projection gives.
    assert float(state.layers[0].values.min()) >= -0.2785
    assert float(state.layers[0].values.max()) > 0
    # The scale of dt's low-rank vector, B and C does not matter once they are normalised.
    assert rms_ratio(other, whole) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"logit_softcap": 2.0, "tie_embeddings": False, "meta_tokens": 3}], ids=str)
def test_loss_is_the_cross_entropy_of_the_logits(changes):
    net = small(**changes)
    inputs, targets = torch.randint(0, 64, (2, 21)), torch.randint(0, 64, (2, 21))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(net(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        for reduction, value in (("none", expected.view(2, 21)), ("sum", expected.sum()), ("mean", expected.mean())):
            torch.testing.assert_close(net(inputs, targets, reduction=reduction), value)
        naive = small(RuntimeConfig(loss_backend="naive"), **changes)
        torch.testing.assert_close(naive(inputs, targets), expected.mean())
        with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', not 'median'"):
            net(inputs, targets, reduction="median")
        with pytest.raises(ValueError, match="no backend 'fused'; choose auto or one of naive, numba, torch, triton"):
            small(RuntimeConfig(loss_backend="fused"), **changes)(inputs, targets)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16], ids=str)
def test_token_ids_of_any_integers_mean_the_same(dtype):
    # The bigram hash of such ids does not fit into 32 bits.
    net = small(vocab_size=30_000).eval()
    inputs = torch.randint(25_000, 30_000, (2, 9))
    with torch.no_grad():
        assert torch.equal(net(inputs.to(dtype), inputs.to(dtype)), net(inputs, inputs))


def test_inputs_that_cannot_be_are_refused_by_name():
    net, ids = small(), torch.randint(0, 64, (3, 12))
    _, state = net(ids, return_state=True)
    for call, message in (
        (lambda: net(ids[0]), r"inputs must be integer token ids \(sequences, tokens\).* not \(12,\) of torch.int64"),
        (lambda: net(ids.tolist()), "inputs must be integer token ids.* not list"),
        (lambda: net(ids.float()), "inputs must be .* of torch.float32"),
        (lambda: net(ids[:0]), r"at least one of each, not \(0, 12\)"),
        (lambda: net(ids[:, :0], ids[:, :0]), r"at least one of each, not \(3, 0\)"),
        (lambda: net(ids, ids.float()), "targets must be integer token ids"),
        (lambda: net(ids, ids.T), r"targets \(12, 3\) must have one token for each of inputs \(3, 12\)"),
        (lambda: net(ids[:2], state=state), r"the state is of 3 sequences and inputs \(2, 12\) of 2"),
        (lambda: net(ids + 60), "token ids must be 0 to 63"),
        (lambda: small(logit_softcap=0.0)(ids, torch.full_like(ids, -100)), "Target -100 is out of bounds"),
    ):
        with pytest.raises((ValueError, IndexError), match=message):
            call()


def test_gradients_per_sequence_and_along_a_direction_by_torch_func():
    net, inputs = small(), torch.randint(0, 64, (2, 20))
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(weights, inputs_T):
        return torch.func.functional_call(net, weights, (inputs_T[None], inputs_T[None]))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, inputs)
    for row, inputs_T in enumerate(inputs):
        net.zero_grad()
        net(inputs_T[None], inputs_T[None]).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(each[name][row], parameter.grad, atol=1e-6, rtol=1e-4)
    directions = {name: torch.randn_like(value) for name, value in weights.items()}
    _, slope = torch.func.jvp(lambda weights: loss(weights, inputs[1]), (weights,), (directions,))
    expected = sum((each[name][1] * directions[name]).sum() for name in weights)
    torch.testing.assert_close(slope, expected, atol=1e-5, rtol=1e-4)


def test_a_second_derivative_that_there_is_not_is_told_with_the_way_to_one():
    net, inputs = small(), torch.randint(0, 64, (2, 20))
    (slope,) = torch.autograd.grad(net(inputs, inputs), net.skip_weights, create_graph=True)
    with pytest.raises(RuntimeError, match=r"has no second derivative: take it by torch\.func"):
        slope.sum().backward()


def test_bfloat16_stays_close_and_keeps_float32_weights_and_loss():
    torch.manual_seed(0)
    inputs, targets = torch.randint(0, 64, (2, 33)), torch.randint(0, 64, (2, 33))
    exact, rounded = small(), small(RuntimeConfig(compute_dtype="bfloat16"))
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    loss = rounded(inputs, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    exact(inputs, targets).backward()
    assert float(loss.detach()) == pytest.approx(float(exact(inputs, targets).detach()), rel=5e-3)
    lone = []
    for (name, a), (_, b) in zip(rounded.named_parameters(), exact.named_parameters(), strict=True):
        if a.numel() == 1:
            lone.append((a.grad, b.grad))
        else:
            assert rms_ratio(a.grad, b.grad) < 0.15, name
    # A lone number's gradient is a sum of thousands that mostly cancel, and so less exact: all of them together.
    assert rms_ratio(*(torch.cat([g.flatten() for g in column]) for column in zip(*lone, strict=True))) < 0.3


def test_recomputation_changes_no_gradient():
    inputs, targets = torch.randint(0, 64, (1, 24)), torch.randint(0, 64, (1, 24))
    plain, recomputed = small(), small(RuntimeConfig(activation_checkpointing=True))
    plain(inputs, targets).backward()
    recomputed(inputs, targets).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"window": 0}, "window"),
        ({"d_model": 1 << 63}, "d_model"),
        ({"mlp_slope": 1e300}, "mlp_slope"),
        ({"d_model": 36, "n_heads": 4}, "odd"),
        ({"global_layers": "all"}, "global_layers"),
        ({"global_layers": [9]}, "global_layers"),
        ({"merge": "sum"}, "merge"),
        ({"dt_min": 0.2}, "dt_min"),
        ({"bos_id": 64}, "bos_id"),
        ({"n_layers": 1}, "n_layers"),
        ({"logit_softcap": -1.0}, "logit_softcap"),
        ({"branch_gate": 33}, "branch_gate"),
        ({"layer_windows": [8, 8]}, "layer_windows"),
        ({"layer_windows": [8, 8, 8, 0]}, "layer_windows"),
    ],
)
def test_a_config_that_cannot_be_names_its_field(changes, message):
    with pytest.raises(ValueError, match=message):
        HymbaConfig(**(SMALL | changes))


@pytest.mark.parametrize(
    ("given", "plain"),
    [({"global_layers": (0, 2)}, [0, 2]), ({"d_model": np.int64(64)}, 64), ({"qk_gain": np.float32(1.5)}, 1.5)],
    ids=str,
)
def test_values_as_users_write_them_are_plain_in_what_is_saved(given, plain):
    config = HymbaConfig(**(SMALL | given))
    saved = config.to_dict()
    value = saved[next(iter(given))]
    assert (value, type(value)) == (plain, type(plain))
    assert HymbaConfig.from_dict(saved) == config


def test_config_survives_a_round_trip_and_names_unknown_fields():
    for changes in ({"global_layers": [0, 3]}, {"layer_windows": [3, 8, 1, 12]}):
        config = HymbaConfig(**SMALL, **changes)
        assert HymbaConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="n_experts"):
        HymbaConfig.from_dict(config.to_dict() | {"n_experts": 2})


def test_flops_follow_the_parameters():
    net = outline(HymbaConfig())
    # All but tables that are looked up, the convolution and what there is one of for each channel.
    d, e, r, n = 512, 512, 32, 8
    mixer = d * d + d * 512 + d * 2 * e + e * (r + 2 * n) + r * e + e * d + d * d
    assert matmul_params(net) == 7 * (mixer + 8 * d * d) + 128 * d + d * 1024
    keys = 512 - 512 * 511 / (2 * 32768)
    assert train_flops_per_token(net, 32768) == 6 * matmul_params(net) + 7 * (12 * d * keys + 27 * e * n)
    assert train_flops_per_token(net, 65536) == pytest.approx(train_flops_per_token(net, 32768), rel=1e-3)
    windows = outline(HymbaConfig(layer_windows=[512] * 6 + [2048]))
    assert train_flops_per_token(windows, 32768) - train_flops_per_token(net, 32768) == pytest.approx(
        12 * 512 * 1536, rel=0.05
    )
    shared = outline(HymbaConfig(kv_share_every=7, tie_embeddings=False))
    assert matmul_params(shared) == matmul_params(net), "what several layers share is multiplied in each"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RuntimeConfig) if "op" in field.metadata])
def test_a_backend_that_is_none_is_refused_before_it_is_asked_for(field):
    with pytest.raises(ValueError, match="has no backend 'fast'; choose auto or one of "):
        Hymba(HymbaConfig(**SMALL), RuntimeConfig(**{field: "fast"}))
