"""Attention over a prefix and a window: the definition is its sentence, and every backend is the definition."""

import math

import pytest
import torch
from op_cases import assert_close

from hymba_lightning.ops.prefix_window import available_backends, backend_blocked, prefix_window_attention

BACKENDS = [name for name in available_backends("cpu") if name != "naive"]


def draw(batch, n_queries, n_keys, heads, kv_heads, width, value_width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, n_queries, heads, width), (batch, n_keys, kv_heads, width), (batch, n_keys, kv_heads, value_width)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def test_the_definition_is_its_sentence():
    q, k, v = draw(1, 6, 9, 2, 1, 4, 3)
    out = prefix_window_attention(q, k, v, window=2, prefix=2, backend="naive")
    for t in range(6):
        i = 3 + t
        seen = [j for j in range(i + 1) if j < 2 or i - j < 2]
        for head in range(2):
            weights = torch.stack([(q[0, t, head] @ k[0, j, 0]) / math.sqrt(4) for j in seen]).softmax(0)
            wanted = sum(w * v[0, j, 0] for w, j in zip(weights, seen, strict=True))
            assert torch.allclose(out[0, t, head], wanted, atol=1e-6)


SHAPES = {
    "from the start, last block not full": (2, 61, 61, 5, 3),
    "prefix alone": (1, 4, 4, 3, 4),
    "continued": (1, 40, 47, 5, 3),
    "continued, window not full": (2, 30, 35, 9, 4),
    "one token": (2, 1, 12, 9, 3),
    "window of one": (1, 33, 33, 1, 1),
    "window longer than all": (1, 20, 20, 64, 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("widths", [(4, 4, 8), (2, 8, 8), (4, 8, 4)], ids=str)
def test_backends_compute_the_definition(monkeypatch, backend, shape, widths):
    monkeypatch.setattr(backend_blocked, "BLOCK", 16)
    batch, n_queries, n_keys, window, prefix = shape
    kv_heads, width, value_width = widths
    results = []
    for name in ("naive", backend):
        qkv = draw(batch, n_queries, n_keys, 4, kv_heads, width, value_width)
        out = prefix_window_attention(*qkv, window=window, prefix=prefix, backend=name)
        asked = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        results.append((out, *torch.autograd.grad((out * asked).sum(), qkv)))
    for what, got, wanted in zip(("out", "q", "k", "v"), results[1], results[0], strict=True):
        assert_close(what, got, wanted, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_of_a_row_are_as_if_they_were_not_there(backend):
    q, k, v = draw(3, 2, 13, 4, 2, 4, 8)
    hidden = torch.tensor([0, 4, 7])
    out = prefix_window_attention(q, k, v, window=9, prefix=3, hidden_B=hidden, backend=backend)
    for row, n in enumerate(hidden.tolist()):
        rest = [torch.cat([x[row : row + 1, :3], x[row : row + 1, 3 + n :]], 1) for x in (k, v)]
        alone = prefix_window_attention(q[row : row + 1], *rest, window=9, prefix=3, backend="naive")
        assert_close(f"row {row}", out[row : row + 1], alone, 2e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"prefix": 0}, "prefix=0 from 1 to the 6 keys"),
        ({"prefix": 7}, "prefix=7 from 1 to the 6 keys"),
        ({"hidden_B": torch.zeros(1)}, "hidden_B must be 1 whole numbers"),
        ({"backend": "flash"}, "choose auto or one of"),
    ],
)
def test_what_cannot_be_is_one_sentence(change, said):
    q, k, v = draw(1, 4, 6, 2, 2, 4, 4)
    with pytest.raises(ValueError, match=said):
        prefix_window_attention(q, k, v, **({"window": 3, "prefix": 2} | change))
    with pytest.raises(ValueError, match="fewer than the 6 queries"):
        prefix_window_attention(k, q, q, window=3, prefix=2)
    with pytest.raises(ValueError, match=r"so k must be \(1, S, G, 4\)"):
        prefix_window_attention(q, k[..., :2], v, window=3, prefix=2)
