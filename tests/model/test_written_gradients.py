"""Pieces of the network whose gradient is written out, against autograd through their plain expressions."""

import pytest
import torch

from hymba_lightning.model.attention import RotaryNorm, rope_table, rope_table_op
from hymba_lightning.model.layers import Linear, fused_linear, rms_norm
from hymba_lightning.model.mixer import Merge


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


@pytest.mark.parametrize(("width", "first"), [(8, 0), (2, 5), (20, 3)])
def test_norm_and_rotation(width, first):
    tables = rope_table(first, 7, width, 100.0, torch.device("cpu"))
    x, gain = random(2, 7, 3, width, seed=1), random(3, seed=2)
    check(
        lambda x, gain: RotaryNorm.apply(x, gain, *tables),
        lambda x, gain: halves_rotated(rms_norm(x) * gain[:, None], first),
        [x, gain],
    )
    check(lambda x: RotaryNorm.apply(x, None, *tables), lambda x: halves_rotated(rms_norm(x), first), [x])


def test_norm_and_rotation_of_tiny_vectors_counts_epsilon():
    tables = rope_table(0, 3, 4, 100.0, torch.device("cpu"))
    x = (1e-4 * random(1, 3, 1, 4, seed=1).detach()).requires_grad_()
    check(lambda x: RotaryNorm.apply(x, None, *tables) * 1e-3, lambda x: halves_rotated(rms_norm(x), 0) * 1e-3, [x])


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
