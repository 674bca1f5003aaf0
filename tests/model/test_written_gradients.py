"""Pieces of the network whose gradient is written out, against autograd through their plain expressions."""

import pytest
import torch

from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig, block
from hymba_lightning.model.attention import rope_table, rope_table_op
from hymba_lightning.model.layers import RMS_EPS, Linear, fused_linear, rms_norm
from hymba_lightning.model.mixer import Merge
from hymba_lightning.model.mixers.mamba import Mixer
from hymba_lightning.ops.registry import BackendUnavailableError
from hymba_lightning.ops.rotary_norm import rotary_norm
from hymba_lightning.ops.scaled_sum import scaled_sum


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def check(written, plain, inputs, seed=9):
    """Same output and, for the same random gradient of it, the same gradients of all inputs."""
    found, expected = written(*inputs), plain(*inputs)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
    for a, b in zip(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def halves_rotated(x, first):
    """RoPE as the paper writes it: every pair (x_i, x_{i+K/2}) turned by -position·base^(-2i/K)."""
    length, width = x.size(1), x.size(-1)
    angle = torch.outer(torch.arange(first, first + length).float(), 100.0 ** -(torch.arange(0, width, 2) / width))
    turned = (
        torch.view_as_complex(torch.stack(x.chunk(2, dim=-1), dim=-1).contiguous())
        * torch.polar(torch.ones_like(angle), -angle)[:, None]
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize(
    ("length", "width", "first", "backend"),
    [(7, 8, 0, "torch"), (7, 2, 5, "torch"), (7, 20, 3, "torch"), (130, 32, 3, "numba"), (20, 64, 0, "numba")],
)
def test_norm_and_rotation(length, width, first, backend):
    tables = rope_table(first, length, width, 100.0, torch.device("cpu"))
    x, gain = random(2, length, 3, width, seed=1), random(3, seed=2)

    def turned(x, gain=None):
        return rotary_norm(x, gain, *tables, RMS_EPS, backend=backend)

    check(
        turned,
        lambda x, gain: halves_rotated(rms_norm(x) * gain[:, None], first),
        [x, gain],
    )
    check(turned, lambda x: halves_rotated(rms_norm(x), first), [x])


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_norm_and_rotation_of_tiny_vectors_counts_epsilon(backend):
    tables = rope_table(0, 17, 32, 100.0, torch.device("cpu"))
    x = (1e-4 * random(1, 17, 1, 32, seed=1).detach()).requires_grad_()
    check(
        lambda x: rotary_norm(x, None, *tables, RMS_EPS, backend=backend) * 1e-3,
        lambda x: halves_rotated(rms_norm(x), 0) * 1e-3,
        [x],
    )


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize("eps", [1e-2, None])
def test_sum_with_gains_and_its_norm(backend, gained, eps):
    x, y, gain_y = random(2, 300, 48, seed=1), random(2, 300, 48, seed=2), random(48, seed=3)
    gain_x = [random(48, seed=4)] if gained else []

    def written(x, y, gain_y, gain_x=None):
        # Both results at once.
        return torch.stack(scaled_sum(x, y, gain_x, gain_y, eps, backend=backend))

    def plain(x, y, gain_y, gain_x=1.0):
        out = gain_x * x + gain_y * y
        return torch.stack((out, out if eps is None else out / (out.square().mean(-1, keepdim=True) + eps).sqrt()))

    check(written, plain, [x, y, gain_y, *gain_x])


def test_loops_serve_long_float32_on_a_cpu_alone(monkeypatch):
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: package == "numba")
    x = torch.randn(1, 40, 2, 32)
    tables, gain = rope_table(0, 40, 32, 100.0, torch.device("cpu")), torch.ones(32)
    scaled_sum(x, x, None, gain, backend="numba")
    for refused in (x.bfloat16(), x[:, :2, :, :], x[..., :20]):
        with pytest.raises(BackendUnavailableError, match="scaled_sum"):
            scaled_sum(refused, refused, None, gain[: refused.size(-1)], backend="numba")
    for refused in (x.bfloat16(), x[:, :2], x[..., :16]):
        with pytest.raises(BackendUnavailableError, match="rotary_norm"):
            rotary_norm(refused, None, *tables, RMS_EPS, backend="numba")


@pytest.mark.parametrize("channels", [1, 12])
def test_merge(channels):
    def plain(a, s, alpha):
        weight = torch.sigmoid(alpha)
        return weight * a + (1 - weight) * s

    check(
        lambda a, s, alpha: Merge.apply(a, s, alpha, 4),
        plain,
        [random(2, 5, 12, seed=1), random(2, 5, 12, seed=2), random(channels, seed=3)],
    )


@pytest.mark.parametrize("unit", [1, 2])
def test_one_product_for_several_projections(unit):
    x, linears = random(2, 3, 8, seed=1), [Linear(8, 6), Linear(8, 4)]
    pieces = fused_linear(x, linears, [2, 4, 4], unit)
    apart = torch.cat([linear(x) for linear in linears], dim=-1).split([2, 4, 4], dim=-1)
    for piece, expected in zip(pieces, apart, strict=True):
        torch.testing.assert_close(piece, expected)


def test_the_tables_are_a_sound_operator():
    torch.library.opcheck(rope_table_op, (3, 7, 8, 100.0, torch.empty(0)))


@pytest.mark.parametrize("merge", ["scalar", "channel", "concat"])
@pytest.mark.parametrize("gated", [False, True])
def test_scales_multiplied_into_matrices_give_the_same_output_and_gradients(merge, gated, monkeypatch):
    config = HymbaConfig(
        vocab_size=32, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, window=8, expand=2, merge=merge,
        branch_gate=4 if gated else 0, branch_norm=gated, bigram_buckets=16, bigram_dim=8,
    )  # fmt: skip
    net = Hymba(config, RuntimeConfig()).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            # No zero: matrices that are would hide what they multiply.
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    x, x0 = (random(2, 20, 32, seed=seed).detach().double().requires_grad_() for seed in (1, 2))
    tables = tuple(table.double() for table in rope_table(0, 20, config.head_dim, 100.0, torch.device("cpu")))

    def run(x, x0, *_):
        return net.blocks[1](x, x0, tables, None, False)[0]

    def folded(*inputs):
        with monkeypatch.context() as patch:
            patch.setattr(block, "folds_scales", lambda _: True)
            return run(*inputs)

    check(folded, run, [x, x0, *net.blocks[1].parameters()])


def test_a_hook_on_a_matrix_that_scales_would_be_multiplied_into_is_called(monkeypatch):
    net = Hymba(HymbaConfig(vocab_size=32, n_layers=2, d_model=32, n_heads=4), RuntimeConfig())
    monkeypatch.setattr(block, "folds_scales", lambda _: True)
    called = []
    mixer = net.blocks[1].attn
    mixer.proj.register_forward_hook(lambda *_: called.append("proj"))
    net(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    assert called == ["proj"]
    called.clear()
    mixer.proj._forward_hooks.clear()
    mixer.mamba_out_proj.register_full_backward_hook(lambda *_: called.append("mamba_out_proj"))
    net(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    assert called == ["mamba_out_proj"]


class InFloat32(Mixer):
    """Whose branch gives float32 whatever the activations are."""

    def branch(self, *given):
        y, state = super().branch(*given)
        return y.float(), state


class WithoutScale(Mixer):
    """With a `forward` of its own that knows of no scale."""

    def forward(self, x, rope, state, return_state, doc_position=None):
        return super().forward(x, rope, state, return_state, doc_position)


@pytest.mark.parametrize("mixer", [InFloat32, WithoutScale])
def test_a_mixer_of_others_needs_to_know_nothing_of_scales(mixer, monkeypatch):
    monkeypatch.setattr(block, "mixer_class", lambda _: mixer)
    torch.manual_seed(0)
    net = Hymba(HymbaConfig(vocab_size=32, n_layers=2, d_model=32, n_heads=4), RuntimeConfig(compute_dtype="bfloat16"))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.arange(16)[None]
    expected = net(ids)
    monkeypatch.setattr(block, "folds_scales", lambda _: True)
    found = net(ids)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


def test_a_step_with_folded_scales_is_one_graph(monkeypatch):
    monkeypatch.setattr(block, "folds_scales", lambda _: True)
    torch.manual_seed(0)
    net = Hymba(HymbaConfig(vocab_size=32, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, window=8, d_state=4))
    ids = torch.randint(0, 32, (1, 17))
    torch._dynamo.reset()
    compiled = torch.compile(net.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    loss = compiled(ids[:, :-1], ids[:, 1:])
    torch._dynamo.reset()  # the same code met with other shapes later would be compiled for any
    torch.testing.assert_close(loss, net(ids[:, :-1], ids[:, 1:]))
