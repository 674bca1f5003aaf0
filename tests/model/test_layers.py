"""Projections of one input together: one product of many tokens, one after the other of a few."""

import pytest
import torch

from hymba_lightning.model.layers import FEW_ROWS, Linear, fused_linear


@pytest.mark.parametrize("tokens", [1, FEW_ROWS, FEW_ROWS + 1])
def test_few_tokens_and_many_give_the_same_projections(tokens, monkeypatch):
    torch.manual_seed(0)
    linears, x = [Linear(8, 4), Linear(8, 12)], torch.randn(1, tokens, 8)
    sizes = [4, 6, 6]
    expected = fused_linear(x, linears, sizes, unit=2)
    joined = []
    monkeypatch.setattr(
        "hymba_lightning.model.layers.torch.cat",
        lambda tensors, dim=0: joined.append(dim) or torch.concat(tensors, dim),
    )
    with torch.no_grad():
        found = fused_linear(x, linears, sizes, unit=2)
    assert joined == [-1 if tokens <= FEW_ROWS else 0], "outputs of a few tokens are put together, not the matrices"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
